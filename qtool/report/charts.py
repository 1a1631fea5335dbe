"""Charts of a page: what each one shows, as data that assets/report/charts.js draws with Observable Plot.

    lines      curves {name: [[x, y], ...]}          heat       values [[block, row, value], ...]
    intervals  rows [{label, value, spread, series}] bins       edges, counts {name: [...]}, levels of a grid
    scatter    points [{x, y, spread, name, front}]
Why Observable Plot (with d3, which it stands on): it draws SVG in the page itself, so a chart is as wide as a phone or a
screen leaves it room, takes its colors from the page's light or dark style, and tells values under a finger. Both are kept
up by the people who wrote them, under the ISC licence, and are two published files of 0.5 MB that need neither `eval` nor a
network, so that the page's policy can name them by their digest. Against: Plotly and Bokeh are 4.5 and 1 MB a page; Vega
0.8 MB, and compiles its charts by `eval`; matplotlib draws one width and one color scheme, and is not there in every install.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from qtool.linalg.contributions import half_width
from qtool.report.page import Row

Curves = dict[str, dict[int, float]]  # name: block: value
Chart = dict[str, object]  # one chart's data, for charts.js


def figure(chart: Chart | None) -> str:
    """The place of one chart; nothing where there is nothing to show."""
    return "" if chart is None else f"<figure data-chart='{_attribute(chart)}'></figure>"


def pairs(charts: Iterable[Chart | None]) -> str:
    """Charts beside each other where the page is wide enough."""
    places = "".join(map(figure, charts))
    return f"<div class='pair'>{places}</div>" if places else ""


def choice(label: str, choices: Mapping[str, Sequence[Chart | None]]) -> str:
    """Charts of one thing among many, which the reader chooses by its name; the first is shown."""
    listed = [{"name": name, "charts": [c for c in charts if c is not None]} for name, charts in choices.items()]
    return f"<div data-label='{escape(label)}' data-choice='{_attribute(listed)}'></div>" if listed else ""


def lines(title: str, curves: Curves, is_log: bool, x: str = "block", note: str = "") -> Chart | None:
    """Curves over the blocks; a value of zero or less has no place on a logarithmic axis."""
    kept = {
        name: [[at, short(value)] for at, value in sorted(curve.items()) if math.isfinite(value) and (value > 0 or not is_log)]
        for name, curve in curves.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    return {"kind": "lines", "title": title, "note": note, "x": x, "log": is_log, "curves": kept} if kept else None


def heat_map(title: str, curves: Curves, is_log: bool = False, low_is_bad: bool = False) -> Chart | None:
    """A cell for each block and curve; the darkest are the worst. Values are those of `lines`."""
    values = [
        [at, name, short(value)]
        for name, curve in curves.items()
        for at, value in sorted(curve.items())
        if math.isfinite(value) and (value > 0 or not is_log)
    ]
    note = "dark is worse"
    shown = {"kind": "heat", "title": title, "note": note, "x": "block", "log": is_log, "reverse": not low_is_bad}
    return {**shown, "values": values} if values else None


def category_map(title: str, words: dict[str, dict[int, str]]) -> Chart | None:
    """A cell for each block and curve, colored by its word."""
    known = list(dict.fromkeys(word for of_name in words.values() for word in of_name.values()))
    values = [[at, name, known.index(word)] for name, of_name in words.items() for at, word in sorted(of_name.items())]
    return {"kind": "heat", "title": title, "x": "block", "categories": known, "values": values} if values else None


def spread(row: Row) -> float:
    """Half of the interval that chance keeps to in 95 of 100 cases, of a row of results; zero of one without an error."""
    return half_width(row["stderr"], row.get("n_units")) if row["stderr"] else 0.0


def intervals(title: str, unit: str, rows: Sequence[tuple[str, str | None, Row]]) -> Chart | None:
    """Values of rows of results with their 95 % intervals: (label, series, row); those of one series share a color.

    Where there are no series, each label has a color.
    """
    shown = [
        {"label": label, "value": row["value"], "spread": spread(row)} | ({} if series is None else {"series": series})
        for label, series, row in rows
        if math.isfinite(row["value"])
    ]
    note = "with 95 % intervals" if any(row["spread"] for row in shown) else ""
    return {"kind": "intervals", "title": title, "note": note, "unit": unit, "rows": shown} if shown else None


def bins(
    title: str,
    x: str,
    edges: Sequence[float],
    counts: Mapping[str, Sequence[int]],
    levels: Sequence[float] = (),
    *,
    is_log: bool = False,
    note: str = "",
) -> Chart | None:
    """Shares of values over bins, one more edge than counts."""
    kept = {name: list(of_name) for name, of_name in counts.items() if sum(of_name)}
    shown = {"kind": "bins", "title": title, "note": note, "x": x, "log": is_log, "edges": list(map(short, edges))}
    return {**shown, "counts": kept, "levels": list(map(short, levels))} if kept else None


def scatter(title: str, x: str, y: str, points: Sequence[Row], is_log: bool, note: str = "") -> Chart | None:
    """Points {x, y, spread, name, front}, numbered from 1; those of the front are joined."""
    kept = [point for point in points if math.isfinite(point["y"]) and (point["y"] > 0 or not is_log)]
    return {"kind": "scatter", "title": title, "note": note, "x": x, "y": y, "log": is_log, "points": kept} if kept else None


def curves_by_block(rows: Iterable[Row], field: str, worse: Callable[[float, float], float]) -> Curves:
    """A field of linears as curves, one a kind; of several of one kind in a block (a mixture's experts) the worst counts."""
    curves: Curves = {}
    for row in rows:
        place, value = block_and_kind(row["name"]), row.get(field)
        if place is not None and value is not None and math.isfinite(value):
            block, kind = place
            curve = curves.setdefault(kind, {})
            curve[block] = worse(value, curve[block]) if block in curve else value
    return curves


def block_and_kind(name: str) -> tuple[int, str] | None:
    """The block of a linear's name, and the rest without the numbers of experts; None of one outside the blocks."""
    place = re.search(r"\.(\d+)\.(.+)", name)
    return None if place is None else (int(place[1]), re.sub(r"\.\d+", ".#", place[2]))


def short(value: float) -> float:
    """Four digits, which is more than a chart shows."""
    return float(f"{value:.4g}")


def _attribute(data: object) -> str:
    """For between single quotes; double ones, of which JSON has thousands, stay as they are."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    return escape(text, quote=False).replace("'", "&#39;")
