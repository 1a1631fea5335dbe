"""report.html: one self-contained page per run, from which people decide.

Headline numbers, quality before and after, gates, fallbacks, what the models write, the error and the bits of each linear,
how weights and inputs are distributed, stages, exports, versions and the recipe.
"""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from qtool.linalg.histogram import level_edges, magnitude_edges
from qtool.report.charts import (
    Chart,
    Curves,
    bins,
    block_and_kind,
    category_map,
    choice,
    curves_by_block,
    figure,
    heat_map,
    intervals,
    lines,
    pairs,
)
from qtool.report.page import Cell, Row, number, table, write_page
from qtool.report.results import parameters_in_words

SHOWN = 128  # linears that are listed and plotted one by one, the worst ones: the page stays below 2 MB for any model
STAGE_OF = {"original": "original", "transformed": "right before rounding"}


def write_report(path: Path, results: Row, recipe: str, distributions: Sequence[Row] = ()) -> None:
    """Write the page of a finished run: what results.json and distributions.json hold, and the resolved recipe."""
    model, css = escape(results["model"]["path"]), "good" if results["status"] == "done" else "bad"
    body = f"<h1>{model} <span class='{css}'>{escape(results['status'])}</span></h1>"
    body += "".join(_sections(results, distributions))
    body += f"<h2>Recipe</h2><p class='soft'>SHA-256 {escape(results['digest'])}</p><pre>{escape(recipe)}</pre>"
    write_page(path, results["model"]["path"], body)


def _sections(results: Row, distributions: Sequence[Row]) -> Iterator[str]:
    metrics = _by_metric(results["metrics"])
    tiles = ((escape(name), escape(value), map(escape, notes)) for name, value, notes in _headline(results, metrics))
    parts = (f"<div>{name}<b>{value}</b>{'<br>'.join(notes)}</div>" for name, value, notes in tiles)
    yield f"<div class='tiles'>{''.join(parts)}</div>"
    if metrics:
        yield "<h2>Quality</h2>" + _quality(results, metrics)
    if results["breakdown"]:
        yield "<h2>Parts of the text</h2>" + _breakdown(results["breakdown"])
    if results["gates"]:
        yield "<h2>Gates</h2>" + _gates(results["gates"])
    if results["fallbacks"]:
        texts = [(text,) for text in results["fallbacks"]]
        yield f"<h2 class='bad'>Fallbacks: {len(texts)}</h2>" + table(("what did less than asked",), texts)
    if results.get("samples"):
        yield "<h2>What the models write</h2>" + _samples(results["samples"])
    if results["blocks"]:
        yield "<h2>Linears</h2>" + _linears(results["blocks"])
    if distributions:
        yield "<h2>Weights and inputs</h2>" + _distributions(distributions, results["blocks"])
    yield "<h2>Stages</h2>" + _stages(results["stages"])
    if results["exports"]:
        kept = {True: "exactly the run's weights", False: "re-quantized"}
        exports = [(e["format"], e["path"], kept[e["lossless"]], e["bytes"] / 2**20) for e in results["exports"]]
        yield "<h2>Exports</h2>" + table(("format", "folder", "holds", "MiB"), exports)
    yield "<h2>Versions</h2>" + table(("package", "version"), list(results["versions"].items()))


# ---- what is measured of whole models ----


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
            chance = {subject: ", no significant change" for subject, row in rows.items() if row["is_significant"] is False}
            notes = [f"{who}: {row['value']:+.2%}{_error(row, '.2%')}{chance.get(who, '')}" for who, row in changes.items()]
            yield f"Perplexity, {dataset}", " → ".join(number(row["value"]) for row in rows.values()), notes
        elif name == "kl_divergence" and (changed := [subject for subject in rows if subject != "original"]):
            notes = [f"{unit}, {changed[0]}", *(f"{subject}: {_with_error(rows[subject])}" for subject in changed[1:])]
            yield f"KL divergence, {dataset}", _with_error(rows[changed[0]]), notes
        elif name == "tokens_per_second":
            firsts = metrics.get(("first_token", dataset, "s"), {}).values()
            notes = [f"{unit}, one text at a time", f"first token: {' → '.join(number(row['value']) for row in firsts)} s"]
            yield "Speed", " → ".join(number(row["value"]) for row in rows.values()), notes
    model, gates, stages = results["model"], results["gates"], results["stages"]
    before, after = model["bytes_original"], model["bytes_compressed"]
    notes = [f"{before / max(after, 1):.2f}× smaller, {parameters_in_words(model)}"]
    yield "Size", f"{before / 2**20:,.1f} → {after / 2**20:,.1f} MiB", notes
    is_quantized = any(row["scheme"] is not None for row in results["blocks"])
    of = "of the quantized weights, with their scales" if is_quantized else "of all weights, as they are stored"
    yield "Bits per weight", f"{model['bits_per_weight']:.3f}", [of]
    if model.get("cache") is not None:
        yield "Cache", model["cache"], ["keys and values, as every figure of the compressed model has them"]
    if model.get("attention") is not None:
        yield "Attention", model["attention"], ["rounded in every figure of the compressed model"]
    if gates:
        n_failed = sum(not gate["passed"] for gate in gates)
        yield "Gates", f"{len(gates) - n_failed} of {len(gates)} passed", [f"{n_failed} FAILED"] if n_failed else []
    peak = max((stage["peak_rss_gib"] for stage in stages), default=0.0)
    yield "Time", f"{number(sum(stage['seconds'] for stage in stages))} s", [f"at most {peak:.2f} GiB of memory"]


def _quality(results: Row, metrics: dict[tuple[str, str, str], dict[str, Row]]) -> str:
    """A chart for each metric of two subjects or more, and the table of all."""
    charts = []
    for (name, dataset, unit), rows in metrics.items():
        if len(rows) > 1 or name == "perplexity_change":
            charts.append(intervals(f"{name}, {dataset}", unit, [(subject, None, row) for subject, row in rows.items()]))
    subjects = dict.fromkeys(row["subject"] for row in results["metrics"])
    cells: list[tuple[Cell, ...]] = []
    for key, rows in metrics.items():
        cells.append((*key, *(_with_error(rows[s]) if s in rows else "" for s in subjects)))
        changes = [_change(rows[s]) if s in rows else "" for s in subjects]
        if any(changes):
            cells.append(("change from the original", "", key[2], *changes))
    said = "<p class='soft'>± is one standard error; a change pairs every window of text with the original's.</p>"
    return pairs(charts) + said + table(("metric", "dataset", "unit", *subjects), cells)


def _breakdown(rows: Sequence[Row]) -> str:
    """Each metric by what its parts are of: domains, positions, temperatures, blocks."""
    found: dict[str, dict[tuple[str, str], list[tuple[str, str, Row]]]] = {}
    for row in rows:
        what, _, part = row["part"].partition(": ")
        charts = found.setdefault(f"{row['name']}, {row['dataset']}", {})
        charts.setdefault((what, row["unit"]), []).append((part, row["subject"], row))
    choices = {
        name: [intervals(f"{name} by {what}", unit, parts) for (what, unit), parts in charts.items()]
        for name, charts in found.items()
    }
    return choice("By part:", choices)


def _gates(gates: Sequence[Row]) -> str:
    """What each gate held to what."""
    rows: list[tuple[Cell, ...]] = []
    for gate in gates:
        said, where = "passed" if gate["passed"] else "FAILED", f"{gate['subject']} on {gate['dataset']}"
        where += "" if gate["part"] is None else f", {gate['part']}"
        errors = None if gate["significance"] is None else f"{gate['significance']:g} × {number(gate['margin_stderr'])}"
        numbers = (gate["allowed"], gate["value"], errors)
        rows.append((said, gate["metric"], where, gate["limit"], gate["against"], *numbers))
    return table(("", "metric", "of", "limit", "compared with", "allowed", "value", "but for chance of"), rows)


def _samples(samples: list[Row]) -> str:
    """What each subject wrote after the same prompt, side by side."""
    parts = ""
    for row in samples:
        texts = "".join(f"<blockquote><b>{escape(who)}</b>{escape(text)}</blockquote>" for who, text in row["texts"].items())
        parts += f"<p class='prompt'><b>{escape(row['prompt'])}</b></p><div class='pair'>{texts}</div>"
    return parts


def _stages(stages: list[Row]) -> str:
    """Time and memory with bars."""
    fields = ("seconds", "peak_rss_gib", "peak_gpu_gib")
    most = {field: max((stage[field] or 0.0 for stage in stages), default=0.0) for field in fields}
    rows: list[tuple[Cell, ...]] = []
    for stage in stages:
        rows.append((stage["name"], *(None if stage[field] is None else (stage[field], most[field]) for field in fields)))
    return table(("stage", "seconds", "peak memory (GiB)", "peak GPU memory (GiB)"), rows)


# ---- linears ----


def _linears(linears: list[Row]) -> str:
    """Heat maps of errors and bits over blocks and linears, curves of the error, and the worst linears as a table."""
    outputs = curves_by_block(linears, "relative_output_error", max)
    sqnr = curves_by_block(linears, "sqnr_db", min)
    schemes = _schemes(linears)
    maps = [
        heat_map("Relative output error", outputs, is_log=True),
        heat_map("SQNR of weights (dB)", sqnr, low_is_bad=True),
        category_map("Schemes", schemes) if len({word for words in schemes.values() for word in words.values()}) > 1 else None,
    ]
    curve = lines("Relative output error by block", outputs, is_log=True) or lines("SQNR of weights (dB) by block", sqnr, False)
    return "".join(map(figure, [*maps, curve])) + _table_of(linears)


def _schemes(linears: list[Row]) -> dict[str, dict[int, str]]:
    """Kind: block: scheme; of experts with different schemes all are named."""
    found: dict[str, dict[int, str]] = {}
    for row in linears:
        place = block_and_kind(row["name"])
        if place is not None and row["scheme"] is not None:
            of_kind = found.setdefault(place[1], {})
            known = of_kind.get(place[0], "").split(", ") if place[0] in of_kind else []
            of_kind[place[0]] = ", ".join(dict.fromkeys([*known, row["scheme"]]))
    return found


def _badness(row: Row) -> tuple[float, float]:
    """The worst first."""
    return -(row.get("relative_output_error") or 0), row.get("sqnr_db") or 0


def _table_of(linears: list[Row]) -> str:
    fields = ("relative_output_error", "sqnr_db")
    most = {field: max((row[field] for row in linears if row.get(field) is not None), default=0.0) for field in fields}
    rows: list[tuple[Cell, ...]] = []
    for row in sorted(linears, key=_badness)[:SHOWN]:
        bars = [None if row.get(field) is None else (row[field], full) for field, full in most.items()]
        rows.append((row["name"], row["scheme"], *bars, row.get("predicted_loss"), row.get("seconds")))
    errors = ("relative output error", "SQNR of weights (dB)", "predicted KL of its unit")
    left = len(linears) - len(rows)
    said = f"<p class='soft'>{left} more linears stand in results.json.</p>" if left else ""
    return table(("linear, worst first", "scheme", *errors, "seconds"), rows) + said


# ---- distributions ----


def _distributions(found: Sequence[Row], linears: list[Row]) -> str:
    """Outliers over the blocks, before and after the transforms; and of one linear at a time all its histograms."""
    overview = [
        lines("Inputs: largest channel over the median one, worst linear", _worst(found, "inputs", "channel_ratio"), True),
        lines("Inputs: kurtosis (normal: 3), worst linear", _worst(found, "inputs", "kurtosis"), True),
        lines("Weights: kurtosis (normal: 3), worst linear", _worst(found, "weights", "kurtosis"), True),
    ]
    worst: dict[tuple[int, str], tuple[float, float]] = {}
    for row in linears:
        if (place := block_and_kind(row["name"])) is not None:
            worst[place] = min(worst.get(place, (0.0, 0.0)), _badness(row))
    ordered = sorted(found, key=lambda row: worst.get((row["block"], row["kind"]), (0.0, 0.0)))[:SHOWN]
    choices = {f"block {row['block']}, {row['kind']}": _of_linear(row) for row in ordered}
    left = len(found) - len(ordered)
    said = f"; {left} more stand in distributions.json" if left else ""
    return pairs(overview) + choice(f"Distributions, the worst linear first{said}:", choices)


def _worst(found: Sequence[Row], side: str, field: str) -> Curves:
    """The largest of a field over a block's linears, a curve for each stage of the model."""
    curves: Curves = {}
    for row in found:
        for stage, facts in row[side].items():
            if facts.get(field) is not None:
                curve = curves.setdefault(STAGE_OF[stage], {})
                curve[row["block"]] = max(facts[field], curve.get(row["block"], facts[field]))
    return curves


def _of_linear(row: Row) -> list[Chart | None]:
    """Weights on the grid, levels used, inputs on theirs, and magnitudes of weights, inputs and channels."""
    grid, edges, charts = row.get("grid"), magnitude_edges(), list[Chart | None]()
    if grid is not None:
        scheme, edges_of_grid = grid["scheme"], level_edges(*grid["range"])
        rising = sorted(set(grid["levels"]))
        counts = {"weights before rounding": grid["counts"]}
        charts.append(bins(f"Weights on the grid of {scheme}", "in units of the scale", edges_of_grid, counts, rising))
        if sum(grid["used"]):
            used = {level: 0 for level in rising}
            for level, count in zip(grid["levels"], grid["used"], strict=True):
                used[level] += count
            borders = _borders(rising)
            after = {"weights after rounding": list(used.values())}
            charts.append(bins("Levels used", "in units of the scale", borders, after))
    if (of_inputs := row.get("input_grid")) is not None:
        counts, levels = {"inputs before rounding": of_inputs["counts"]}, sorted(set(of_inputs["levels"]))
        title = f"Inputs on the grid of {of_inputs['scheme']}"
        charts.append(bins(title, "in units of the scale", level_edges(*of_inputs["range"]), counts, levels))
    for side, title in (("weights", "Magnitudes of weights"), ("inputs", "Magnitudes of inputs")):
        counts = {STAGE_OF[stage]: facts["counts"] for stage, facts in row[side].items()}
        charts.append(bins(title, "magnitude", edges, counts, is_log=True))
    channels = {
        STAGE_OF[stage]: {round(100 * n / max(len(facts["channels"]) - 1, 1)): v for n, v in enumerate(facts["channels"])}
        for stage, facts in row["inputs"].items()
    }
    charts.append(lines("Largest input of each channel", channels, is_log=True, x="% of channels below"))
    return charts


def _borders(levels: Sequence[float]) -> list[float]:
    """Between neighbouring levels halfway, and as far beyond the first and the last."""
    middle = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    return [2 * levels[0] - middle[0], *middle, 2 * levels[-1] - middle[-1]] if middle else [levels[0] - 1, levels[0] + 1]


def _with_error(row: Row) -> str:
    return number(row["value"]) + _error(row, ".2g")


def _change(row: Row) -> str:
    """The difference from the original, or that it is within chance; empty where the row is not compared."""
    if row.get("difference") is None:
        return ""
    if row["is_significant"] is False:
        return "no significant change"
    return f"{row['difference']:+.3g}" + _error({"stderr": row["difference_stderr"]}, ".2g")


def _error(row: Row, form: str) -> str:
    return "" if row["stderr"] is None else f" ± {row['stderr']:{form}}"
