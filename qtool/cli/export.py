"""`qtool export`: write one more format of a finished run."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.progress import show_progress
from qtool.errors import QtoolError, nearest
from qtool.registry import list_methods


def export(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    format: Annotated[str, typer.Option(help="Name of an export method, as qtool methods lists it.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; RUN/exports/FORMAT where not given.")] = None,
    submodel: Annotated[
        str | None, typer.Option(help="One of the sub-models that distill/sortednet trained, as that step left it.")
    ] = None,
) -> None:
    """Export a finished run once more, in another format or to another place, or a sub-model of it."""
    formats = [key.removeprefix("export/") for key in list_methods() if key.startswith("export/")]
    if format not in formats:
        raise QtoolError(f'--format: there is no "{format}"{nearest(format, formats)}')
    with show_progress() as progress:
        from qtool.pipeline.run import export_run  # here, because it imports torch

        artifact = export_run(run, f"export/{format}", out, progress, submodel)
    kept = "exactly the run's weights" if artifact.lossless else "close to the run's weights, not equal"
    print(f"{artifact.path}: {artifact.bytes / 2**20:,.1f} MiB, {kept}")
