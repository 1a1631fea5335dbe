"""What a user can put right: shown as one message without a traceback, exit code 2."""

import difflib
from collections.abc import Iterable


class QtoolError(Exception):
    """A mistake in a recipe, a path, an option or a file: says where, what, and how to put it right."""


class RecipeError(QtoolError):
    """Every problem of one recipe file, each a line with file:line."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def nearest(word: str, valid: Iterable[str]) -> str:
    """Advice for a mistyped word: `; did you mean "alpha"?`, or the valid words where none is near."""
    words = sorted(valid)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else f"; valid: {', '.join(words)}"
