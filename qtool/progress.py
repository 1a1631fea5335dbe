"""How lower floors report: the command line draws it, the run folder records it, tests ignore it."""

from typing import Protocol


class Progress(Protocol):
    def stage(self, name: str, total: int) -> None:
        """A stage of `total` steps begins; the stage before it is done."""

    def advance(self, detail: str = "") -> None:
        """One step of the running stage is done."""

    def note(self, text: str) -> None:
        """Something the user should read, such as a counted fallback."""


class Silent:
    """Progress nobody watches."""

    def stage(self, name: str, total: int) -> None: ...

    def advance(self, detail: str = "") -> None: ...

    def note(self, text: str) -> None: ...
