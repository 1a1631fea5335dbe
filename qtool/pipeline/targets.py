"""Targets: what the original predicts for each window, asked of it as the student trains, or kept on disk beforehand.

    DIR/<digest>/00000000.safetensors    64 windows: logits and tokens [windows, length, k], total and rest [windows, length]
The digest is that of every byte of the original's files, of the windows' tokens, of k, temperature, dtype and device: another
original or text finds another folder. Files appear whole or not at all, so that several runs may share them.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from qtool.calibration.tokens import digest_tokens
from qtool.formats.target import Target, largest
from qtool.linalg.half_products import mixed_precision
from qtool.model.checkpoint import open_file
from qtool.model.handle import BATCH, ModelHandle
from qtool.model.store import write_atomically
from qtool.options import TrainingOptions

TOGETHER = 64  # windows in a file


class Targets(Protocol):
    def of(self, places: Tensor, rows: Tensor) -> Target:
        """What is predicted for windows rows [batch, length], whose indices are places [batch]."""


class Live:
    """Asked of a model in memory."""

    def __init__(self, model: nn.Module | None, options: TrainingOptions) -> None:
        self.model = model
        self._options = options

    def of(self, places: Tensor, rows: Tensor) -> Target:
        assert self.model is not None, "in_memory loads a teacher where the loss looks at one"
        with torch.no_grad(), mixed_precision(rows.device):
            logits = self.model(rows, use_cache=False).logits
        return largest(logits, self._options.top_k, self._options.temperature)


class Kept:
    """Read from disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, places: Tensor, rows: Tensor) -> Target:
        read = [self._read(int(place)) for place in places]
        parts = {name: torch.stack([window[name] for window in read]).to(rows.device) for name in read[0]}
        if "tokens" not in parts:
            return Target(parts["logits"])
        return Target(parts["logits"], parts["tokens"].long(), parts["total"], parts["rest"])

    def _read(self, place: int) -> dict[str, Tensor]:
        with open_file(self._folder / file_name(place)) as file:
            return {name: file.get_slice(name)[place % TOGETHER] for name in file.keys()}


def file_name(place: int) -> str:
    return f"{place // TOGETHER:08d}.safetensors"


def digest_targets(teacher: ModelHandle, tokens: Tensor, options: TrainingOptions) -> str:
    """SHA-256 of all that what is kept depends on."""
    digest = hashlib.sha256((teacher.folder / "config.json").read_bytes())
    for path in teacher.checkpoint.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    about = (digest_tokens(tokens), options.top_k, options.temperature, teacher.dtype, teacher.device.type)
    digest.update(repr((*about, torch.__version__, transformers.__version__)).encode())
    return digest.hexdigest()


def keep(teacher: ModelHandle, model: nn.Module, tokens: Tensor, folder: Path, options: TrainingOptions) -> None:
    """Write what `model`, the teacher in memory, predicts for every window [samples, length] that is not kept yet."""
    live = Live(model, options)
    for first in range(0, len(tokens), TOGETHER):
        if (folder / file_name(first)).is_file():
            continue
        found = [live.of(rows, rows.to(teacher.device)) for rows in tokens[first : first + TOGETHER].split(BATCH)]
        parts = {"logits": torch.cat([one.logits for one in found])}
        for name in ("tokens", "total", "rest"):
            values = [value for one in found if (value := getattr(one, name)) is not None]
            if values:
                parts[name] = torch.cat(values)
        if "tokens" in parts:
            parts["tokens"] = parts["tokens"].int()
        whole = {name: part.cpu().contiguous() for name, part in parts.items()}
        write_atomically(folder / file_name(first), lambda path, whole=whole: save_file(whole, path))  # type: ignore[misc]


@contextmanager
def in_memory(teacher: ModelHandle, options: TrainingOptions) -> Iterator[nn.Module | None]:
    """The original in memory; None where the loss is that of the text alone and nothing is to be written."""
    if options.labels == 1 and not options.generate:
        yield None
        return
    with teacher.materialized() as model:
        yield model
