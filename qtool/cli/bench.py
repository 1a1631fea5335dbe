"""`qtool bench`: how fast compressed models and the products inside them are, on the machine at hand."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.cli.console import make_console
from qtool.cli.options import AllowPickle, Device, Json
from qtool.cli.progress import show_progress
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.formats.scheme import Scheme

Row = dict[str, Any]
Batches = Annotated[str, typer.Option("--batch", metavar="N,N,...", help="Rows side by side, separated by commas.")]


def generate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="An export, or a run's folder.")],
    batch: Batches = "1,4,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    new: Annotated[int, typer.Option(min=2, help="Tokens written after it.")] = 32,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that each text is written.")] = 5,
    reference: Annotated[bool, typer.Option("--reference", help="Measure linears that decode at each call, too.")] = False,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    json_only: Json = False,
) -> None:
    """Measure tokens a second, the first token's time and memory of a compressed model, beside the same model in 16 bits."""
    batches = read_numbers("--batch", batch)
    with redirect_stdout(sys.stderr if json_only else sys.stdout), show_progress(silent=json_only) as progress:
        from qtool.bench.generate import Workload, bench_generate  # here, because they import torch
        from qtool.options import ModelOptions

        options = ModelOptions(path=target, device=device or "auto", allow_pickle=allow_pickle)
        results = bench_generate(options, Workload(batches, prompt, new, repetitions), progress, reference)
    if json_only:
        print(json.dumps(results, indent=1))
    else:
        print_generation(results, make_console())


def kernels(
    shape: Annotated[str | None, typer.Option(metavar="OUTxIN,...", help="Shapes, such as 4096x4096.")] = None,
    format: Annotated[str | None, typer.Option(metavar="SCHEME,...", help="Schemes, such as w4a16g128,nf4g64,w8a8.")] = None,
    batch: Annotated[str | None, typer.Option(metavar="N,N,...", help="Tokens at a time.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="Of samples for each row.")] = 0.3,
    svg: Annotated[Path | None, typer.Option(help="File to draw the times into, with matplotlib.")] = None,
    device: Device = None,
    json_only: Json = False,
) -> None:
    """Check products of codes against float64, then time them beside 16 bits and every peer that loads."""
    with redirect_stdout(sys.stderr if json_only else sys.stdout), show_progress(silent=json_only) as progress:
        from qtool.bench.kernels import Sweep, bench_kernels, default_sweep  # here, because they import torch
        from qtool.bench.plot import plot
        from qtool.model.handle import device_named

        chosen = device_named(device or "auto")
        formats, shapes, tokens = default_sweep(chosen)
        sweep = Sweep(
            read_formats(format.split(",") if format else list(formats)),
            read_shapes(shape) if shape else shapes,
            read_numbers("--batch", batch) if batch else tokens,
            seconds,
        )
        results = bench_kernels(sweep, chosen, progress)
        if svg is not None:
            plot(results, svg)
    if json_only:
        print(json.dumps(results, indent=1))
    else:
        print_kernels(results, make_console())


VERBS: dict[str, Callable[..., None]] = {"generate": generate, "kernels": kernels}


def read_numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers above zero, separated by commas; raises QtoolError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[1-9]\d*", part) for part in parts):
        raise QtoolError(f'{option} is "{text}", must be whole numbers above zero, separated by commas, such as 1,4,16')
    return tuple(map(int, parts))


def read_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """OUTxIN, separated by commas; raises QtoolError."""
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part.strip()) for part in text.split(",")]
    if None in found:
        raise QtoolError(f'--shape is "{text}", must be OUTxIN, separated by commas, such as 4096x4096,14336x4096')
    return tuple((int(match[1]), int(match[2])) for match in found if match is not None)


def read_formats(words: list[str]) -> "tuple[Scheme, ...]":
    """Schemes by their words; raises QtoolError."""
    from qtool.formats.scheme import Scheme

    found = []
    for word in words:
        try:
            found.append(Scheme.model_validate(word.strip()))
        except ValueError as error:
            raise QtoolError(f'--format: "{word}" is no scheme: {" ".join(str(error).split())[:200]}') from error
    return tuple(found)


def print_generation(results: Row, console: Console) -> None:
    """A table of batches by subjects, then memory, then what computed the linears."""
    from qtool.bench.decoding import CALLS, GRAPH
    from qtool.bench.generate import speedups

    table = Table(box=None, pad_edge=False)
    for heading in ("subject", "batch", "first token, ms", "decode, tokens/s", "by", "weights, MiB", "peak, GiB"):
        table.add_column(heading, justify="left" if heading in ("subject", "by") else "right")
    for row in results["rows"]:
        gpu = row["peak_gpu_gib"] if results["device"].startswith("cuda") else None
        table.add_row(
            row["subject"],
            str(row["batch"]),
            with_spread(row["first_token_seconds"], 1e3),
            with_spread(row["decode_tokens_per_second"], 1),
            row["decoding"]["form"],
            f"{row['weights_bytes'] / 2**20:,.1f}",
            f"{row['peak_rss_gib'] if gpu is None else gpu:.2f}",
        )
    console.print(table)
    for subject in dict.fromkeys(row["subject"] for row in results["rows"]):
        for batch, prefill, decode in speedups(results["rows"], subject) if subject != "16 bits" else ():
            print(f"{subject}, batch {batch}: {prefill:.2f}× the prefill of 16 bits, {decode:.2f}× its decoding")
    meanings = {GRAPH: "one CUDA graph for each token, replayed", CALLS: "a call of the model from Python for each token"}
    for form in dict.fromkeys(row["decoding"]["form"] for row in results["rows"]):
        print(f"decode by {form}: {meanings[form]}")
    for subject, batch, why in [(r["subject"], r["batch"], r["decoding"]["why"]) for r in results["rows"]]:
        if why is not None:
            print(f"{subject}, batch {batch}: no graph of a step: {why}")
    for line in results["linears"]:
        print(f"fast: {line}")
    work = results["workload"]
    console.print(
        f"[dim]{escape(results['device'])}, {results['dtype']}, {results['threads']} threads; prompts of {work['prompt']} "
        f"tokens, {work['new']} written; median and quartiles of {work['repetitions']}[/dim]"
    )


def print_kernels(results: Row, console: Console) -> None:
    """A table of every row, then where qtool stands, then who did not take part."""
    table = Table(box=None, pad_edge=False)
    headings = ("format", "out × in", "tokens", "product", "error", "worst token", "worst output", "µs")
    for heading in (*headings, "GB/s", "of copying", "of the floor"):
        table.add_column(heading, justify="left" if heading in ("format", "product") else "right")
    for row in (row for row in results["rows"] if "absent" not in row):
        where = (row["format"], "×".join(map(str, row["shape"])), str(row["tokens"]), row["subject"])
        if "failed" in row:
            table.add_row(*where, escape(row["failed"]))
            continue
        errors = [f"{row['errors'][name]:.1e}" for name in ("all", "worst_token", "worst_output")]
        if "wrong" in row:
            table.add_row(*where, *errors, "[red]WRONG, not timed[/red]")
            continue
        rate = row["bytes"] / row["seconds"]["median"] / 1e9
        shares = (f"{row['share_of_copy_rate']:.0%}", f"{row['share_of_floor']:.0%}")
        table.add_row(*where, *errors, with_spread(row["seconds"], 1e6), f"{rate:.1f}", *shares)
    console.print(table)
    from qtool.bench.kernels import verdicts

    for line in verdicts(results["rows"]):
        print(line)
    for name, format, why in dict.fromkeys((r["subject"], r["format"], r["absent"]) for r in results["rows"] if "absent" in r):
        console.print(f"[dim]not timed: {escape(name)}, {format}: {escape(why)}[/dim]", soft_wrap=True)
    copied, computed = results["copied_bytes_per_second"], results["computed_operations_per_second"]
    console.print(
        f"[dim]{escape(results['device'])}, {results['threads']} threads; copying {copied / 1e9:,.1f} GB/s, "
        f"bf16 products {computed / 1e12:,.2f} TFLOP/s[/dim]"
    )


def with_spread(timed: Row, unit: float) -> str:
    """Median and quartiles in a unit: 12.3 (11.9 … 13.1)."""
    return f"{timed['median'] * unit:,.1f} ({timed['low'] * unit:,.1f} … {timed['high'] * unit:,.1f})"
