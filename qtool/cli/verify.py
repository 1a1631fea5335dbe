"""`qtool verify`: whether exports are as they were written."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.artifact import MANIFEST, changed_files, read_manifest
from qtool.errors import QtoolError


def verify(
    path: Annotated[Path, typer.Argument(help="An exported folder, or a run's folder for all its exports.")],
) -> None:
    """Compare every file of an export with what was written. `sha256sum -c SHA256SUMS` in the folder does the same."""
    folders = [path] if (path / MANIFEST).is_file() else sorted(file.parent for file in path.glob(f"exports/*/{MANIFEST}"))
    if not folders:
        raise QtoolError(f"{path} holds no {MANIFEST}, which qtool writes into every export; name an export or a run")
    mistakes = []
    for folder in folders:
        sha256 = read_manifest(folder)
        changed = changed_files(folder, sha256)
        mistakes += [f"{folder / name} is {what}" for name, what in changed.items()]
        if not changed:
            print(f"{folder}: {len(sha256)} files, all as they were written")
    if mistakes:
        raise QtoolError("\n".join([*mistakes, "copy the export once more, or write it again with qtool run or qtool export"]))
