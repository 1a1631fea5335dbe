"""`qtool compare`: runs of one model beside each other, and which of them nothing beats."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from qtool.cli.console import make_console
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.report.page import Row


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, or results.json files.")],
    metric: Annotated[
        str | None, typer.Option(help="What quality is: NAME or NAME@DATASET; else KL divergence, else perplexity.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots of quality against size and time.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it as JSON.")] = None,
) -> None:
    """Compare runs: bits, size, time, quality, paired differences from the first, and the Pareto front (●).

    Refuses runs that measured different texts or different originals.
    """
    from qtool.model.store import write_text  # here, because they import torch
    from qtool.report.comparison import choose_metric, compare_runs, read_runs, write_comparison

    if len(runs) < 2:
        raise QtoolError("name two runs or more")
    read = read_runs(runs)
    compared = compare_runs(read, choose_metric(read, metric))
    if html is not None:
        write_comparison(html, compared)
    if json_file is not None:
        write_text(json_file, json.dumps(compared, indent=1, allow_nan=False) + "\n")
    print_comparison(compared)


def print_comparison(compared: "Row") -> None:
    """The table; a dot marks a cost whose Pareto front the run is on."""
    from qtool.report.comparison import difference_in_words, value_in_words

    console, rows = make_console(), compared["runs"]
    table = Table(box=None, pad_edge=False)
    for heading in ("run", *compared["costs"].values(), "peak GiB"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    table.add_column(f"{escape(compared['metric'])} [dim]{escape(compared['unit'])}, {escape(compared['dataset'])}[/dim]")
    table.add_column(f"Δ from {escape(rows[0]['name'])}")
    for row in rows:
        costs = [f"{row[cost]:,.4g} {'●' if cost in row['front'] else ' '}" for cost in compared["costs"]]
        failed = " [red]gate failed[/red]" if row["status"] == "gate-failed" else ""
        peak = f"{row['peak_rss_gib']:.2f}" if row["peak_rss_gib"] is not None else ""
        table.add_row(escape(row["name"]) + failed, *costs, peak, value_in_words(row), difference_in_words(row))
    console.print(table)
    console.print("[dim]● no other run has less of this and is as good[/dim]")
