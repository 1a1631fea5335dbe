"""`qtool plan`: what a recipe will make of a model, and what that takes, without loading a weight."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.cli.console import make_console
from qtool.cli.options import AllowPickle, Device, Json, Overrides, RecipeArgument, model_overrides

if TYPE_CHECKING:
    from qtool.pipeline.plan import Plan, PlannedExport

NOT_TOLD = "lm-eval's tasks not counted"


def plan(
    recipe: RecipeArgument,
    overrides: Overrides,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    json_only: Json = False,
) -> None:
    """Tell each linear's scheme, sizes of the exports, who will serve them, time, memory and disk. Loads no weight."""
    from qtool.recipe import load

    loaded = load(recipe, model_overrides(overrides, device, allow_pickle))
    from qtool.pipeline.plan import make_plan  # here, because it imports torch

    made = make_plan(loaded)
    if json_only:
        print(json.dumps(in_numbers(made), indent=1))
    else:
        print_plan(made, make_console())


def in_numbers(made: "Plan") -> dict[str, object]:
    """The plan as plain values, with their units in the names."""
    exports = [
        {
            "key": export.key,
            "bytes": export.bytes,
            "runtimes": [
                {"runtime": str(one), "evidence": one.evidence, "source": one.source, "serves": why is None, "reason": why}
                for one, why in export.runtimes
            ],
        }
        for export in made.exports
    ]
    costs = [{**asdict(cost), "seconds": round(cost.seconds(made.rate), 1)} for cost in made.costs]
    totals = {"seconds": round(made.seconds, 1), "peak_memory_bytes": made.peak_bytes, "disk_bytes": made.disk_bytes}
    cache = {"cache": made.cache, "cache_bytes_per_token": made.cache_bytes, "attention": made.attention}
    sizes = {"parameters_before": made.parameters[0], "parameters_after": made.parameters[1]}
    return {**sizes, "modules": [asdict(row) for row in made.rows], **cache, "exports": exports, "steps": costs, **totals}


def print_plan(made: "Plan", console: Console) -> None:
    table = Table(box=None, pad_edge=False)
    for heading in ("linears", "how many", "out × in", "scheme", "by"):
        table.add_column(heading, justify="right" if heading in ("how many", "out × in") else "left")
    for row in made.rows:
        table.add_row(escape(row.name), str(row.count), f"{row.shape[0]} × {row.shape[1]}", row.scheme, row.step)
    console.print(table)
    if made.parameters[0] != made.parameters[1]:
        before, after = (f"{count / 1e6:,.1f}" for count in made.parameters)
        console.print(f"\n[bold]parameters[/bold]  {before} → {after} M")
    if made.cache is not None:
        console.print(f"\n[bold]key/value cache[/bold]  {made.cache}, {made.cache_bytes:,.0f} bytes a token")
    if made.attention is not None:
        console.print(f"\n[bold]attention[/bold]  {made.attention}")
    for export in made.exports:
        print_export(export, console)
    console.print()
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "about", "memory", "disk"):
        table.add_column(heading, justify="left" if heading == "step" else "right")
    for cost in made.costs:
        table.add_row(cost.key, duration(cost.seconds(made.rate)), size(cost.memory_bytes), size(cost.disk_bytes))
    total = [duration(made.seconds), size(made.peak_bytes), size(made.disk_bytes)]
    table.add_row("[bold]all[/bold]", *(f"[bold]{cell}[/bold]" for cell in total))
    console.print(table)
    untold = f"; {NOT_TOLD}" if any(cost.key == "evaluate/lm_eval" for cost in made.costs) else ""
    console.print(f"[dim]time within a factor of two, on this machine as it is now{untold}[/dim]")


def print_export(export: "PlannedExport", console: Console) -> None:
    console.print(f"\n[bold]{export.key}[/bold]  {size(export.bytes)}")
    for one, why in export.runtimes:
        ran = "run here" if one.evidence == "run" else "by its documents"
        said = f"[green]serves it[/green], {ran}" if why is None else f"[yellow]does not[/yellow]: {escape(why)}"
        console.print(f"  {one}  {said}", soft_wrap=True)


def size(n_bytes: float) -> str:
    """In MiB, in GiB from one on."""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def duration(seconds: float) -> str:
    """In the unit that leaves one or two digits before the point."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
