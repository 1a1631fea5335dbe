"""Gates: what metrics must keep to, absolutely, against the original, or against a stored run.

A row of `gates` in results.json, for each limit of each gate and each changed subject:
    {metric, dataset, part, subject, against, limit, allowed, value, significance, margin_stderr, is_paired, passed}
    against: `original`, the path of the baseline's results.json, or null for an absolute limit
A gate whose `part` is a pattern judges every part that fits it by itself: `part: "domain: *"` with `max_drop: 5%` is a guard of
each class, as Entezari and Saukh 2019, arXiv:1909.10364 (Class-dependent Compression), ask for: none may pay for the others.
With `significance: k` a gate fails only where the value is beyond what is allowed by more than k standard errors of
    value - allowed = θ - θ_allowed          of an absolute limit
    value - allowed = θ - (1 + p) θ_before   of a relative one, p its percentage or zero
which pairs windows and documents where both measured the same ones, and adds squares where not (`is_paired` false).
"""

import fnmatch
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtool.errors import QtoolError, nearest
from qtool.linalg.contributions import difference_error
from qtool.recipe import Gate
from qtool.report.results import are_paired, option_differences

Row = dict[str, Any]


def check_gates(gates: Sequence[Gate], rows: Sequence[Row]) -> list[Row]:
    """Every limit of every gate against every changed subject; raises QtoolError for a metric that nothing measured.

    rows: all that was measured, with parts.
    """
    return [found for gate in gates for found in _check(gate, rows)]


def _check(gate: Gate, rows: Sequence[Row]) -> Iterator[Row]:
    measured = [row for row in rows if row["name"] == gate.metric and is_judged(gate, row["part"])]
    chosen = [row for row in measured if gate.dataset in (None, row["dataset"])]
    if not chosen:
        raise QtoolError(f"gates: {gate.metric}: {_what_is_there(gate, rows)}")
    changed = [row for row in chosen if row["subject"] != "original"]
    if not changed:
        raise QtoolError(f"gates: {gate.metric}: only the original has it, and nothing changed the model; gates judge changes")
    originals = {(row["dataset"], row["part"]): row for row in chosen if row["subject"] == "original"}
    for row in changed:
        for limit, stated in gate.limits.items():
            before = None
            if limit not in ("max", "min"):
                before = originals.get((row["dataset"], row["part"]))
                if before is None:
                    raise QtoolError(f"gates: {gate.metric}: {limit}: the original has none; use max or min")
            yield _judge(gate, row, limit, stated, before, "original" if before else None)
        if gate.baseline is not None:
            before = find_baseline(gate, row)
            for limit, stated in gate.baseline.limits().items():
                yield _judge(gate, row, limit, stated, before, gate.baseline.results)


def is_judged(gate: Gate, part: str | None) -> bool:
    """Whether a gate judges this part of a dataset, None for the whole."""
    return part == gate.part or (None not in (part, gate.part) and fnmatch.fnmatchcase(str(part), str(gate.part)))


def _judge(gate: Gate, row: Row, limit: str, stated: float | str, before: Row | None, against: str | None) -> Row:
    sign = -1.0 if limit in ("min", "max_drop") else 1.0  # what is too small, or too large
    error: float | None = row["stderr"]
    is_paired: bool | None = None
    if before is None:
        allowed = float(stated)
    else:
        percent = float(stated[:-1]) / 100 if isinstance(stated, str) else 0.0
        factor = 1 + sign * percent
        allowed = before["value"] * factor + (0.0 if isinstance(stated, str) else sign * float(stated))
        if before["value"] < 0 and percent:
            raise QtoolError(f"gates: {gate.metric}: a percentage of {before['value']:.4g} says nothing; state a number")
        is_paired = are_paired(row, before)
        if is_paired:
            error = difference_error(row["parts"], before["parts"], factor)
        else:
            both = (row["stderr"], before["stderr"])
            error = None if None in both else math.hypot(both[0], factor * both[1])
    if gate.significance is not None and error is None:
        raise QtoolError(
            f"gates: {gate.metric} has no standard error (one window, or a metric without), so that significance cannot be "
            "judged; measure more, or leave significance away"
        )
    excess = sign * (row["value"] - allowed)
    return {
        "metric": gate.metric,
        "dataset": row["dataset"],
        "part": row["part"],
        "subject": row["subject"],
        "against": against,
        "limit": f"{limit}: {stated}",
        "allowed": allowed,
        "value": row["value"],
        "significance": gate.significance,
        "margin_stderr": error,
        "is_paired": is_paired,
        "passed": excess <= (gate.significance or 0.0) * (error or 0.0),  # a value that is no number does not pass
    }


def check_baseline(gate: Gate, measuring: Sequence[tuple[str, Row]]) -> None:
    """Raise QtoolError, before any work, where a gate's stored run lacks its metric, or measured it by other options.

    measuring: key and options of the steps that measure it here; those of the stored run stand in recipe.yaml beside it.
    """
    assert gate.baseline is not None, "a gate with a baseline"
    path = Path(gate.baseline.results)
    rows = [row for row in read_rows(path) if row["name"] == gate.metric]
    if not rows:
        raise QtoolError(f"gates: {gate.metric}: baseline {path} has no such metric")
    if gate.dataset is not None and not any(row["dataset"] == gate.dataset for row in rows):
        raise QtoolError(f'gates: {gate.metric}: baseline {path} has none on "{gate.dataset}"')
    recipe = path.with_name("recipe.yaml")
    if not recipe.is_file():
        return
    try:
        stored = [(key, given or {}) for step in yaml.safe_load(_read(recipe))["pipeline"] for key, given in step.items()]
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise QtoolError(f"gates: baseline: {recipe} is not what qtool run writes as recipe.yaml: {error}") from error
    for key, own in measuring:
        others = [option_differences(own, given) for name, given in stored if name == key]
        if others and all(others):
            said = min(others, key=len)  # of the step that is most like it
            raise QtoolError(f"gates: {gate.metric}: baseline {path} measured it by other options of {key}: {said}")


def find_baseline(gate: Gate, row: Row) -> Row:
    """The baseline's row of the same metric, dataset and subject, with its parts where paired.json has them.

    Raises QtoolError where it has none, or one of another number of windows.
    """
    assert gate.baseline is not None, "a gate with a baseline"
    path, subject, dataset, part = Path(gate.baseline.results), row["subject"], row["dataset"], row["part"]
    rows = [row for row in read_rows(path) if row["name"] == gate.metric and row.get("part") == part]
    found = [row for row in rows if (row["subject"], row["dataset"]) == (subject, dataset)]
    if not found:
        there = sorted({f"{row['subject']} on {row['dataset']}" for row in rows}) or ["nothing of that name"]
        raise QtoolError(f"gates: {gate.metric}: baseline {path} has none of {subject} on {dataset}; it has {', '.join(there)}")
    n, known = row.get("n_units"), found[0].get("n_units")
    if n and known and n != known:
        raise QtoolError(f"gates: {gate.metric}: baseline {path} is of {known} windows or documents, this run of {n}")
    parts = None
    paired = path.with_name("paired.json")
    if part is None and paired.is_file():
        key = {"name": gate.metric, "dataset": dataset, "subject": subject}
        entries = (entry for entry in _read_json(paired) if {name: entry[name] for name in key} == key)
        parts = next((entry["parts"] for entry in entries), None)
    return found[0] | {"parts": parts}


def read_rows(path: Path) -> list[Row]:
    """`metrics` and `breakdown` of a results.json; raises QtoolError where it is none."""
    if not path.is_file():
        raise QtoolError(f"gates: baseline: the file {path} does not exist; name the results.json of a finished run")
    results = _read_json(path)
    if not isinstance(results, dict) or "metrics" not in results or results.get("schema") != 1:
        raise QtoolError(f"gates: baseline: {path} is no results.json of schema 1; name that of a finished run")
    return [*results["metrics"], *results.get("breakdown", [])]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise QtoolError(f"gates: baseline: {path} is no valid JSON: {error}") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QtoolError(f"gates: baseline: {path} cannot be read: {error}") from error


def _what_is_there(gate: Gate, rows: Sequence[Row]) -> str:
    """Why nothing fits a gate, and what does."""
    named = [row for row in rows if row["name"] == gate.metric]
    if not named:
        return f"no evaluate step measured it{nearest(gate.metric, {row['name'] for row in rows}) if rows else ''}"
    if gate.part is not None and not any(is_judged(gate, row["part"]) for row in named):
        parts = {row["part"] for row in named if row["part"] is not None}
        return f'part "{gate.part}" was not measured' + (nearest(gate.part, parts) if parts else "; the metric has no parts")
    return f'it was not measured on "{gate.dataset}"{nearest(str(gate.dataset), {row["dataset"] for row in named})}'
