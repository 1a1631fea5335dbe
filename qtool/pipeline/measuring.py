"""Measuring: one evaluate step on one subject, its figures set beside the original's, and where results are written.

A measurement is plain data, as a step records it: {"metrics": rows with parts, "samples": [...], "records": {file: text}}.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from qtool.artifact import Finding, Metric, Record, Sample
from qtool.calibration.preservation import PRESERVATION
from qtool.calibration.windows import WindowOptions
from qtool.model.handle import ModelHandle
from qtool.model.store import write_text
from qtool.options import Options
from qtool.recipe import Step
from qtool.report.results import compare, metric_row, sample_rows, split_rows

Measurement = dict[str, Any]


def with_preservation(step: Step, folder: Path) -> Step:
    """The step; where it names a preservation set without a run, that of the run in `folder`."""
    if not names_own_preservation(step.options):
        return step
    return replace(step, options=step.options.model_copy(update={"folder": str(folder)}))


def names_own_preservation(options: Options) -> bool:
    """Whether options ask for the windows that their own run chooses."""
    return isinstance(options, WindowOptions) and (options.source, options.folder) == (PRESERVATION, None)


def measure(
    step: Step, subject: str, model: ModelHandle, original: ModelHandle, seed: int, before: Measurement | None
) -> Measurement:
    """What the step finds of the model; before: what it found of the original, None where this is the original."""
    found: list[Finding] = step.method.run(model, original, step.options, seed)
    rows = [metric_row(one, subject) for one in found if isinstance(one, Metric)]
    originals = [] if before is None else before["metrics"]
    return {
        "metrics": [compare(row, originals) for row in rows],
        "samples": [asdict(one) | {"subject": subject} for one in found if isinstance(one, Sample)],
        "records": {f"{subject.replace(':', '-')}-{one.name}": one.text for one in found if isinstance(one, Record)},
    }


def joined(measurements: Sequence[Measurement]) -> Measurement:
    """Several measurements as one."""
    return {
        "metrics": [row for one in measurements for row in one["metrics"]],
        "samples": [sample for one in measurements for sample in one["samples"]],
        "records": {name: text for one in measurements for name, text in one["records"].items()},
    }


def of_subject(measurement: Measurement, subject: str) -> Measurement:
    """The figures of one subject."""
    return measurement | {"metrics": [row for row in measurement["metrics"] if row["subject"] == subject]}


def as_results(measured: Mapping[str, Measurement]) -> dict[str, Any]:
    """`metrics`, `breakdown` and `samples` of results.json, of measurements by the steps' labels."""
    found = joined(list(measured.values()))
    metrics, breakdown, _ = split_rows(found["metrics"])
    return {"metrics": metrics, "breakdown": breakdown, "samples": sample_rows(found["samples"])}


def write_beside(folder: Path, measured: Mapping[str, Measurement]) -> None:
    """Write what stands beside results.json: paired.json, and evaluations/LABEL/ for steps that have records."""
    _, _, paired = split_rows(joined(list(measured.values()))["metrics"])
    write_text(folder / "paired.json", "[" + ",\n".join(json.dumps(entry) for entry in paired) + "]\n")
    for label, measurement in measured.items():
        for name, text in measurement["records"].items():
            write_text(folder / "evaluations" / label / name, text)
