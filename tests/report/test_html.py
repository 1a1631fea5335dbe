"""report.html: says what results.json says, loads nothing from elsewhere, and takes no text for markup."""

import base64
import copy
import hashlib
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
Chart = dict[str, Any]  # a chart's data


class Page(HTMLParser):
    """The text of a page and what its tags are; fails where a tag is not closed by its own end."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.titles: list[str] = []
        self.charts: dict[str, Chart] = {}  # by title
        self.choices: dict[str, list[Chart]] = {}  # by name
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
        given = dict(attributes)
        if (data := given.get("data-chart")) is not None:
            chart = json.loads(data)
            self.charts[chart["title"]] = chart
        if (data := given.get("data-choice")) is not None:
            self.choices |= {choice["name"]: choice["charts"] for choice in json.loads(data)}
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
        if inside in ("style", "script"):
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


def error_curves(page: Page) -> dict[str, list[tuple[int, float]]]:
    """The curves of the linears' output error."""
    curves = page.charts["Relative output error by block"]["curves"]
    return {name: [(at, value) for at, value in curve] for name, curve in curves.items()}


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
    assert all([package, version] in page.rows for package, version in results["versions"].items())
    assert (folder / "recipe.yaml").read_text() in page.text
    assert sum(map(len, error_curves(page).values())) == 42
    assert len(page.charts["SQNR of weights (dB)"]["values"]) == 42
    of_linears = [name for name in page.choices if name.startswith("block ")]
    assert len(of_linears) == 42 and len(page.choices["block 5, mlp.down_proj"]) == 5
    (by_position,) = page.choices["kl_divergence, demo:test"]
    assert by_position["title"] == "kl_divergence, demo:test by positions"
    cells = {(one["label"], one["series"]): one["value"] for one in by_position["rows"]}
    parts = [row for row in results["breakdown"] if row["name"] == "kl_divergence"]
    assert cells == {(row["part"].removeprefix("positions: "), row["subject"]): row["value"] for row in parts}
    assert {label for label, _ in cells} == {"1-15", "16-31"}
    shown = {row["label"]: row for row in page.charts["perplexity, demo:test"]["rows"]}
    (compressed,) = [r for r in results["metrics"] if (r["name"], r["subject"]) == ("perplexity", "compressed")]
    t = 4.302653  # of Student's distribution of two degrees of freedom, for three windows
    spread = pytest.approx(t * compressed["stderr"], rel=1e-6)
    assert shown["compressed"] == {"label": "compressed", "value": compressed["value"], "spread": spread}


def test_the_page_needs_nothing_from_elsewhere_and_runs_one_script_which_its_policy_names(folder: Path) -> None:
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "base"} & set(page.tags)
    assert not {"src", "href", "srcset", "xlink:href"} & {name for name, _ in page.attributes}
    (scripted,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(scripted.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:"
    assert ("content", policy) in page.attributes and "Permission to use, copy, modify" in scripted
    assert not re.search(r"url\(|@import|https?://", text.replace(scripted, ""))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_browser_draws_every_chart_without_a_complaint_and_within_its_width(
    width: int, scheme: str, folder: Path, browser: Any
) -> None:
    browser.open(folder / "report.html", width, scheme)
    figures = "[...document.querySelectorAll('figure[data-chart], [data-choice] figure')]"
    marks = "(f) => f.querySelectorAll('svg rect, svg circle, svg path').length"
    drawn = browser.value(
        f"{figures}.map((f) => [f.querySelector('b').textContent, ({marks})(f), f.innerText.includes('NaN')])"
    )
    assert len(drawn) == 18 and all(n > 3 and not is_broken for _, n, is_broken in drawn), drawn
    assert browser.value("document.documentElement.scrollWidth") <= width
    browser.value(
        "(() => { const list = [...document.querySelectorAll('select')].at(-1); list.value = 41;"
        " list.dispatchEvent(new Event('change')) })()"
    )
    titles = browser.value("[...document.querySelectorAll('[data-choice] figure b')].map((b) => b.textContent)")
    assert titles[0].endswith(" by positions") and titles[1] == "Weights on the grid of w4a16g128" and len(titles) == 6
    browser.screenshot()  # for which Chromium makes the page narrower than a chart's margins for a moment
    assert browser.complaints == []


def test_a_browser_shows_equal_values_as_points_and_cuts_labels_that_would_leave_the_page(
    results: dict[str, Any], tmp_path: Path, browser: Any
) -> None:
    row = results["metrics"][0] | {"stderr": None, "value": 0.5, "unit": "fraction"}
    equal = [row | {"name": "repetition", "subject": subject} for subject in ("original", "export:" + "long-name-" * 9)]
    written(results | {"metrics": equal, "breakdown": [], "blocks": []}, tmp_path)
    browser.open(tmp_path / "report.html", 390)
    (chart,) = browser.value(
        "[...document.querySelectorAll('figure')].map((f) => ({dots: f.querySelectorAll('circle').length,"
        " lines: f.querySelectorAll('[aria-label=rule] line').length,"
        " left: Math.min(...[...f.querySelectorAll('svg text')].map((text) => text.getBoundingClientRect().left))}))"
    )
    assert (chart["dots"], chart["lines"]) == (2, 0) and chart["left"] >= 0 and browser.complaints == []


def test_gates_say_of_what_against_what_and_how_much_is_left_to_chance(results: dict[str, Any], tmp_path: Path) -> None:
    facts = {"dataset": "d", "part": "domain: code", "against": "main/results.json", "significance": 2.0, "margin_stderr": 0.25}
    page = written(results | {"gates": [results["gates"][0] | facts]}, tmp_path)
    (cells,) = [row for row in page.rows if row[:1] == ["passed"]]
    assert cells[2].endswith(" on d, domain: code") and cells[4] == "main/results.json" and cells[-1] == "2 × 0.25"


def test_the_headline_says_what_is_within_chance_and_of_which_weights_the_bits_are(
    results: dict[str, Any], tmp_path: Path
) -> None:
    for row in results["metrics"]:
        row["is_significant"] = None if row["is_significant"] is None else False
    page = written(results, tmp_path)
    assert re.search(r"compressed: \S+% ± \S+%, no significant change\n", page.text)
    assert "of the quantized weights, with their scales" in page.text
    assert "of all weights, as they are stored" in written(results | {"blocks": []}, tmp_path).text


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
    spoiled["samples"] = [{"dataset": "d", "prompt": HOSTILE, "texts": {HOSTILE: HOSTILE}}]
    page = written(spoiled, tmp_path, HOSTILE)
    assert "onclick" not in {name for name, _ in page.attributes}
    assert page.tags.count("b") == clean.tags.count("b") + 2  # of the sample
    assert "perplexity, demo:test" + HOSTILE in page.charts
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
    empty = {"metrics": [], "breakdown": [], "gates": [], "fallbacks": [], "blocks": []}
    page = written(results | empty, tmp_path)
    for heading in ("Quality", "Parts of the text", "Gates", "Fallbacks", "Linears"):
        assert heading not in page.text
    assert "Exports" in page.text and page.charts == {} and "script" not in page.tags


def test_a_bar_is_as_long_as_its_number_is_large(results: dict[str, Any], tmp_path: Path) -> None:
    errors = {"h.0.a": (0.02, 20.0), "h.1.a": (0.04, 5.0), "h.2.a": (0.0, -3.0)}
    page = written(with_linears(results, errors), tmp_path)
    shares = [value for name, value in page.attributes if name == "style" and str(value).startswith("--share")]
    assert shares[:6] == [f"--share:{share}%" for share in ("100.0", "25.0", "50.0", "100.0", "0.0", "0.0")]


def test_the_curves_show_the_worst_expert_of_each_block(results: dict[str, Any], tmp_path: Path) -> None:
    errors = {f"h.{b}.experts.{e}.up": (10.0 ** (b - 4) / (e + 1), None) for b in range(3) for e in range(4)}
    page = written(with_linears(results, errors | {"lm_head": (0.5, None), "h.0.exact": (0.0, None)}), tmp_path)
    assert error_curves(page) == {"experts.#.up": [(0, 1e-4), (1, 1e-3), (2, 1e-2)]}
    assert page.charts["Relative output error"]["values"] == [[b, "experts.#.up", 10.0 ** (b - 4)] for b in range(3)]


def test_what_is_no_number_and_what_a_logarithm_cannot_show_is_left_out(results: dict[str, Any], tmp_path: Path) -> None:
    page = written(with_linears(results, {"h.0.a": (math.nan, 12.0), "h.1.a": (0.5, 12.0), "h.2.a": (0.0, 3.0)}), tmp_path)
    assert error_curves(page) == {"a": [(1, 0.5)]}
    assert [cell[0] for cell in page.charts["SQNR of weights (dB)"]["values"]] == [0, 1, 2]


def test_the_worst_linears_are_listed_and_the_rest_is_counted(results: dict[str, Any], tmp_path: Path) -> None:
    errors = {f"h.{n}.a": (1e-3 * (n + 1), 10.0) for n in range(150)}
    page = written(with_linears(results, errors), tmp_path)
    named = [row[0] for row in page.rows if row and row[0].startswith("h.")]
    assert named == [f"h.{n}.a" for n in range(149, 21, -1)]
    assert "22 more linears stand in results.json." in page.text


def test_two_schemes_have_a_map_of_their_own(results: dict[str, Any], tmp_path: Path) -> None:
    page = written(with_linears(results, {"h.0.a": (0.1, 9.0), "h.1.a": (0.1, 9.0)}), tmp_path)
    assert "Schemes" not in page.charts
    rows = [{"name": "h.0.a", "scheme": "w4"}, {"name": "h.1.e.0", "scheme": "w4"}, {"name": "h.1.e.1", "scheme": "w8"}]
    chart = written(results | {"blocks": rows}, tmp_path).charts["Schemes"]
    assert chart["categories"] == ["w4", "w4, w8"] and chart["values"] == [[0, "a", 0], [1, "e.#", 1]]


def test_what_the_models_write_stands_side_by_side(results: dict[str, Any], tmp_path: Path) -> None:
    texts = {"original": "there was a cat", "compressed": "there was a dog"}
    page = written(results | {"samples": [{"dataset": "d", "prompt": "Once upon a time", "texts": texts}]}, tmp_path)
    assert page.tags.count("blockquote") == 2
    assert "Once upon a time\noriginal\nthere was a cat\ncompressed\nthere was a dog\n" in page.text


def test_inputs_stand_on_the_grid_that_they_are_rounded_to(results: dict[str, Any], tmp_path: Path) -> None:
    counts = [n % 5 for n in range(64)]
    grid = {"scheme": "int4", "range": [-9.0, 9.0], "levels": [float(n) for n in range(-7, 8)], "counts": counts}
    row = {"block": 0, "kind": "mlp.up_proj", "weights": {}, "inputs": {}, "input_grid": grid}
    write_report(tmp_path / "report.html", results, "model: demo\n", [row])
    (chart,) = Page((tmp_path / "report.html").read_text()).choices["block 0, mlp.up_proj"]
    assert chart["title"] == "Inputs on the grid of int4" and chart["counts"] == {"inputs before rounding": counts}
    assert (chart["levels"], chart["edges"][0], chart["edges"][-1]) == (grid["levels"], -9.0, 9.0)


def test_speed_stands_in_the_headline_where_it_was_measured(results: dict[str, Any], tmp_path: Path) -> None:
    assert "Speed" not in written(results, tmp_path).text
    row = {"dataset": "d", "stderr": None, "n_units": 2, "part": None, "higher_is_better": True, "difference": None}
    rates, firsts = ({"name": "tokens_per_second", "unit": "tokens/s"}, {"name": "first_token", "unit": "s"})
    measured = [
        row | facts | {"subject": subject, "value": value}
        for facts, values in ((rates, (21.5, 40.25)), (firsts, (0.5, 0.25)))
        for subject, value in zip(("original", "compressed"), values, strict=True)
    ]
    page = written(results | {"metrics": [*results["metrics"], *measured]}, tmp_path)
    assert "Speed\n21.5 → 40.25\ntokens/s, one text at a time\nfirst token: 0.5 → 0.25 s\n" in page.text


def test_without_measured_inputs_the_chart_shows_the_sqnr_and_an_empty_column_is_left_out(
    results: dict[str, Any], tmp_path: Path
) -> None:
    errors = {"h.0.a": (None, 10.0), "h.1.a": (None, 20.0), "h.1.b.0": (None, 9.0), "h.1.b.1": (None, 12.0)}
    page = written(with_linears(results, errors), tmp_path)
    curves = page.charts["SQNR of weights (dB) by block"]["curves"]
    assert curves == {"a": [[0, 10.0], [1, 20.0]], "b.#": [[1, 9.0]]}  # of two experts the worse one
    assert "Relative output error" not in page.charts
    assert ["linear, worst first", "scheme", "SQNR of weights (dB)"] in page.rows
