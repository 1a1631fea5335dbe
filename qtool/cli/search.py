"""`qtool search`: a budgeted search over a recipe's options, for what no other variant beats."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from qtool.cli.console import make_console
from qtool.cli.interrupt import interruptible
from qtool.cli.progress import show_progress
from qtool.cli.summary import number


def search(
    file: Annotated[
        Path, typer.Argument(metavar="SEARCH", help="YAML with extends: RECIPE, space, objectives, trials, first.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder of the trials; runs/NAME-OF-SEARCH where not given.")] = None,
) -> None:
    """Search a recipe's options for the runs that no other beats in quality, size and time (Optuna).

    The file: extends, a recipe; space, {path as in --set: {choice: [...]} or {low, high, log}}; objectives, metrics and costs
    (bits_per_weight, mib, seconds); trials; first, overrides of a cheap first look after which a beaten trial ends. Whole runs
    are made and measured, and any option may change; the step search/mixed_precision is another thing: within one run it gives
    each linear a scheme. The same command goes on where it was stopped.
    """
    with interruptible("the same command goes on from here"):
        from qtool.pipeline.option_search import read_search, run_option_search, write_best  # here, because they import torch

        options = read_search(file)
        folder = out or Path("runs") / file.stem
        with show_progress() as progress:
            rows = run_option_search(options, file.parent / options.extends, folder, progress)
        best = write_best(rows, folder)
    table = Table(box=None, pad_edge=False)
    for heading in ("", "trial", *options.space, *options.objectives):
        table.add_column(heading, justify="right" if heading in options.objectives else "left")
    for row in sorted((row for row in rows if row["values"] is not None), key=lambda row: row["values"]):
        chosen = [str(row["options"][name]) for name in options.space]
        table.add_row("●" if row["front"] else "", row["name"], *chosen, *map(number, row["values"]))
    make_console().print(table)
    ended = sum(row["values"] is None for row in rows)
    print(f"● no other trial beats it; {len(rows)} trials, {ended} ended after their first look; best compromise: {best}")
