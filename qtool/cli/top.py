"""`qtool top`: where a run is, live in a terminal."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qtool.cli.console import make_console
from qtool.cli.interrupt import interruptible
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.report.events import RunState

SECONDS_BETWEEN_LOOKS = 0.5
NOTES = 5  # the latest ones are shown
MARKS = {"waiting": "[dim]·[/dim]", "running": "[yellow]▶[/yellow]", "done": "[green]✓[/green]"}
MARKS["done before"] = MARKS["done"]
COLORS = {"running": "yellow", "done": "green"}


def top(run: Annotated[Path, typer.Argument(help="Folder of a run, live or finished.")]) -> None:
    """Follow a run: its steps, time, memory, notes. Where stdout is no terminal, print how things stand and end.

    A run whose process is gone, killed or interrupted, is shown as stopped.
    """
    from qtool.pipeline.folder import EVENTS, is_at_work  # here, because they import torch
    from qtool.report.events import RunState, read_events

    if not (run / EVENTS).is_file():
        raise QtoolError(f"{run} is no run: it has no {EVENTS}; name the --out folder of a qtool run")
    state, read = RunState(), 0

    def look() -> RenderableType:
        nonlocal state, read
        is_alive = is_at_work(run)  # before the file is read, so that what a dying process wrote last is seen
        text = (run / EVENTS).read_text(encoding="utf-8")
        if len(text) < read:  # started anew with --fresh
            state, read = RunState(), 0
        state.follow(read_events(text[read:]))
        read = text.rfind("\n") + 1
        if state.status == "running" and not is_alive:
            state.status, state.why = "stopped", "its process is gone"
        return draw(state, run)

    console = make_console()
    if not sys.stdout.isatty():
        console.print(look())
        return
    with interruptible("the run itself goes on"), Live(look(), console=console, auto_refresh=False) as live:
        while state.status == "running":
            time.sleep(SECONDS_BETWEEN_LOOKS)
            live.update(look(), refresh=True)


def draw(state: "RunState", run: Path) -> Group:
    """A line for each stage, and the latest notes."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "step", "", "seconds", "peak GiB", ""):
        table.add_column(heading, justify="right" if heading in ("seconds", "peak GiB") else "left", no_wrap=True)
    for stage in state.stages:
        is_running = stage.state == "running"
        seconds = state.last - stage.begun if is_running else stage.seconds
        bar: RenderableType = ""
        detail = "from before" if stage.state == "done before" else stage.detail
        if is_running and stage.total:
            bar = ProgressBar(total=stage.total, completed=stage.done, width=24)
            left = f", about {seconds / stage.done * (stage.total - stage.done):.0f} s left" if seconds and stage.done else ""
            detail = f"{stage.done}/{stage.total}{left}  {detail}"
        times = ("" if value is None else f"{value:.{digits}f}" for value, digits in ((seconds, 1), (stage.peak_gib, 2)))
        table.add_row(MARKS[stage.state], escape(stage.name), bar, *times, f"[dim]{escape(detail)}[/dim]")
    color = COLORS.get(state.status, "red")
    head = f"[bold]{escape(str(run))}[/bold]  [{color}]{state.status}[/{color}]"
    head += f"  {state.last - state.begun:.0f} s" + (f"  {escape(state.why)}" if state.why else "")
    if state.status == "stopped":
        head += "\n[dim]the same qtool run command goes on from here[/dim]"
    notes = [Text(f"note: {text}", style="yellow") for text in state.notes[-NOTES:]]
    return Group(Text.from_markup(head), table, *notes)
