"""results.json: everything a script may want to know of a run, in a form that does not change within a schema version.

    metrics     a row for each metric, dataset and subject (`original`, `compressed`, `export:<format>`):
                name, dataset, subject, value, unit, stderr, higher_is_better (null: neither is better)
                n_units: the windows or documents that stderr is over, null where that is not known
                difference, difference_stderr, is_significant: from the original over the same windows or documents, in the
                metric's unit; null for the original itself, for what compares already, and where nothing pairs them
                part: always null here
    breakdown   rows of the same form, of a part of the dataset each: part is `domain: python`, `positions: 0-15`, ...
    samples     {dataset, prompt, texts: {subject: what it wrote}} for each prompt of evaluate/generation
    gates       see report/gates.py
Beside it stand paired.json, what each window or document, or each resample of them, contributes to each row of `metrics`
(linalg/contributions.py): {name, dataset, subject, parts: [...]}, so that other runs over the same text pair with this one;
evaluations/, results in other tools' own formats; and distributions.json, what the report plots of weights and inputs, where a
step changed the model, {schema, linears: [...]}, an entry for each kind of linear in each block:
    block, kind   `mlp.experts.#.down_proj`: all experts of the block together
    weights       {original, transformed: {counts, rms, largest, kurtosis}}; transformed: right before rounding
    inputs        {original, transformed: {counts, channels, channel_ratio, kurtosis}} where the recipe reads calibration text;
                  channels: up to 64 of the channels' largest magnitudes, from the least to the greatest
    grid          {scheme, range, levels, counts, used} where it is quantized; range: the ends of its 64 bins; used: how
                  many weights took each of `levels`, in the order of the codes, both empty of more than 32 levels
    input_grid    {scheme, range, levels, counts} where inputs are rounded and the recipe reads calibration text: inputs
                  before rounding, in units of the scales of their tokens or groups, or of static ones
counts are those of linalg/histogram.py: of magnitudes in 64 half octaves from 2^-20 on, over grids in 64 equal bins.
"""

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import asdict
from operator import itemgetter
from typing import Any

from qtool.artifact import Artifact, Metric
from qtool.linalg.contributions import difference_error, is_significant

SCHEMA = 1
PACKAGES = (
    "qtool",
    "torch",
    "transformers",
    "safetensors",
    "datasets",
    "lm-eval",
    "compressed-tensors",
    "cupy-cuda13x",
)


# Options of evaluate steps that leave a metric what it is: what else is measured, and how it is computed and written. How many
# documents a limit left stands in n_units.
BESIDE = {"tasks", "include_path", "limit", "batch_size", "log_samples", "top_k"}


def option_differences(own: dict[str, Any], other: dict[str, Any]) -> str:
    """What makes the figures of one evaluate step, by its options in two runs, say nothing about each other.

    Empty where nothing does. Options that only one of them has do not count: they are of another version of the method.
    """
    both = (own.keys() & other.keys()) - BESIDE
    return "; ".join(f"{name} is {other[name]}, here {own[name]}" for name in sorted(both) if own[name] != other[name])


def metric_row(metric: Metric, subject: str) -> dict[str, Any]:
    """One entry of `metrics` or `breakdown`, before it is compared, and with its parts."""
    row = {**asdict(metric), "subject": subject}
    row["parts"] = None if metric.parts is None else list(metric.parts)
    return row | {"difference": None, "difference_stderr": None, "is_significant": None}


def compare(row: dict[str, Any], originals: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row with its difference from the original's of the same metric; as it is where nothing pairs them."""
    key = itemgetter("name", "dataset", "part")
    before = next((one for one in originals if key(one) == key(row)), None)
    if before is None or row["subject"] == "original" or not are_paired(row, before):
        return row
    difference, error = row["value"] - before["value"], difference_error(row["parts"], before["parts"])
    is_more = is_significant(difference, error, row["n_units"])
    found = {"difference": difference, "difference_stderr": error, "is_significant": is_more}
    return row | found


def are_paired(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows with parts are over the same units; a tokenizer of its own cuts a text elsewhere."""
    if row["parts"] is None or other["parts"] is None:
        return False
    return len(row["parts"]) == len(other["parts"]) and row.get("n_units") == other.get("n_units")


def split_rows(rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with parts as `metrics` and `breakdown` of results.json, and as the entries of paired.json."""
    shown = [{name: value for name, value in row.items() if name != "parts"} for row in rows]
    whole, pieces = ([row for row in shown if (row["part"] is None) is wanted] for wanted in (True, False))
    names = ("name", "dataset", "subject")
    paired = [
        {name: row[name] for name in names} | {"parts": [float(f"{part:.8g}") for part in row["parts"]]}
        for row in rows
        if row["parts"] is not None and row["part"] is None
    ]
    return whole, pieces, paired


def sample_rows(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """`samples` of results.json, from {dataset, prompt, text, subject}."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for one in samples:
        found.setdefault((one["dataset"], one["prompt"]), {})[one["subject"]] = one["text"]
    return [{"dataset": dataset, "prompt": prompt, "texts": texts} for (dataset, prompt), texts in found.items()]


def export_row(artifact: Artifact, root: str) -> dict[str, Any]:
    """One entry of `exports`."""
    return {
        "format": artifact.format,
        "path": root,
        "bytes": artifact.bytes,
        "lossless": artifact.lossless,
        "sha256": artifact.sha256,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def parameters_in_words(model: dict[str, Any]) -> str:
    """How many parameters there are, before and after where a step has changed their number; `model` of results.json."""
    before = model["parameters"]
    after = model.get("parameters_compressed", before)
    return ("" if after == before else f"{before / 1e6:,.1f} → ") + f"{after / 1e6:,.1f} M parameters"
