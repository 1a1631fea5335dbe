"""The console that tables are drawn on."""

from rich.console import Console

PLAIN_WIDTH = 160  # columns where stdout is no terminal: wide enough that a table does not break its lines


def make_console() -> Console:
    """A console on stdout as it is now."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)
