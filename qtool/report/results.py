"""results.json: everything a script may want to know of a run, in a form that does not change within a schema version."""

import importlib.metadata
import platform
from dataclasses import asdict
from typing import Any

from qtool.artifact import Artifact, Metric
from qtool.errors import QtoolError

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


def metric_row(metric: Metric, subject: str) -> dict[str, Any]:
    """One entry of `metrics`; subject is `original`, `compressed` or `export:<format>`."""
    return {**asdict(metric), "subject": subject}


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


def check_gates(gates: Any, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every limit of every gate against every changed subject: {metric, subject, limit, allowed, value, passed}."""
    rows = []
    for gate in gates:
        named = [row for row in metrics if row["name"] == gate.metric]
        if not named:
            known = ", ".join(sorted({row["name"] for row in metrics})) or "none"
            raise QtoolError(f'gates: no evaluate step measured "{gate.metric}"; measured: {known}')
        originals = {row["dataset"]: row["value"] for row in named if row["subject"] == "original"}
        for row in named:
            if row["subject"] == "original":
                continue
            for limit, stated in gate.limits.items():
                before = originals.get(row["dataset"])
                allowed = _allowed(limit, stated, before)
                passed = row["value"] >= allowed if limit in ("min", "max_drop") else row["value"] <= allowed
                rows.append(
                    {
                        "metric": gate.metric,
                        "subject": row["subject"],
                        "limit": f"{limit}: {stated}",
                        "allowed": allowed,
                        "value": row["value"],
                        "passed": passed,
                    }
                )
    return rows


def _allowed(limit: str, stated: float | str, before: float | None) -> float:
    """The smallest or largest value that a limit lets pass."""
    if limit in ("max", "min"):
        return float(stated)
    assert before is not None, "relative limits compare with the original, which every evaluate step measures"
    amount = before * float(stated[:-1]) / 100 if isinstance(stated, str) else float(stated)
    return before + amount if limit == "max_increase" else before - amount
