"""A preservation set: the windows that a compression must not harm, as a run that chose them keeps them in its folder.

    preservation.jsonl      {"ids": [length], "text": what they read}, a line each
`source: preservation` with `folder: RUN` reads exactly these windows; a run's own evaluate steps leave the folder away.
Why ids: a window begins and ends within words, and its text, tokenized anew, would give others.
"""

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from qtool.errors import QtoolError
from qtool.model.store import write_text
from qtool.options import Options

PRESERVATION = "preservation"


class Preserved(Options):
    """One window."""

    ids: list[int]
    text: str


def write_preservation(folder: Path, windows: Tensor, tokenizer: Any) -> None:
    """Windows [preserved, length] into the folder of the run that chose them."""
    rows = [Preserved(ids=ids, text=str(tokenizer.decode(ids))) for ids in windows.tolist()]
    write_text(folder / f"{PRESERVATION}.jsonl", "".join(row.model_dump_json() + "\n" for row in rows))


def read_preservation(folder: str | None) -> list[Preserved]:
    """The windows that a run chose; raises QtoolError where there are none."""
    if folder is None:
        raise QtoolError(
            "source: preservation: nothing here chooses such windows; put calibrate/preservation before the step, or name the "
            "run that did: folder: runs/NAME"
        )
    path = Path(folder) / f"{PRESERVATION}.jsonl"
    if not path.is_file():
        raise QtoolError(f"source: preservation: {folder} has no {path.name}; name a run of calibrate/preservation")
    try:
        return [Preserved.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValidationError, UnicodeDecodeError) as error:
        raise QtoolError(f"source: preservation: {path} is not as a run wrote it; start that run anew") from error


def check_window(window: Preserved, length: int, tokenizer: Any) -> None:
    """Raise QtoolError where a window would be cut, or its ids are another tokenizer's."""
    if len(window.ids) != length:
        n = len(window.ids)
        raise QtoolError(f"source: preservation: its windows have {n} tokens, length is {length}; set length: {n}")
    if max(window.ids) >= len(tokenizer) or tokenizer.decode(window.ids) != window.text:
        raise QtoolError("source: preservation: its ids are another tokenizer's; choose the windows with this model")
