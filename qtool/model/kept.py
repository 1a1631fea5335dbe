"""Kept results: what was computed of an original model, on disk, so that the next recipe does not compute it again.

One file an entry, named by the SHA-256 of its key; the key says everything that the tensors depend on: the bytes of the model,
the tokens, the device and the versions. An entry whose own digest does not fit its tensors, or that holds another key, is
not used: it is deleted, noted, and computed again.
Why the last block's output and not logits: it is exact, where the k largest logits with their log-sum-exp leave an error of
the KL divergence that no useful bound holds small (the rest of p against any q), and of any vocabulary's size it takes two
bytes a channel and token. The output head is all that a tenth recipe computes of the original.
Where: the folder that QTOOL_CACHE names (`off`: nowhere), else ~/.cache/qtool; at most QTOOL_CACHE_GIB (10), of which what
was not used for longest goes first.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qtool.errors import QtoolError
from qtool.model.store import write_atomically

Key = Mapping[str, str]


class Kept:
    """The entries of one folder; `notes` gathers what a user should hear of."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.notes: list[str] = []

    def read(self, key: Key) -> dict[str, Tensor] | None:
        """The tensors of an entry; None where there is none that is whole."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                stated = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            self._drop(path, str(error))
            return None
        if stated.get("key") != _text_of(key) or stated.get("sha256") != _digest(tensors):
            self._drop(path, "its digest is not that of its tensors")
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # used just now
        return tensors

    def write(self, key: Key, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry, whole or not at all; a disk that refuses is noted, not an error."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit_bytes:
            need = f"{size / 2**30:.1f} GiB, more than QTOOL_CACHE_GIB={self.limit_bytes / 2**30:g}"
            self.notes.append(f"{key['what']} of the original is not kept for other runs: {need}")
            return
        held = {name: tensor.contiguous() for name, tensor in tensors.items()}
        metadata = {"key": _text_of(key), "sha256": _digest(held)}
        try:
            write_atomically(self._path(key), lambda temporary: save_file(held, temporary, metadata))
        except QtoolError as error:
            self.notes.append(f"{key['what']} of the original is not kept for other runs: {error}")
            return
        self._make_room()

    def _path(self, key: Key) -> Path:
        return self.folder / f"{hashlib.sha256(_text_of(key).encode()).hexdigest()}.safetensors"

    def _drop(self, path: Path, why: str) -> None:
        path.unlink(missing_ok=True)
        self.notes.append(f"{path} is damaged ({why}); it is computed again")

    def _make_room(self) -> None:
        """Delete what was not used for longest until the rest is within the limit."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another run's cleaning
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self.limit_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def kept_results() -> Kept | None:
    """The folder that the environment names; None where it says off."""
    stated = os.environ.get("QTOOL_CACHE", "")
    if stated == "off":
        return None
    limit = os.environ.get("QTOOL_CACHE_GIB", "10")
    try:
        limit_bytes = int(float(limit) * 2**30)
    except ValueError as error:
        raise QtoolError(f"QTOOL_CACHE_GIB is {limit!r}; must be a number of GiB") from error
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtool"
    return Kept(Path(stated).expanduser() if stated else default, limit_bytes)


def machine() -> dict[str, str]:
    """What the last bits of a result depend on beside model and text, of the CPU; a GPU is told by its own name."""
    return {"cpu": torch.backends.cpu.get_cpu_capability(), "threads": str(torch.get_num_threads())}


def pack_text(text: str) -> dict[str, Tensor]:
    """Text as an entry."""
    return {"utf8": torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def unpack_text(tensors: Mapping[str, Tensor]) -> str:
    return tensors["utf8"].numpy().tobytes().decode()


def _text_of(key: Key) -> str:
    return json.dumps(dict(key), sort_keys=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
