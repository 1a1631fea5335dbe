"""`qtool sweep`: one recipe with many overrides, side by side, and a table of what they gave."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qtool.cli.compare import print_comparison
from qtool.cli.interrupt import interruptible
from qtool.cli.progress import show_progress
from qtool.errors import QtoolError


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML with extends: RECIPE, and grid, trials or both.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the trials; runs/NAME-OF-SWEEP where not given.")] = None,
    metric: Annotated[str | None, typer.Option(help="What quality is in the table: NAME or NAME@DATASET.")] = None,
) -> None:
    """Carry out every trial of a sweep file as a run of its own, in parallel on Ray, and compare them.

    The file: extends, a recipe; grid, {path as in --set: [values]}; trials, {name: {path: value}}; resources, {cpus, gpus,
    parallel, retries, address}. All mistakes of all trials come before any work. The same command goes on where it was
    stopped; finished trials stay.
    """
    with interruptible("the same command goes on from here"):
        from qtool.pipeline.sweep import read_sweep, run_sweep  # here, because it imports torch

        options, trials = read_sweep(file)
        folder = out or Path("runs") / file.stem
        with show_progress() as progress:
            rows = run_sweep(options, trials, folder, progress)
    show_trials(rows, folder, metric)


def show_trials(rows: list[dict[str, Any]], folder: Path, metric: str | None) -> None:
    """Compare the trials that came to their end, in compare.html and compare.json too; raises QtoolError for the rest."""
    from qtool.model.store import write_text
    from qtool.report.comparison import choose_metric, compare_runs, read_runs, write_comparison

    done = [folder / row["path"] for row in rows if row["error"] is None]
    if len(done) > 1:
        try:
            runs = read_runs(done)
            compared = compare_runs(runs, choose_metric(runs, metric))
        except QtoolError as error:
            print(f"trials are not compared: {error}")
        else:
            write_comparison(folder / "compare.html", compared)
            write_text(folder / "compare.json", json.dumps(compared, indent=1, allow_nan=False) + "\n")
            print_comparison(compared)
    failed = [f"{row['name']}: {row['error']}" for row in rows if row["error"] is not None]
    if failed:
        raise QtoolError("\n".join([*failed, f"{len(failed)} of {len(rows)} trials failed; the same command tries them again"]))
    print(f"{len(rows)} trials; {folder}")
