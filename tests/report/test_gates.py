"""Gates: absolute, against the original, against a stored run; by errors that pair windows; and what is wrong with one."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from qtool.artifact import Metric, mean_metric
from qtool.errors import QtoolError
from qtool.recipe import Baseline, Gate
from qtool.report.gates import check_gates
from qtool.report.results import compare, metric_row, split_rows

BEFORE = [2.0, 2.5, 3.0, 3.5]
AFTER = [2.1, 2.5, 3.2, 3.5]
Row = dict[str, Any]


def rows(before: list[float] = BEFORE, after: list[float] = AFTER, dataset: str = "t") -> list[Row]:
    """A loss of the original and of the compressed model, four windows each."""
    found = [mean_metric("loss", dataset, "nats/token", values) for values in (before, after)]
    original = metric_row(found[0], "original")
    return [original, compare(metric_row(found[1], "compressed"), [original])]


def verdict(gate: Gate, measured: list[Row] | None = None) -> Row:
    (row,) = check_gates([gate], rows() if measured is None else measured)
    return row


def test_a_difference_has_the_error_of_pairs() -> None:
    _, compressed = rows()
    pairs = [b - a for a, b in zip(BEFORE, AFTER, strict=True)]
    assert compressed["difference"] == pytest.approx(0.075)
    assert compressed["difference_stderr"] == pytest.approx(statistics.stdev(pairs) / 2)
    assert compressed["is_significant"] is False and compressed["higher_is_better"] is False
    assert rows(after=[x + 0.1 for x in BEFORE])[1]["is_significant"] is True


def test_a_metric_over_other_windows_is_not_compared() -> None:
    original = metric_row(mean_metric("loss", "t", "nats/token", BEFORE), "original")
    other = compare(metric_row(mean_metric("loss", "t", "nats/token", AFTER[:3]), "compressed"), [original])
    assert other["difference"] is None and other["is_significant"] is None


@pytest.mark.parametrize(
    ("limits", "allowed", "passed"),
    [
        ({"max": 2.825}, 2.825, True),
        ({"max": 2.8}, 2.8, False),
        ({"min": 2.9}, 2.9, False),
        ({"max_increase": "5%"}, 2.8875, True),
        ({"max_increase": "1%"}, 2.7775, False),
        ({"max_increase": 0.05}, 2.8, False),
        ({"max_drop": "5%"}, 2.6125, True),
        ({"max_drop": -0.1}, 2.85, False),
    ],
)
def test_a_limit_is_kept_or_not(limits: dict[str, float | str], allowed: float, passed: bool) -> None:
    row = verdict(Gate("loss", limits))
    assert row["allowed"] == pytest.approx(allowed) and row["passed"] is passed
    assert row["against"] == (None if {"max", "min"} & set(limits) else "original")


def test_significance_lets_chance_pass_and_nothing_else() -> None:
    assert verdict(Gate("loss", {"max_increase": 0.0}))["passed"] is False
    row = verdict(Gate("loss", {"max_increase": 0.0}, significance=2))
    assert row["passed"] is True and row["is_paired"] is True
    assert row["margin_stderr"] == pytest.approx(statistics.stdev([0.1, 0.0, 0.2, 0.0]) / 2)
    worse = rows(after=[x + 0.3 + e for x, e in zip(BEFORE, (0, 0.01, 0, 0.01), strict=True)])
    assert verdict(Gate("loss", {"max_increase": 0.0}, significance=2), worse)["passed"] is False


def test_a_percentage_scales_the_original_in_the_error_too() -> None:
    five_percent_more = rows(after=[1.05 * x for x in BEFORE])
    row = verdict(Gate("loss", {"max_increase": "5%"}, significance=2), five_percent_more)
    assert row["margin_stderr"] == pytest.approx(0, abs=1e-12)


def test_a_value_that_is_no_number_fails() -> None:
    assert verdict(Gate("loss", {"max": 5.0}), rows(after=[math.nan] * 4))["passed"] is False


def stored(folder: Path, measured: list[Row], paired: bool) -> str:
    """A run's results.json, and paired.json where it is to have one."""
    metrics, breakdown, parts = split_rows(measured)
    (folder / "results.json").write_text(json.dumps({"schema": 1, "metrics": metrics, "breakdown": breakdown}))
    if paired:
        (folder / "paired.json").write_text(json.dumps(parts))
    return str(folder / "results.json")


@pytest.mark.parametrize("paired", [True, False])
def test_a_stored_run_is_kept_up_with(tmp_path: Path, paired: bool) -> None:
    path = stored(tmp_path, rows(), paired)
    baseline = Baseline(results=path, max_increase=0.01)
    slightly = rows(after=[x + 0.02 + e for x, e in zip(AFTER, (0.01, -0.01, 0.01, -0.01), strict=True)])
    row = verdict(Gate("loss", {}, baseline, significance=1), slightly)
    assert (row["against"], row["is_paired"]) == (path, paired)
    assert row["allowed"] == pytest.approx(statistics.fmean(AFTER) + 0.01)
    # Windows as hard as these hide a hundredth; pairs do not hide it.
    assert row["passed"] is not paired


def test_a_gate_may_judge_one_dataset_and_one_part() -> None:
    measured = rows() + rows(after=[9.0] * 4, dataset="u")
    part = metric_row(Metric("loss", "t", 7.0, "nats/token", 0.1, part="domain: code"), "compressed")
    assert [row["passed"] for row in check_gates([Gate("loss", {"max": 5.0})], [*measured, part])] == [True, False]
    assert verdict(Gate("loss", {"max": 5.0}, dataset="t"), [*measured, part])["passed"] is True
    assert verdict(Gate("loss", {"max": 5.0}, part="domain: code"), [*measured, part])["value"] == 7.0


def test_a_pattern_judges_every_part_by_itself_against_its_own_original() -> None:
    measured = rows()
    for part, before, after in (("domain: a", 0.9, 0.8), ("domain: b", 0.5, 0.47), ("positions: 1-15", 0.9, 0.1)):
        was, now = (Metric("loss", "t", value, "fraction", None, part=part) for value in (before, after))
        original = metric_row(was, "original")
        measured += [original, compare(metric_row(now, "compressed"), [original])]
    found = check_gates([Gate("loss", {"max_drop": "10%"}, part="domain: *")], measured)
    assert [(row["part"], row["passed"]) for row in found] == [("domain: a", False), ("domain: b", True)]
    assert [row["allowed"] for row in found] == pytest.approx([0.81, 0.45])


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (Gate("lose", {"max": 1.0}), 'gates: lose: no evaluate step measured it; did you mean "loss"?'),
        (Gate("loss", {"max": 1.0}, dataset="tt"), 'it was not measured on "tt"; did you mean "t"?'),
        (Gate("loss", {"max": 1.0}, part="domain: code"), 'part "domain: code" was not measured; the metric has no parts'),
        (Gate("loss", {}, Baseline(results="none.json", max_increase=1.0)), "the file none.json does not exist"),
    ],
)
def test_a_gate_on_what_was_not_measured_says_what_was(gate: Gate, message: str) -> None:
    with pytest.raises(QtoolError) as raised:
        check_gates([gate], rows())
    assert message in str(raised.value)


def test_significance_without_an_error_is_refused() -> None:
    with pytest.raises(QtoolError, match="loss has no standard error"):
        check_gates([Gate("loss", {"max": 1.0}, significance=2)], rows([2.0], [2.1]))


def test_a_baseline_that_is_none_or_has_another_subject_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("[]")
    gate = Gate("loss", {}, Baseline(results=str(tmp_path / "results.json"), max_increase=1.0))
    with pytest.raises(QtoolError, match="is no results.json of schema 1"):
        check_gates([gate], rows())
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(QtoolError, match="is no valid JSON"):
        check_gates([gate], rows())
    stored(tmp_path, rows()[:1], paired=False)
    with pytest.raises(QtoolError, match="has none of compressed on t; it has original on t"):
        check_gates([gate], rows())


def test_gates_judge_changes_alone() -> None:
    with pytest.raises(QtoolError, match="nothing changed the model"):
        check_gates([Gate("loss", {"max": 5.0})], rows()[:1])


def test_a_relative_limit_on_what_the_original_has_not_is_refused() -> None:
    change = metric_row(Metric("perplexity_change", "t", 0.1, "fraction", 0.01), "compressed")
    with pytest.raises(QtoolError, match="max_increase: the original has none; use max or min"):
        check_gates([Gate("perplexity_change", {"max_increase": 0.1})], [change])
