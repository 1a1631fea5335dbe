"""`qtool inspect`: what makes a model hard to quantize, measured without changing it."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.cli.console import make_console
from qtool.cli.interrupt import interruptible
from qtool.cli.options import AllowPickle, Device, Json
from qtool.cli.progress import show_progress
from qtool.cli.summary import number

Row = dict[str, Any]  # an entry of inspect.json


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo, a folder, or a hub id; exports can be read too.")],
    text: Annotated[str, typer.Option(metavar="SOURCE", help="demo:calibration, a file, a data set.")] = "demo:calibration",
    samples: Annotated[int, typer.Option(min=1, help="Windows to take.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    out: Annotated[Path | None, typer.Option(help="Folder of the results; runs/inspect-MODEL where not given.")] = None,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    json_only: Json = False,
) -> None:
    """Find outliers of activations, weights and attention, kurtosis, QSUR and weight distributions, block by block.

    Writes inspect.json, with every number, and inspect.html, with curves over the blocks.
    """
    folder = out or Path("runs") / f"inspect-{Path(model).resolve().name}"
    with interruptible("nothing is kept of it"):
        with redirect_stdout(sys.stderr if json_only else sys.stdout), show_progress(silent=json_only) as progress:
            from qtool.calibration.tokens import TextOptions  # here, because they import torch
            from qtool.options import ModelOptions
            from qtool.pipeline.inspect import inspect_model

            windows = TextOptions(source=text, samples=samples, length=length)
            options = ModelOptions(path=model, device=device or "auto", allow_pickle=allow_pickle)
            results = inspect_model(options, windows, folder, progress)
    if json_only:
        print(json.dumps(results, indent=1))
    else:
        print_inspection(results, folder, make_console())


def print_inspection(results: Row, folder: Path, console: Console) -> None:
    print_blocks(results, console)
    print_kinds(results, console)
    console.print("\n[bold]worst[/bold]")
    table = Table(box=None, pad_edge=False, show_header=False)
    for row in results["worst"]:
        table.add_row(row["what"], number(row["value"]), escape(row["where"]))
    console.print(table)
    features = results["emergent_features"]
    if features:
        shown = ", ".join(map(str, features[:10])) + (", ..." if len(features) > 10 else "")
        console.print(f"{len(features)} emergent features (6 or more after norms, in many layers, for many tokens): {shown}")
    for note in results["notes"]:
        console.print(f"[yellow]note[/yellow]  {escape(note)}", soft_wrap=True)
    (stage,) = results["stages"]
    seconds, memory = stage["seconds"], stage["peak_rss_gib"]
    console.print(f"[bold]done[/bold] in {seconds:.0f} s, at most {memory:.2f} GiB; {escape(str(folder / 'inspect.html'))}")


def print_blocks(results: Row, console: Console) -> None:
    """One row a block: what comes out of it, and where its attention goes."""
    table = Table(box=None, pad_edge=False)
    table.add_column("after")
    for heading in ("largest", "median", "channel"):
        table.add_column(heading, justify="right")
    table.add_column("at token")
    for heading in ("massive", "outliers", "kurtosis", "of channels", "sinks", "their share", "first token's"):
        table.add_column(heading, justify="right")
    for row in [{"name": "embedding", "attention": None, **results["embedding"]}, *results["blocks"]]:
        top, attention = row["largest"][0], row["attention"]
        sinks = ["", "", ""]
        if attention is not None:
            sinks = [str(attention["sinks"]), f"{attention['sink_share']:.0%}", f"{attention['first_token_share']:.0%}"]
        magnitudes = [number(top["magnitude"]), number(row["median_magnitude"]), str(top["channel"])]
        counts = [str(row["massive"]), str(row["outliers"]), shown(row["kurtosis"]), shown(row["channel_kurtosis"])]
        table.add_row(row["name"], *magnitudes, escape(f"{top['token']!r} ({top['position']})"), *counts, *sinks)
    console.print(table)


def print_kinds(results: Row, console: Console) -> None:
    """One row a kind of linear: of each measure the median and the worst."""
    table = Table(box=None, pad_edge=False)
    table.add_column("\nlinears")
    table.add_column("\nhow many", justify="right")
    fields = {
        "input\nchannels": "input_channel_ratio",
        "\nkurtosis": "input_kurtosis",
        "\nQSUR": "input_qsur_share",
        "weights\nlines": "weight_reach",
        "weights\nkurtosis": "weight_kurtosis",
        "\nshape": "weight_shape",
        "weights\nQSUR": "weight_qsur_share",
    }
    for heading in fields:
        table.add_column(heading, justify="right")
    console.print()
    for row in results["kinds"]:
        cells = [f"{shown(row[field]['median'])} … {shown(row[field]['worst'])}" for field in fields.values()]
        count = str(row["count"]) if row["reached"] == row["count"] else f"{row['reached']} of {row['count']}"
        table.add_row(escape(row["kind"]), count, *cells)
    console.print(table)
    console.print(
        "[dim]median … worst; channels, lines: the largest one (of weights, row or column) over the median one; kurtosis: 3 is "
        "normal; shape: of the generalised Gaussian, 2 is normal, 1 Laplace; QSUR: 1 is the best that the width allows[/dim]"
    )


def shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
