"""What evaluation and export hand back: metrics with units and errors, and artifacts with a digest of every file."""

import hashlib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Metric:
    """One measured number; `stderr` is None where the metric has none. `unit` such as `nats/token`, `ppl`, `fraction`."""

    name: str
    dataset: str
    value: float
    unit: str
    stderr: float | None = None


@dataclass(frozen=True)
class Artifact:
    """An exported folder; `lossless` where it decodes to exactly the weights of the model in memory."""

    format: str
    path: Path
    bytes: int
    lossless: bool
    sha256: dict[str, str]


def describe_folder(format: str, path: Path, lossless: bool) -> Artifact:
    """The artifact of a finished folder."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    digests = {str(file.relative_to(path)): digest_file(file) for file in files}
    return Artifact(format, path, sum(file.stat().st_size for file in files), lossless, digests)


def is_intact(folder: Path, sha256: dict[str, str]) -> bool:
    """Whether every file of an artifact stands with its bytes; files that others put beside them do not count."""
    return all((folder / name).is_file() and digest_file(folder / name) == digest for name, digest in sha256.items())


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
