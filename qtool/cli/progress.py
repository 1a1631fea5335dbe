"""How progress looks: bars with an ETA on a terminal, plain lines elsewhere, nothing under --json."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from qtool.progress import Progress, Silent

SECONDS_BETWEEN_LINES = 2.0  # a step shorter than that gets no line of its own where stdout is no terminal


class TerminalProgress:
    """One bar per stage, kept when the stage is done."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def stage(self, name: str, total: int) -> None:
        self.finish()
        self._task = self._bars.add_task(name, total=total, detail="")

    def advance(self, detail: str = "") -> None:
        assert self._task is not None, "advance() before the first stage()"
        self._bars.update(self._task, advance=1, detail=escape(detail))

    def note(self, text: str) -> None:
        self._bars.console.print(f"note: {text}", markup=False, highlight=False)

    def finish(self) -> None:
        """The running stage is done: full bar, no detail."""
        if self._task is not None:
            total = self._bars.tasks[self._task].total
            self._bars.update(self._task, completed=total, detail="")


class PlainProgress:
    """A line when a stage begins, now and then while it runs, and when it ends."""

    def __init__(self) -> None:
        self._name, self._total, self._done = "", 0, 0
        self._begun = self._printed = 0.0

    def stage(self, name: str, total: int) -> None:
        self._name, self._total, self._done = name, total, 0
        self._begun = self._printed = time.monotonic()
        self._print(f"{name}: {total} step{'' if total == 1 else 's'}")

    def advance(self, detail: str = "") -> None:
        self._done += 1
        now = time.monotonic()
        if self._done >= self._total or now - self._printed >= SECONDS_BETWEEN_LINES:
            self._printed = now
            seconds = now - self._begun
            left = seconds / self._done * (self._total - self._done)
            ending = f"about {left:.0f} s left" if left else f"done in {seconds:.1f} s"
            self._print(f"{self._name}: {self._done}/{self._total} {detail}".rstrip() + f", {ending}")

    def note(self, text: str) -> None:
        self._print(f"note: {text}")

    @staticmethod
    def _print(line: str) -> None:
        print(line, flush=True)


@contextmanager
def show_progress(silent: bool = False) -> Iterator[Progress]:
    """The progress that fits where stdout goes."""
    if silent:
        yield Silent()
    elif sys.stdout.isatty():
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[detail]}"),
        )
        with Bars(*columns, console=Console()) as bars:
            progress = TerminalProgress(bars)
            yield progress
            progress.finish()
    else:
        yield PlainProgress()
