"""A run that is interrupted at a chosen point."""

from collections.abc import Callable

import pytest

from qtool.progress import Progress, Silent


class Interrupted(Silent):
    """Interrupts the run the n-th time that something is done, as Ctrl-C would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, detail: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted() -> Callable[[int], Progress]:
    return Interrupted
