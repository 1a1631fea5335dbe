"""report.html: says what results.json says, loads nothing from elsewhere, and takes no text for markup."""

import copy
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load
from qtool.report.html import write_report

RECIPE = """\
model: demo
pipeline:
  - calibrate/text: {source: demo:calibration, samples: 2, length: 32}
  - quantize/gptq: {scheme: w4a16g128}
  - evaluate/perplexity: {source: demo:test, samples: 3, length: 32}
  - evaluate/kl_divergence: {source: demo:test, samples: 3, length: 32}
  - export/safetensors: {}
gates:
  perplexity: {max_increase: 500%}
"""
HOSTILE = "<b onclick='x'>\"&amp;"  # as markup a tag, as text these very characters
VOID = ("meta", "br")


class Page(HTMLParser):
    """The text of a page and what its tags are; fails where a tag is not closed by its own end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "style":
            return
        self.text += f"{data}\n"
        if inside in ("th", "td"):
            self.rows[-1][-1] += data
        elif inside == "title":
            self.titles.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo model."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text(RECIPE)
    run_recipe(load(folder / "r.yaml"), folder / "out", Silent())
    return folder / "out"


@pytest.fixture
def results(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "results.json").read_text()))


def written(results: dict[str, Any], path: Path, recipe: str = "model: demo\n") -> Page:
    write_report(path / "report.html", results, recipe)
    return Page((path / "report.html").read_text())


def with_linears(results: dict[str, Any], errors: dict[str, tuple[float | None, float | None]]) -> dict[str, Any]:
    """The results with linears of these names: (relative output error, SQNR in dB)."""
    rows = [{"name": name, "scheme": "s", "relative_output_error": e, "sqnr_db": s} for name, (e, s) in errors.items()]
    return results | {"blocks": rows}


def test_the_page_of_a_run_shows_its_results(folder: Path, results: dict[str, Any]) -> None:
    page = Page((folder / "report.html").read_text())
    values = {(row["name"], row["subject"]): row["value"] for row in results["metrics"]}
    chain = [values["perplexity", subject] for subject in ("original", "compressed", "export:safetensors")]
    assert " → ".join(f"{value:.4g}" for value in chain) in page.text
    assert f"compressed: {values['perplexity_change', 'compressed']:+.2%} ± " in page.text
    assert f"{values['kl_divergence', 'compressed']:.4g} ± " in page.text
    assert f"{results['model']['bits_per_weight']:.3f}" in page.text and "2 of 2 passed" in page.text
    first_cells = [row[0] for row in page.rows]
    worst_first = sorted(results["blocks"], key=lambda row: -row["relative_output_error"])
    names = [row["name"] for row in worst_first]
    assert len(names) == 42 and first_cells[first_cells.index(names[0]) :][:42] == names
    assert {stage["name"] for stage in results["stages"]} <= set(first_cells)
    assert ["safetensors", "exports/safetensors", "exactly the run's weights"] in [row[:3] for row in page.rows]
    assert list(results["versions"].values()) in page.rows
    assert (folder / "recipe.yaml").read_text() in page.text
    assert len([title for title in page.titles if title.startswith("block ")]) == 42


def test_the_page_needs_nothing_from_elsewhere(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    assert not re.search(r"url\(|@import|https?://", text)


def test_no_text_of_the_results_becomes_markup(results: dict[str, Any], tmp_path: Path) -> None:
    def spoil(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: spoil(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner) for inner in value]
        return value + HOSTILE if isinstance(value, str) else value

    clean = written(copy.deepcopy(results), tmp_path)
    spoiled = spoil(results | {"fallbacks": ["quantize/gptq: fell back"]})
    for row, before in zip(spoiled["metrics"], results["metrics"], strict=True):
        row["name"], row["unit"] = before["name"], before["unit"]  # so that the headline is made of them
    spoiled["metrics"].append(spoiled["metrics"][0] | {"name": HOSTILE, "unit": HOSTILE})
    spoiled["versions"][HOSTILE] = "1"
    page = written(spoiled, tmp_path, HOSTILE)
    assert "onclick" not in {name for name, _ in page.attributes}
    assert page.tags.count("b") == clean.tags.count("b")
    for text in (
        "demo",
        "done",
        "quantize/gptq: fell back",
        "self_attn.q_proj",
        "w4a16g128",
        "exports/safetensors",
        "perplexity",
    ):
        assert text + HOSTILE in page.text, text
    assert f"qtool: demo{HOSTILE}" in page.titles


def test_a_failed_gate_and_a_fallback_stand_out(results: dict[str, Any], tmp_path: Path) -> None:
    results["gates"][1]["passed"] = False
    page = written(results | {"status": "gate-failed", "fallbacks": ["quantize/gptq: a", "quantize/gptq: b"]}, tmp_path)
    assert "1 of 2 passed" in page.text and "1 FAILED" in page.text and "Fallbacks: 2" in page.text
    assert [row[0] for row in page.rows if row[1:2] == ["perplexity"]] == ["passed", "FAILED"]
    assert page.attributes.count(("class", "bad")) == 3  # the status, the gate, the fallbacks


def test_a_run_that_only_exports_has_a_page_without_empty_parts(results: dict[str, Any], tmp_path: Path) -> None:
    empty = {"metrics": [], "gates": [], "fallbacks": [], "blocks": []}
    page = written(results | empty, tmp_path)
    for heading in ("Quality", "Gates", "Fallbacks", "Linears"):
        assert heading not in page.text
    assert "Exports" in page.text and "svg" not in page.tags


def test_a_bar_is_as_long_as_its_number_is_large(results: dict[str, Any], tmp_path: Path) -> None:
    errors = {"h.0.a": (0.02, 20.0), "h.1.a": (0.04, 5.0), "h.2.a": (0.0, -3.0)}
    page = written(with_linears(results, errors), tmp_path)
    shares = [value for name, value in page.attributes if name == "style" and str(value).startswith("--share")]
    assert shares[:6] == [f"--share:{share}%" for share in ("100.0", "25.0", "50.0", "100.0", "0.0", "0.0")]


def heights(page: Page) -> list[float]:
    return [float(str(value)) for name, value in page.attributes if name == "cy"]


def test_the_chart_shows_the_worst_expert_of_each_block_on_a_logarithmic_axis(results: dict[str, Any], tmp_path: Path) -> None:
    errors = {f"h.{b}.experts.{e}.up": (10.0 ** (b - 4) / (e + 1), None) for b in range(3) for e in range(4)}
    page = written(with_linears(results, errors | {"lm_head": (0.5, None), "h.0.exact": (0.0, None)}), tmp_path)
    shown = [f"block {block}, experts.#.up: {10.0 ** (block - 4):.4g}" for block in range(3)]
    assert page.titles[1:] == shown
    low, middle, high = heights(page)
    assert low > middle > high  # the page counts downward
    assert low - middle == pytest.approx(middle - high, abs=0.2)  # equal ratios, equal steps, to the rounding of y
    assert (low, high) == (250.0, 20.0)  # values that are round fill the axis


@pytest.mark.parametrize(
    "errors",
    [
        {"h.0.a": (1e-7, None)},
        {"h.0.a": (0.01, None), "h.1.a": (0.01, None)},
        {"h.0.a": (9.999999999999999e-4, None), "h.9.b": (7e3, None)},
        {f"h.{n}.a": (2.0**-n, None) for n in range(60)},
        {"h.3.a": (None, 15.0)},
        {"h.0.a": (None, -7.0), "h.1.a": (None, 51.0)},
        {"h.0.a": (math.nan, 12.0), "h.1.a": (0.5, 12.0)},
    ],
)
def test_the_axis_encloses_every_value(
    errors: dict[str, tuple[float | None, float | None]], results: dict[str, Any], tmp_path: Path
) -> None:
    page = written(with_linears(results, errors), tmp_path)
    assert heights(page) and all(20 <= y <= 250 for y in heights(page))
    assert "nan" not in {str(value) for _, value in page.attributes}


def test_without_measured_inputs_the_chart_shows_the_sqnr_and_an_empty_column_is_left_out(
    results: dict[str, Any], tmp_path: Path
) -> None:
    errors = {"h.0.a": (None, 10.0), "h.1.a": (None, 20.0), "h.1.b.0": (None, 9.0), "h.1.b.1": (None, 12.0)}
    page = written(with_linears(results, errors), tmp_path)
    assert page.titles[1:] == ["block 0, a: 10", "block 1, a: 20", "block 1, b.#: 9"]  # of two experts the worse one
    assert ["linear, worst first", "scheme", "SQNR of weights (dB)"] in page.rows
