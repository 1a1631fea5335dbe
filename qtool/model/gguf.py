"""The GGUF container: a header with metadata and the places of all tensors, then their bytes; written and read in pieces.

    "GGUF", version (u32), number of tensors (u64), number of metadata (u64)
    metadata: key, type of the value (u32), value      texts: length (u64), UTF-8      arrays: type (u32), length (u64), items
    tensors: name, number of sides (u32), sides from the innermost out (u64 each), type (u32), place in the data (u64)
    data, which begins at a multiple of 32 bytes as every tensor in it does
Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 3.
Why not the package gguf: its writer streams too, but wants tensors in the order of the header, as NumPy arrays; its reader maps
the whole file and turns every token into objects before the first tensor can be read. All places follow from shapes and
types, so a tensor is written where it belongs whenever its block is in memory, and little more than the above is needed.
"""

import contextlib
import functools
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.ggml import BY_NUMBER, GgmlType, decode

Value = bool | int | float | str | list[int] | list[float] | list[str]

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # as struct names them
U32, I32, F32, BOOL, TEXT, ARRAY = 4, 5, 6, 7, 8, 9
GGUF = "model.gguf"  # how the file is named in a folder


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its sides as torch has them, its type, its first byte counted from the data's beginning."""

    shape: tuple[int, ...]
    kind: GgmlType
    start: int = 0

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Header:
    """Metadata but for arrays, the tensors' places, and where the data begins."""

    metadata: dict[str, bool | int | float | str]
    places: dict[str, Place]
    data: int


# ---- writing ----


@contextlib.contextmanager
def write_gguf(
    path: Path, metadata: dict[str, Value], tensors: dict[str, tuple[tuple[int, ...], GgmlType]]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Inside, `write(name, data)` puts each tensor's bytes (uint8 in any shape) into its place, in any order.

    All must have been written at the end. Raises QtoolError where the disk refuses.
    """
    header, places = pack_header(metadata, tensors)
    missing = set(places)
    try:
        with path.open("wb") as file:
            file.write(header)

            def write(name: str, data: Tensor) -> None:
                place = places[name]
                assert data.nbytes == place.n_bytes, f"{name}: {data.nbytes} bytes, not {place.n_bytes}"
                missing.remove(name)
                file.seek(len(header) + place.start)
                file.write(data.detach().cpu().contiguous().reshape(-1).numpy().data)

            yield write
            assert not missing, f"{path.name}: not written: {', '.join(sorted(missing)[:4])}"
            file.truncate(len(header) + _end(places))
    except OSError as error:
        raise QtoolError(f"{path.parent}: cannot write: {error}; free space or choose another --out") from error


def pack_header(
    metadata: dict[str, Value], tensors: dict[str, tuple[tuple[int, ...], GgmlType]]
) -> tuple[bytes, dict[str, Place]]:
    """Everything before the data, padded, and where each tensor will stand."""
    places: dict[str, Place] = {}
    for name, (shape, kind) in tensors.items():
        places[name] = Place(shape, kind, _end(places))
    header = MAGIC + struct.pack("<IQQ", VERSION, len(places), len(metadata))
    for key, value in metadata.items():
        header += _pack_text(key) + _pack_value(value)
    for name, place in places.items():
        sides = place.shape[::-1]
        numbers = struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, place.kind.number, place.start)
        header += _pack_text(name) + numbers
    return header + bytes(-len(header) % ALIGNMENT), places


def file_size(metadata: dict[str, Value], tensors: dict[str, tuple[tuple[int, ...], GgmlType]]) -> int:
    """Bytes of the file, by arithmetic alone."""
    header, places = pack_header(metadata, tensors)
    return len(header) + _end(places)


def _end(places: dict[str, Place]) -> int:
    """Where the next tensor may begin."""
    if not places:
        return 0
    last = places[next(reversed(places))]
    end = last.start + last.n_bytes
    return end + -end % ALIGNMENT


def _pack_text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _pack_value(value: Value) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", TEXT) + _pack_text(value)
    if not isinstance(value, list):
        kind = _kind_of(value)
        return struct.pack(f"<I{SCALARS[kind]}", kind, value)
    if value and isinstance(value[0], str):
        items = b"".join(_pack_text(str(item)) for item in value)
        return struct.pack("<IIQ", ARRAY, TEXT, len(value)) + items
    kind = F32 if value and isinstance(value[0], float) else I32
    return struct.pack(f"<IIQ{len(value)}{SCALARS[kind]}", ARRAY, kind, len(value), *value)


def _kind_of(value: bool | int | float) -> int:
    if isinstance(value, bool):
        return BOOL
    return F32 if isinstance(value, float) else I32 if value < 0 else U32


# ---- reading ----


def read_header(path: Path) -> Header:
    """The header of a file; raises QtoolError where it is none, or cut off. Kept for a file that has not changed."""
    try:
        stat = path.stat()
        return _read_header(path, stat.st_mtime_ns, stat.st_size)
    except (OSError, struct.error, UnicodeDecodeError, OverflowError, MemoryError, KeyError) as error:
        raise QtoolError(
            f"model: {path} is truncated or no GGUF file ({error}); download it again, or export it again"
        ) from error


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor, decoded to float32; raises QtoolError where the file ends before it does."""
    header = read_header(path)
    place = header.places[name]
    with path.open("rb") as file:
        file.seek(header.data + place.start)
        data = bytearray(file.read(place.n_bytes))
    if len(data) != place.n_bytes:
        raise QtoolError(f"model: {path} is truncated: {name} has {len(data)} of {place.n_bytes} bytes; export it again")
    rows = torch.frombuffer(data, dtype=torch.uint8).view(-1, place.kind.row_bytes(place.shape[-1]))
    return decode(rows, place.kind).view(place.shape)


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, changed: int, size: int) -> Header:
    with path.open("rb") as file:
        if file.read(4) != MAGIC:
            raise QtoolError(f"model: {path} is no GGUF file; name a folder whose {GGUF} is one")
        version, n_tensors, n_metadata = _read(file, "<IQQ")
        if version not in (2, 3):
            raise QtoolError(f"model: {path}: GGUF version {version} cannot be read; 2 and 3 can")
        metadata: dict[str, bool | int | float | str] = {}
        for _ in range(n_metadata):
            key, value = _read_text(file), _read_value(file)
            if value is not None:
                metadata[key] = value
        places = dict(_read_places(path, file, n_tensors))
        alignment = int(metadata.get("general.alignment", ALIGNMENT))
        return Header(metadata, places, file.tell() + -file.tell() % alignment)


def _read_places(path: Path, file: BinaryIO, n_tensors: int) -> Iterator[tuple[str, Place]]:
    for _ in range(n_tensors):
        name = _read_text(file)
        (n_sides,) = _read(file, "<I")
        sides = _read(file, f"<{n_sides}Q")
        number, start = _read(file, "<IQ")
        if number not in BY_NUMBER:
            known = ", ".join(kind.name for kind in BY_NUMBER.values())
            raise QtoolError(f"model: {path}: {name} is of ggml's type {number}, which cannot be read; {known} can")
        yield name, Place(tuple(reversed(sides)), BY_NUMBER[number], start)


def _read(file: BinaryIO, form: str) -> tuple[int, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _read_text(file: BinaryIO) -> str:
    (length,) = _read(file, "<Q")
    return file.read(length).decode("utf-8")


def _read_value(file: BinaryIO) -> bool | int | float | str | None:
    """A value; arrays are passed over, and are None."""
    (kind,) = _read(file, "<I")
    if kind == TEXT:
        return _read_text(file)
    if kind != ARRAY:
        return _read(file, f"<{SCALARS[kind]}")[0]
    item, length = _read(file, "<IQ")
    if item == TEXT:
        for _ in range(length):
            file.seek(_read(file, "<Q")[0], 1)
    else:
        file.seek(length * struct.calcsize(SCALARS[item]), 1)
    return None
