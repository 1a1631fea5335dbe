"""Tensors of safetensors files by plain reads, a piece at a time: nothing is mapped into memory.

A file: the header's length (8 bytes), the header {name: dtype, shape, offsets} as JSON, the tensors' bytes.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
Why not safetensors' own reading: it maps the file, and every page that was touched counts as the process's memory.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.model.checkpoint import FLOAT8, open_file
from qtool.model.writer import DTYPE_NAMES

PIECE = 4 << 20  # bytes of one read
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()} | {"F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu}


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: `start` is its first byte in the file."""

    path: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it becomes in a model of `dtype`: floats that, the rest what they are."""
        return dtype if self.dtype.is_floating_point else self.dtype


def read_places(path: Path) -> dict[str, Place]:
    """Every tensor of a file, from its header alone; raises QtoolError where the file is missing, truncated or strange."""
    with open_file(path):  # safetensors checks the header: offsets against shapes, and against the file's size
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    unknown = next((key for key, entry in header.items() if entry["dtype"] not in DTYPES), None)
    if unknown is not None:
        raise QtoolError(
            f"model: {path}: {unknown} is {header[unknown]['dtype']}, which cannot be read; known are {', '.join(DTYPES)}: "
            "convert the checkpoint"
        )
    return {
        key: Place(path, key, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for key, entry in header.items()
    }


def read_pieces(place: Place, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor's elements in their order, in pieces [elements], floats cast to `dtype` and checked to be finite.

    A piece is valid until the next one is asked for.
    """
    left = place.nbytes
    buffer = bytearray(min(left, PIECE))
    try:
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.start)
            while left:
                view = memoryview(buffer)[: min(left, PIECE)]
                _fill(file, view, place)
                left -= len(view)
                piece = torch.frombuffer(view, dtype=place.dtype)
                yield _checked(piece.to(place.dtype_in(dtype)), place)
    except OSError as error:
        raise QtoolError(f"model: {place.path}: {place.key} cannot be read ({error}); is the disk well?") from error


def read_float32(place: Place, dtype: torch.dtype) -> Tensor:
    """The whole tensor as a model of `dtype` has it, in float32."""
    whole = torch.empty(math.prod(place.shape), dtype=torch.float32)
    done = 0
    for piece in read_pieces(place, dtype):
        whole[done : done + len(piece)] = piece
        done += len(piece)
    return whole.view(place.shape)


def _fill(file: FileIO, view: memoryview, place: Place) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise QtoolError(f"model: {place.path} ends within {place.key}; it changed while it was read: do it again")
        done += count


def _checked(piece: Tensor, place: Place) -> Tensor:
    wide = piece.float() if piece.dtype in FLOAT8 else piece
    if wide.is_floating_point() and not torch.isfinite(wide).all():
        raise QtoolError(
            f"model: {place.path}: {place.key} holds NaN or infinite values; the checkpoint is damaged, download it again"
        )
    return piece
