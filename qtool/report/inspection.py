"""inspect.html: what `qtool inspect` found, as curves over the blocks and tables, in the form of a run's report."""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from qtool.report.charts import Curves, curves_by_block, figure, lines
from qtool.report.page import Cell, Row, number, table, write_page

# Title of a chart: the field of linears that it shows, the worse of two experts' values, whether its axis is logarithmic.
CHARTS = {
    "Input: largest channel over the median one": ("input_channel_ratio", max, True),
    "Input: kurtosis (normal: 3)": ("input_kurtosis", max, True),
    "Input: QSUR, share of the best": ("input_qsur_share", min, False),
    "Weights: largest row or column over the median one": ("weight_reach", max, True),
    "Weights: kurtosis (normal: 3)": ("weight_kurtosis", max, True),
    "Weights: shape of the generalised Gaussian (normal: 2, Laplace: 1)": ("weight_shape", min, False),
    "Weights: QSUR, share of the best": ("weight_qsur_share", min, False),
}


def write_inspection(path: Path, results: Row) -> None:
    """Write the page of what inspect.json holds."""
    body = f"<h1>{escape(results['model']['path'])}</h1>{''.join(_sections(results))}"
    write_page(path, results["model"]["path"], body)


def _sections(results: Row) -> Iterator[str]:
    text, (stage,) = results["text"], results["stages"]
    said = (
        f"{text['samples']} windows of {text['length']} tokens of {text['source']}; "
        f"{number(stage['seconds'])} s, at most {stage['peak_rss_gib']:.2f} GiB of memory"
    )
    yield f"<p class='soft'>{escape(said)}</p>"
    rows: list[tuple[Cell, ...]] = [(row["what"], row["value"], row["where"]) for row in results["worst"]]
    yield "<h2>Worst of each kind</h2>" + table(("what", "value", "where"), rows)
    if results["notes"]:
        yield "<h2 class='bad'>Notes</h2>" + table(("what was not measured",), [(note,) for note in results["notes"]])
    blocks = results["blocks"]
    yield "<h2>Between the blocks</h2>" + _chart("Magnitudes after the block", _magnitudes(blocks), is_log=True)
    kurtoses = _of_blocks(blocks, {"values": "kurtosis", "channels": "channel_kurtosis"})
    yield _chart("Kurtosis after the block", kurtoses, is_log=True)
    yield _blocks(results)
    attention = {block["name"]: block["attention"] for block in blocks if block["attention"] is not None}
    if attention:
        names = {"sinks": "sink_share", "first token": "first_token_share"}
        shares = _of_blocks([block["attention"] or {} for block in blocks], names)
        yield "<h2>Attention</h2>" + _chart("Share of attention", shares, is_log=False) + _attention(attention)
    yield "<h2>Linears</h2>"
    for title, (field, worse, is_log) in CHARTS.items():
        yield _chart(title, curves_by_block(results["linears"], field, worse), is_log)
    yield _linears(results["linears"])
    yield "<h2>Versions</h2>" + table(("package", "version"), list(results["versions"].items()))


def _chart(title: str, curves: Curves, is_log: bool) -> str:
    return figure(lines(f"{title} by block", curves, is_log))


def _magnitudes(blocks: list[Row]) -> Curves:
    names = ("largest", "second", "third")
    curves = {name: {at: block["largest"][n]["magnitude"] for at, block in enumerate(blocks)} for n, name in enumerate(names)}
    curves["mean"] = {at: block["mean_magnitude"] for at, block in enumerate(blocks)}
    curves["median"] = {at: block["median_magnitude"] for at, block in enumerate(blocks)}
    return curves


def _of_blocks(blocks: list[Row], fields: dict[str, str]) -> Curves:
    """Name: the field's values, where there are any."""
    curves = {name: {at: b[field] for at, b in enumerate(blocks) if b.get(field) is not None} for name, field in fields.items()}
    return {name: curve for name, curve in curves.items() if curve}


def _blocks(results: Row) -> str:
    rows: list[tuple[Cell, ...]] = []
    for row in [{"name": "embedding", **results["embedding"]}, *results["blocks"]]:
        top = row["largest"][0]
        counts = (row["massive"], row["outliers"], row["outlier_tokens"])
        place = (top["channel"], repr(top["token"]), top["position"])
        meet = row.get("outliers_meet", {})
        met = (meet.get("tokens_share"), ", ".join(map(str, meet.get("channels", ()))))
        magnitudes = (top["magnitude"], row["median_magnitude"], row["mean_magnitude"])
        rows.append((row["name"], *magnitudes, *place, *counts, row["kurtosis"], row["channel_kurtosis"], *met))
    places = ("in channel", "at token", "position")
    counts_of = ("massive", "outliers", "tokens with outliers")
    kurtoses = ("kurtosis", "kurtosis of channels", "their tokens that are sinks", "their channels with weight outliers")
    return table(("after", "largest", "median", "mean", *places, *counts_of, *kurtoses), rows)


def _attention(attention: dict[str, Row]) -> str:
    rows: list[tuple[Cell, ...]] = []
    for name, row in attention.items():
        top, heads = row["largest"][0], row["sink_share_by_head"]
        shares = (row["sink_share"], row["first_token_share"], min(heads), max(heads))
        rows.append((name, row["sinks"], *shares, top["received"], top["times_uniform"], repr(top["token"]), top["position"]))
    shares_of = ("share of all attention", "share of the first token", "least head's", "largest head's")
    return table(("block", "sinks", *shares_of, "largest share", "times uniform", "of token", "position"), rows)


def _linears(linears: list[Row]) -> str:
    titles, fields = list(CHARTS), [field for field, _, _ in CHARTS.values()]
    rows: list[tuple[Cell, ...]] = []
    for row in linears:
        lines = [row[f"weight_largest_{side}"][0]["index"] for side in ("rows", "columns")]
        place = (" × ".join(map(str, row["shape"])), row["tokens"], row["input_largest"], row["input_channel"])
        counts = (row["weight_outlier_rows"], row["weight_outlier_columns"])
        rows.append((row["name"], *place, *(row[field] for field in fields), *lines, *counts))
    places = ("out × in", "tokens", "largest input", "in channel")
    lines_of = ("largest row", "largest column", "outlier rows", "outlier columns")
    return table(("linear", *places, *titles, *lines_of), rows)
