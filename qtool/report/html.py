"""report.html: one self-contained page per run, readable without a network, in light and dark.

Headline numbers, every metric, gates, fallbacks, the error of each linear, stages, exports, versions and the recipe.
Why no script: tables, bars and the chart are plain HTML, CSS and SVG, which open anywhere; whatever text the results hold
is escaped, and the page's own policy forbids it to load or run anything.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qtool.model.store import write_text
from qtool.report.results import parameters_in_words

Row = dict[str, Any]  # an entry of results.json
Cell = str | float | None | tuple[float, float]  # a pair: a number, and the one that would fill the cell with its bar
Curves = dict[str, dict[int, float]]  # name: block: value

POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is loaded, nothing runs
COLORS = 8  # of the chart's lines, --c0 to --c7; kinds beyond them are dashed
STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --text: #1c1c1a; --soft: #65635d; --line: #e2e1dc;
  --bar: #cfe0f6; --good: #11722f; --bad: #b3261e; --c0: #2a78d6; --c1: #eb6834; --c2: #1a9b6c; --c3: #c98a00;
  --c4: #8a3fc4; --c5: #d6457f; --c6: #3a8a1d; --c7: #7a6a5a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --text: #ecebe6; --soft: #a3a199;
  --line: #383733; --bar: #24446b; --good: #5fcf83; --bad: #ff8a80; --c0: #5b9df0; --c1: #f08a5d; --c2: #3fbf90;
  --c3: #dcae3c; --c4: #bb8be8; --c5: #ee7fab; --c6: #86c56a; --c7: #b8a795; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
h1 span { font-size: .9rem; border: 1px solid; border-radius: 1rem; padding: .15rem .7rem; white-space: nowrap; }
.soft { color: var(--soft); font-size: .87rem; } .good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .75rem; }
.tiles div, .scroll, pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tiles div { padding: .75rem 1rem; color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.tiles b { display: block; color: var(--text); font-size: 1.4rem; font-weight: 600; }
.scroll { overflow: auto; max-height: 32rem; } pre { overflow-x: auto; padding: .75rem 1rem; font-size: .87rem; }
table { border-collapse: collapse; min-width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; }
.bar { min-width: 9rem; background: linear-gradient(90deg, var(--bar) var(--share), transparent 0) content-box; }
figure { margin: .5rem 0 1rem; overflow-x: auto; } svg { display: block; width: 100%; min-width: 34rem; }
svg text { font-size: 11px; fill: var(--soft); } path { stroke: var(--line); } circle { fill: currentColor; }
polyline { fill: none; stroke: currentColor; stroke-width: 2; } figcaption { font-size: .87rem; }
figcaption > * { white-space: nowrap; margin-right: .8rem; }
i { display: inline-block; width: 1.2rem; margin-right: .35rem; vertical-align: middle; }
@media print { .scroll { max-height: none; } }
"""


def write_report(path: Path, results: Row, recipe: str) -> None:
    """Write the page of a finished run: what results.json holds, and the resolved recipe."""
    model, css = escape(results["model"]["path"]), "good" if results["status"] == "done" else "bad"
    body = f"<h1>{model} <span class='{css}'>{escape(results['status'])}</span></h1>{''.join(_sections(results))}"
    body += f"<h2>Recipe</h2><p class='soft'>SHA-256 {escape(results['digest'])}</p><pre>{escape(recipe)}</pre>"
    write_page(path, results["model"]["path"], body)


def write_page(path: Path, name: str, body: str) -> None:
    """Write a page about the model of that name; body is markup."""
    head = (
        f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        f"<meta name='viewport' content='width=device-width'><title>qtool: {escape(name)}</title><style>{STYLE}</style>"
    )
    write_text(path, f"<!doctype html><html lang='en'><head>{head}</head><body>{body}</body></html>\n")


def _sections(results: Row) -> Iterator[str]:
    metrics = _by_metric(results["metrics"])
    tiles = ((escape(name), escape(value), map(escape, notes)) for name, value, notes in _headline(results, metrics))
    parts = (f"<div>{name}<b>{value}</b>{'<br>'.join(notes)}</div>" for name, value, notes in tiles)
    yield f"<div class='tiles'>{''.join(parts)}</div>"
    if metrics:
        yield "<p class='soft'>± is one standard error; a change pairs every window of text with the original's.</p>"
        subjects = dict.fromkeys(row["subject"] for row in results["metrics"])
        shown = [[_with_error(rows[s]) if s in rows else "" for s in subjects] for rows in metrics.values()]
        rows = [(*key, *values) for key, values in zip(metrics, shown, strict=True)]
        yield "<h2>Quality</h2>" + table(("metric", "dataset", "unit", *subjects), rows)
    if results["gates"]:
        said = {True: "passed", False: "FAILED"}
        gates = [(said[g["passed"]], g["metric"], g["subject"], g["limit"], g["allowed"], g["value"]) for g in results["gates"]]
        yield "<h2>Gates</h2>" + table(("", "metric", "subject", "limit", "allowed", "value"), gates)
    if results["fallbacks"]:
        lines = [(text,) for text in results["fallbacks"]]
        yield f"<h2 class='bad'>Fallbacks: {len(lines)}</h2>" + table(("what did less than asked",), lines)
    if results["blocks"]:
        yield "<h2>Linears</h2>" + _chart(results["blocks"]) + _linears(results["blocks"])
    longest = max((stage["seconds"] for stage in results["stages"]), default=0.0)
    stages = [(s["name"], (s["seconds"], longest), s["peak_rss_gib"], s["peak_gpu_gib"]) for s in results["stages"]]
    yield "<h2>Stages</h2>" + table(("stage", "seconds", "peak memory (GiB)", "peak GPU memory (GiB)"), stages)
    if results["exports"]:
        kept = {True: "exactly the run's weights", False: "re-quantized"}
        exports = [(e["format"], e["path"], kept[e["lossless"]], e["bytes"] / 2**20) for e in results["exports"]]
        yield "<h2>Exports</h2>" + table(("format", "folder", "holds", "MiB"), exports)
    yield "<h2>Versions</h2>" + table(tuple(results["versions"]), [tuple(results["versions"].values())])


def _by_metric(metrics: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    """(name, dataset, unit): subject: entry."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in metrics:
        found.setdefault((row["name"], row["dataset"], row["unit"]), {})[row["subject"]] = row
    return found


def _headline(results: Row, metrics: dict[tuple[str, str, str], dict[str, Row]]) -> Iterator[tuple[str, str, list[str]]]:
    """(name, value, notes) of each tile."""
    for (name, dataset, unit), rows in metrics.items():
        if name == "perplexity":
            changes = metrics.get(("perplexity_change", dataset, "fraction"), {})
            notes = [f"{subject}: {row['value']:+.2%}{_error(row, '.2%')}" for subject, row in changes.items()]
            yield f"Perplexity, {dataset}", " → ".join(number(row["value"]) for row in rows.values()), notes
        elif name == "kl_divergence" and (changed := [subject for subject in rows if subject != "original"]):
            notes = [f"{unit}, {changed[0]}", *(f"{subject}: {_with_error(rows[subject])}" for subject in changed[1:])]
            yield f"KL divergence, {dataset}", _with_error(rows[changed[0]]), notes
    model, gates, stages = results["model"], results["gates"], results["stages"]
    before, after = model["bytes_original"], model["bytes_compressed"]
    notes = [f"{before / max(after, 1):.2f}× smaller, {parameters_in_words(model)}"]
    yield "Size", f"{before / 2**20:,.1f} → {after / 2**20:,.1f} MiB", notes
    yield "Bits per weight", f"{model['bits_per_weight']:.3f}", ["of the quantized weights, with their scales"]
    if model.get("cache") is not None:
        yield "Cache", model["cache"], ["keys and values, as every figure of the compressed model has them"]
    if model.get("attention") is not None:
        yield "Attention", model["attention"], ["rounded in every figure of the compressed model"]
    if gates:
        n_failed = sum(not gate["passed"] for gate in gates)
        yield "Gates", f"{len(gates) - n_failed} of {len(gates)} passed", [f"{n_failed} FAILED"] if n_failed else []
    peak = max((stage["peak_rss_gib"] for stage in stages), default=0.0)
    yield "Time", f"{number(sum(stage['seconds'] for stage in stages))} s", [f"at most {peak:.2f} GiB of memory"]


def _linears(linears: list[Row]) -> str:
    """Each linear with its errors, the worst first."""
    fields = ("relative_output_error", "sqnr_db")
    most = {field: max((row[field] for row in linears if row.get(field) is not None), default=0.0) for field in fields}
    rows: list[tuple[Cell, ...]] = []
    for row in sorted(linears, key=lambda row: (-(row.get(fields[0]) or 0), row.get(fields[1]) or 0)):
        bars = [None if row.get(field) is None else (row[field], full) for field, full in most.items()]
        rows.append((row["name"], row["scheme"], *bars, row.get("predicted_loss"), row.get("seconds")))
    errors = ("relative output error", "SQNR of weights (dB)", "predicted KL of its unit")
    return table(("linear, worst first", "scheme", *errors, "seconds"), rows)


def _chart(linears: list[Row]) -> str:
    """Error by block, a curve for each kind of linear; where the inputs were not measured, the weights' SQNR."""
    if any(row.get("relative_output_error") for row in linears):
        return chart("Relative output error", curves_by_block(linears, "relative_output_error", max, is_log=True), is_log=True)
    return chart("SQNR of weights (dB)", curves_by_block(linears, "sqnr_db", min), is_log=False)


def chart(title: str, curves: Curves, is_log: bool) -> str:
    """Curves over the blocks, drawn as SVG with their names and, under the pointer, their values; nothing without a value."""
    if not curves:
        return ""
    values, last = [v for curve in curves.values() for v in curve.values()], max(map(max, curves.values()))
    ticks, scale = _ticks(min(values), max(values), is_log), math.log10 if is_log else float
    low, span = scale(ticks[0]), scale(ticks[-1]) - scale(ticks[0]) or 1.0

    def x(block: int) -> str:
        return f"{60 + 840 * block / max(last, 1):.1f}"

    def y(value: float) -> str:
        return f"{250 - 230 * (scale(value) - low) / span:.1f}"

    parts, legend = [], ""
    for tick in ticks:
        parts.append(f"<path d='M60 {y(tick)}H900'/><text x='52' y='{y(tick)}' dy='4' text-anchor='end'>{tick:g}</text>")
    for block in range(0, last + 1, math.ceil((last + 1) / 16)):
        parts.append(f"<text x='{x(block)}' y='272' text-anchor='middle'>{block}</text>")
    for index, (kind, curve) in enumerate(curves.items()):
        color, is_dashed, dots = f"var(--c{index % COLORS})", index >= COLORS, ""
        for block, value in curve.items():
            name = f"<title>block {block}, {escape(kind)}: {number(value)}</title>"
            dots += f"<circle cx='{x(block)}' cy='{y(value)}' r='3.5'>{name}</circle>"
        path = " ".join(f"{x(block)},{y(value)}" for block, value in sorted(curve.items()))
        dash = " stroke-dasharray='5 4'" * is_dashed
        parts.append(f"<g style='color:{color}'><polyline points='{path}'{dash}/>{dots}</g>")
        border = f"{'dashed' if is_dashed else 'solid'} {color}"
        legend += f"<span><i style='border-top:3px {border}'></i>{escape(kind)}</span> "
    drawing = f"<svg viewBox='0 0 920 280' role='img' aria-label='{escape(title)} by block'>{''.join(parts)}</svg>"
    return f"<figure><figcaption><b>{escape(title)} by block</b> {legend}</figcaption>{drawing}</figure>"


def curves_by_block(rows: Iterable[Row], field: str, worse: Callable[[float, float], float], is_log: bool = False) -> Curves:
    """A field of linears as curves, one a kind; of many linears of one kind in a block (a mixture's experts) the worst counts.

    A value of zero or less is left out where the axis is logarithmic: it has no place there.
    """
    curves: Curves = {}
    for row in rows:
        place, value = re.search(r"\.(\d+)\.(.+)", row["name"]), row.get(field)
        if place is not None and value is not None and math.isfinite(value) and (value > 0 or not is_log):
            curve = curves.setdefault(re.sub(r"\.\d+", ".#", place[2]), {})
            block = int(place[1])
            curve[block] = worse(value, curve[block]) if block in curve else value
    return curves


def _ticks(low: float, high: float, is_log: bool) -> list[float]:
    """Round numbers that enclose the values: 1, 2, 5 or whole decades where logarithmic, else at most ten equal steps."""
    if is_log:
        exponents = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        every = [float(f"{digit}e{exponent}") for exponent in exponents for digit in ((1, 2, 5) if high < 1000 * low else (1,))]
    else:
        power = 10.0 ** math.floor(math.log10(max(high - low, 1e-9 * abs(high), 1e-12) / 8))
        step = next(digit * power for digit in (1, 2, 5, 10) if 8 * digit * power >= high - low)
        every = [step * n for n in range(math.floor(low / step) - 1, math.ceil(high / step) + 2)]
    first, last = max(t for t in every if t <= low), min(t for t in every if t >= high)
    return [t for t in every if first <= t <= last]


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Text to the left, numbers to the right; a column that is empty throughout is left out."""
    kept = [n for n in range(len(header)) if any(row[n] is not None for row in rows)]
    css = ["" if any(isinstance(row[n], str) for row in rows) else " class='number'" for n in kept]
    names = "".join(f"<th{c}>{escape(header[n])}</th>" for n, c in zip(kept, css, strict=True))
    lines = "".join(f"<tr>{''.join(_cell(row[n]) for n in kept)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{names}</tr>{lines}</table></div>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        css = {"passed": " class='good'", "FAILED": " class='bad'"}.get(cell, "")
        return f"<td{css}>{escape(cell)}</td>"
    if not isinstance(cell, tuple):
        return f"<td class='number'>{'' if cell is None else number(cell)}</td>"
    value, full = cell
    share = min(max(value / full, 0), 1) if full > 0 else 0
    return f"<td class='number bar' style='--share:{share:.1%}'>{number(value)}</td>"


def _with_error(row: Row) -> str:
    return number(row["value"]) + _error(row, ".2g")


def _error(row: Row, form: str) -> str:
    return "" if row["stderr"] is None else f" ± {row['stderr']:{form}}"


def number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
