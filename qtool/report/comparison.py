"""Runs beside each other: what each one gives and costs, paired differences, and which of them nothing beats.

    a run    a folder of `qtool run`, or its results.json with paired.json beside it
    front    a run is on the Pareto front of a cost and a quality if no other run is at least as good in both and better in one
    Δ        value - value of the first run; its standard error pairs windows and documents where both measured the same ones
Runs are only compared where they measured the same texts with the same original: each run measured the original too, and its
figures for it must agree. Figures agree to SAME, what another machine's order of float32 sums may change.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from qtool.errors import QtoolError, nearest
from qtool.linalg.contributions import difference_error, is_significant
from qtool.report.charts import pairs, scatter, spread
from qtool.report.page import Cell, Row, number, table, write_page
from qtool.report.results import are_paired, option_differences

SAME = 1e-3  # relative
COSTS = {  # field of a run: in words
    "bits_per_weight": "bits per weight",
    "mib": "MiB of weights",
    "seconds": "seconds that the run took",
    "ms_per_token": "ms per generated token",  # where evaluate/generation measured it
}
PREFERRED = ("kl_divergence", "perplexity")  # what quality is measured by, where nothing is said
Key = tuple[str, str]  # name and dataset of a metric


@dataclass(frozen=True)
class Run:
    """What a comparison reads of one run; `metrics` by subject, then by name and dataset."""

    name: str
    path: Path
    results: Row
    metrics: dict[str, dict[Key, Row]]
    parts: dict[tuple[str, str, str], list[float]]  # name, dataset, subject: what each window contributes
    evaluations: list[tuple[str, Row]]  # the evaluate steps with their options, as far as the recipe is there

    @property
    def costs(self) -> dict[str, float]:
        model, stages = self.results["model"], self.results["stages"]
        seconds = sum(stage["seconds"] for stage in stages if not stage["name"].startswith("evaluate/"))
        found = {"bits_per_weight": model["bits_per_weight"], "mib": model["bytes_compressed"] / 2**20, "seconds": seconds}
        rates = [row["value"] for (name, _), row in self.metrics.get("compressed", {}).items() if name == "tokens_per_second"]
        return found | ({"ms_per_token": 1000 / rates[0]} if rates and rates[0] > 0 else {})


def read_run(path: Path) -> Run:
    """Raises QtoolError where that is no run that has come to its end."""
    file = path / "results.json" if path.is_dir() else path
    if not file.is_file():
        what = "has no results.json: is it a run, and has it come to its end?" if path.is_dir() else "does not exist"
        raise QtoolError(f"{path} {what} Name the --out folder of a finished qtool run, or its results.json")
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        metrics: dict[str, dict[Key, Row]] = {}
        for row in results["metrics"]:
            metrics.setdefault(row["subject"], {})[row["name"], row["dataset"]] = row
        beside = file.with_name("paired.json")
        paired = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else []
        parts = {(one["name"], one["dataset"], one["subject"]): one["parts"] for one in paired}
        recipe = file.with_name("recipe.yaml")
        steps = yaml.safe_load(recipe.read_text(encoding="utf-8"))["pipeline"] if recipe.is_file() else []
        stated = [(key, options or {}) for step in steps for key, options in step.items()]
        evaluations = [(key, options) for key, options in stated if key.startswith("evaluate/")]
        name = file.resolve().parent.name if file.name == "results.json" else file.stem
        run = Run(name, file.parent, results, metrics, parts, evaluations)
        assert run.costs.keys() <= COSTS.keys()
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise QtoolError(f"{file} is not what qtool run writes as results.json: {error}") from error
    return run


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """All of them, each under a name of its own; raises one QtoolError for all that cannot be read, or not be compared."""
    runs, mistakes = list[Run](), list[str]()
    for path in paths:
        try:
            runs.append(read_run(path))
        except QtoolError as error:
            mistakes.append(str(error))
    if not mistakes:
        mistakes = [text for run in runs[1:] for text in differences(runs[0], run)]
        if mistakes:
            mistakes.append("only runs of one model and the same evaluate steps say anything about each other")
    if mistakes:
        raise QtoolError("\n".join(mistakes))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # as much of the paths as tells them apart
        return [Run(str(run.path), run.path, run.results, run.metrics, run.parts, run.evaluations) for run in runs]
    return runs


def differences(first: Run, other: Run) -> list[str]:
    """Why two runs cannot be compared; empty where they can."""
    found = []
    for field, what in (("parameters", "parameters"), ("bytes_original", "bytes")):
        a, b = first.results["model"][field], other.results["model"][field]
        if a != b:
            found.append(f"{other.name}: its original has {b:,} {what}, that of {first.name} {a:,}")
    before, after = first.metrics.get("original", {}), other.metrics.get("original", {})
    for key in before.keys() & after.keys():
        a, b = before[key]["value"], after[key]["value"]
        if not math.isclose(a, b, rel_tol=SAME):
            found.append(f"{other.name}: {key[0]} of the original on {key[1]} is {b:.5g}, in {first.name} {a:.5g}")
        n, m = (rows[key].get("n_units") for rows in (before, after))
        if n and m and n != m:
            found.append(f"{other.name}: {key[0]} on {key[1]} is of {m} windows or documents, in {first.name} of {n}")
    for step, own in other.evaluations:
        same = (given for name, given in first.evaluations if (name, given.get("source")) == (step, own.get("source")))
        there = [option_differences(own, given) for given in same]
        if there and all(there) and not found:
            found.append(f"{other.name}: {step} has other options in {first.name}: {min(there, key=len)}")
    return sorted(found)


def choose_metric(runs: Sequence[Run], asked: str | None) -> Key:
    """The metric that quality is measured by: NAME, or NAME@DATASET; of the compressed model, and of all runs."""
    common = set.intersection(*(set(run.metrics.get("compressed", {})) for run in runs))
    known = sorted(key for key in common if math.isfinite(runs[0].metrics["compressed"][key]["value"]))
    if not known:
        raise QtoolError("the runs have no metric of the compressed model in common; add an evaluate step to their recipes")
    if asked is None:
        return next((key for name in PREFERRED for key in known if key[0] == name), known[0])
    named = [key for key in known if asked in (key[0], "@".join(key))]
    if not named:
        words = [*(key[0] for key in known), *("@".join(key) for key in known)]
        raise QtoolError(f'--metric: the runs have no "{asked}" in common{nearest(asked, words)}')
    return named[0]


def compare_runs(runs: Sequence[Run], key: Key) -> Row:
    """{metric, dataset, unit, higher_is_better, costs: {name: words}, runs: [{name, path, value, difference, ..., front}]}."""
    first = runs[0].metrics["compressed"][key]
    is_higher_better = bool(first.get("higher_is_better"))
    rows: list[Row] = []
    for run in runs:
        row = run.metrics["compressed"][key]
        found: Row = {"name": run.name, "path": str(run.path), "status": run.results["status"], **run.costs}
        found |= {"peak_rss_gib": max((stage["peak_rss_gib"] for stage in run.results["stages"]), default=None)}
        found |= {"value": row["value"], "stderr": row["stderr"], "n_units": row.get("n_units")}
        found |= difference(runs[0], run, key)
        measured = {f"{name}@{dataset}": one["value"] for (name, dataset), one in run.metrics["compressed"].items()}
        rows.append(found | {"metrics": measured})
    costs = {cost: words for cost, words in COSTS.items() if all(cost in row for row in rows)}
    for row in rows:
        row["front"] = [cost for cost in costs if is_on_front(row, rows, cost, is_higher_better)]
    facts = {"metric": key[0], "dataset": key[1], "unit": first["unit"], "higher_is_better": is_higher_better}
    return {"schema": 1, **facts, "costs": costs, "runs": rows}


def difference(first: Run, other: Run, key: Key) -> Row:
    """Δ with its standard error, and whether it is more than chance; of the first run itself all null."""
    if other is first:
        return {"difference": None, "difference_stderr": None, "is_significant": None}
    own, before = (run.metrics["compressed"][key] | {"parts": run.parts.get((*key, "compressed"))} for run in (other, first))
    delta = own["value"] - before["value"]
    error = difference_error(own["parts"], before["parts"]) if are_paired(own, before) else None
    return {"difference": delta, "difference_stderr": error, "is_significant": is_significant(delta, error, own.get("n_units"))}


def is_on_front(row: Row, rows: Sequence[Row], cost: str, is_higher_better: bool) -> bool:
    """Whether no row is at least as good in cost and value, and better in one."""
    sign = -1 if is_higher_better else 1

    def beats(a: Row, b: Row) -> bool:
        left, right = ((one[cost], sign * one["value"]) for one in (a, b))
        return left[0] <= right[0] and left[1] <= right[1] and left != right

    return not any(beats(other, row) for other in rows)


def write_comparison(path: Path, compared: Row) -> None:
    """The page: a plot of quality against each cost, its front marked, and the table."""
    title = f"{compared['metric']} on {compared['dataset']}"
    unit, rows = f"{compared['metric']} ({compared['unit']})", compared["runs"]
    is_log = min(row["value"] for row in rows) > 0 and max(row["value"] for row in rows) > 8 * min(row["value"] for row in rows)
    charts, known = [], compared["costs"]
    for cost, words in known.items():
        points = [
            {"x": row[cost], "y": row["value"], "spread": spread(row), "name": row["name"]}
            | {"front": cost in row["front"]}
            for row in rows
        ]
        charts.append(scatter(f"Against {words}", words, unit, points, is_log, "filled: the Pareto front"))
    cells: list[tuple[Cell, ...]] = []
    for n, row in enumerate(rows, 1):
        costs = [row[cost] for cost in known]
        front = ", ".join(known[cost].split(" ")[0] for cost in row["front"])
        cells.append(
            (
                str(n),
                row["name"],
                row["status"],
                *costs,
                row["peak_rss_gib"],
                value_in_words(row),
                difference_in_words(row),
                front,
            )
        )
    header = ("", "run", "status", *known.values(), "peak GiB", unit, f"Δ from {rows[0]['name']}", "on the front by")
    said = "Lines are 95 % intervals of each run alone; Δ pairs windows of text, and is known better."
    body = f"<h1>{escape(title)}</h1>{pairs(charts)}<p class='soft'>{said}</p>{table(header, cells)}"
    others = sorted({name for row in rows for name in row["metrics"]})
    if len(others) > 1:
        values = [(row["name"], *(row["metrics"].get(name) for name in others)) for row in rows]
        body += "<h2>All metrics</h2>" + table(("run", *others), values)
    write_page(path, title, body)


def value_in_words(row: Row) -> str:
    """A value with its standard error."""
    return number(row["value"]) + ("" if row["stderr"] is None else f" ± {row['stderr']:.2g}")


def difference_in_words(row: Row) -> str:
    """Δ with its standard error, or that it is within chance."""
    if row["difference"] is None:
        return ""
    if row["is_significant"] is False:
        return "no significant difference"
    return f"{row['difference']:+.3g}" + ("" if row["difference_stderr"] is None else f" ± {row['difference_stderr']:.2g}")
