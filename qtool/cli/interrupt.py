"""Ctrl-C as an orderly end: exit code 130 and a word on how to go on.

Why a handler of its own: C code that is interrupted in a callback may turn KeyboardInterrupt into an error of another kind
(torch's reading of a storage does), which would look like a fault.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import typer


@contextmanager
def interruptible(advice: str) -> Iterator[None]:
    """What is inside ends with exit code 130 on Ctrl-C, whatever error the interrupt has become on its way."""
    before = signal.getsignal(signal.SIGINT)
    pressed = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        raise KeyboardInterrupt

    if before is not signal.SIG_IGN:  # a shell lets its background jobs ignore Ctrl-C; so be it
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    except (KeyboardInterrupt, Exception) as error:
        if not pressed and not isinstance(error, KeyboardInterrupt):
            raise
        print(f"interrupted; {advice}", file=sys.stderr)
        raise typer.Exit(130) from error
    finally:
        signal.signal(signal.SIGINT, before)
