"""What CI shows of a run: JUnit that parses and counts, Markdown that holds its cells, annotations that stay one line."""

from typing import Any
from xml.etree import ElementTree

from qtool.report import ci

Row = dict[str, Any]


def gate(passed: bool, **fields: object) -> Row:
    row: Row = {"metric": "perplexity", "dataset": "demo:test", "part": None, "subject": "compressed", "against": "original"}
    row |= {"limit": "max_increase: 5%", "allowed": 8.4, "value": 8.9, "significance": 2.0, "margin_stderr": 0.01}
    return row | {"is_paired": True, "passed": passed} | fields


def results(gates: list[Row], fallbacks: list[str]) -> Row:
    metric: Row = {"name": "perplexity", "dataset": "demo:test", "unit": "ppl", "part": None, "stderr": 0.5}
    change: Row = {"difference": None, "difference_stderr": None, "is_significant": None}
    before = metric | change | {"subject": "original", "value": 8.0}
    worse = {"difference": 0.9, "difference_stderr": 0.01, "is_significant": True}
    after = metric | worse | {"subject": "compressed", "value": 8.9}
    same = after | {"subject": "export:gguf", "value": 8.01, "difference": 0.01, "is_significant": False}
    model = {"bytes_original": 4 << 20, "bytes_compressed": 1 << 20, "bits_per_weight": 4.125}
    stages = [{"seconds": 1.5}]
    return {"metrics": [before, after, same], "model": model, "stages": stages, "gates": gates, "fallbacks": fallbacks}


def test_junit_counts_gates_and_says_what_failed() -> None:
    suites = ElementTree.fromstring(ci.junit_xml(results([gate(True), gate(False, subject="export:<gguf>")], []), "w4 & more"))
    (suite,) = suites
    assert (suite.get("name"), suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("w4 & more", "3", "1", "0")
    passed, failed, fallbacks = suite
    assert passed.find("failure") is None and fallbacks.get("name") == "fallbacks" and len(fallbacks) == 0
    assert failed.get("name") == "perplexity max_increase: 5%, export:<gguf> on demo:test"
    failure = failed.find("failure")
    assert failure is not None
    assert failure.get("message") == "perplexity is 8.9, allowed 8.4 within 2 standard errors of 0.01"


def test_fallbacks_are_no_passed_test() -> None:
    (suite,) = ElementTree.fromstring(ci.junit_xml(results([], ["quantize/gptq: a"]), "w4"))
    (case,) = suite
    assert suite.get("skipped") == "1" and case.find("skipped") is not None
    assert case.findtext("system-out") == "quantize/gptq: a"


def test_markdown_says_what_failed_and_what_is_within_chance() -> None:
    text = ci.markdown(results([gate(True), gate(False, against="runs/a|b/results.json")], ["quantize/gptq: `x`"]), "w4-gptq")
    lines = text.splitlines()
    assert lines[0] == "### qtool w4-gptq: 1 of 2 gates failed"
    (failed,) = [line for line in lines if "FAILED" in line]
    assert "over runs/a\\|b/results.json" in failed
    (perplexity,) = [line for line in lines if line.startswith("| perplexity (ppl, demo:test)")]
    assert perplexity.split(" | ")[1:] == ["8 ± 0.5", "8.9 ± 0.5 (+0.9 ± 0.01)", "8.01 ± 0.5 (no significant change) |"]
    assert "4.0 → 1.0 MiB (4.00×), 4.12 bits per weight" in text and "- quantize/gptq: \\`x\\`" in lines


def test_annotations_are_one_line_each_whatever_the_names_hold() -> None:
    lines = ci.github_annotations(results([gate(True), gate(False, dataset="a,b:c\n::error::d")], ["50% done"]))
    assert len(lines) == 2 and all("\n" not in line for line in lines)
    title = "gate perplexity max_increase%3A 5%25%2C compressed on a%2Cb%3Ac%0A%3A%3Aerror%3A%3Ad"
    assert lines[0].startswith(f"::error title={title}::perplexity is 8.9")
    assert lines[1] == "::warning title=fallback::50%25 done"
