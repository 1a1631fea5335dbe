"""What evaluation and export hand back: metrics with errors, samples of text, and artifacts with a digest of every file."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qtool.errors import QtoolError
from qtool.linalg.contributions import exponential_parts, mean_parts, standard_error

MANIFEST = "SHA256SUMS"  # in every export: a line for each other file, as sha256sum reads them


@dataclass(frozen=True)
class Metric:
    """One measured number; `stderr` is None where the metric has none. `unit` such as `nats/token`, `ppl`, `fraction`.

    part: what of the dataset it is of, such as `domain: python`; None for all of it.
    parts: what each window or document contributes, or each resample of them (linalg/contributions.py), which pairs it with
    another model's.
    n_units: how many windows or documents stderr is over; None where that is not known.
    """

    name: str
    dataset: str
    value: float
    unit: str
    stderr: float | None = None
    part: str | None = None
    higher_is_better: bool | None = None
    parts: tuple[float, ...] | None = field(default=None, repr=False)
    n_units: int | None = None


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt."""

    dataset: str
    prompt: str
    text: str


@dataclass(frozen=True)
class Record:
    """A file of results in a form that other tools read; `name` is its path below the folder of evaluations."""

    name: str
    text: str = field(repr=False)


Finding = Metric | Sample | Record  # what an evaluation returns a list of


def mean_metric(
    name: str,
    dataset: str,
    unit: str,
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    is_log: bool = False,
    part: str | None = None,
    higher_is_better: bool = False,
) -> Metric:
    """The weighted mean of one value for each window or document, or its exponential, with its standard error."""
    parts = mean_parts(values, weights)
    parts = exponential_parts(parts) if is_log else parts
    n, error = len(parts), standard_error(parts)
    return Metric(name, dataset, sum(parts) / n, unit, error, part, higher_is_better, parts, n)


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


def write_manifest(folder: Path, sha256: dict[str, str]) -> None:
    """Write the digests of a folder's files, by their names in it, beside them."""
    (folder / MANIFEST).write_text("".join(f"{digest}  {name}\n" for name, digest in sha256.items()), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, str]:
    """What `write_manifest` wrote; raises QtoolError where the file is not such a list."""
    sha256: dict[str, str] = {}
    for number, line in enumerate((folder / MANIFEST).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise QtoolError(f"{folder / MANIFEST}: line {number} is no digest and name; the export is damaged, write it again")
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise QtoolError(f"{folder / MANIFEST}: line {number} names {name}, outside the folder; write the export again")
        sha256[name] = digest
    return sha256


def changed_files(folder: Path, sha256: dict[str, str]) -> dict[str, str]:
    """Files of an artifact that are missing or changed, and which; files that others put beside them do not count."""
    found = {}
    for name, digest in sha256.items():
        if not (folder / name).is_file():
            found[name] = "missing"
        elif digest_file(folder / name) != digest:
            found[name] = "not as it was written"
    return found


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
