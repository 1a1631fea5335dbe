"""How large an export will be, before any weight is loaded.

An export's own `encode` packs zeros of each shape and scheme that the model has, once; dense tensors are counted from the
model's skeleton, files that are copied as they lie there. Bytes of packed tensors grow evenly with `out`, so that a tall
matrix is told from two flat ones, and a model of any size is planned in little memory.
"""

import json
from collections.abc import Callable
from typing import Any, Protocol

import torch

from qtool.artifact import MANIFEST
from qtool.formats.inputs import InputScales
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.writer import DENSE, SHARD_BYTES, Storage, copied_files, settings_of
from qtool.options import Options

FLAT = 512  # rows that no packing and no double quantization leaves a remainder of
ENTRY = 90  # bytes that the header of a safetensors file spends on a tensor beside its name
CARD = 4096  # bytes that the model card may take
FACTS, PARTS = 512, 6  # bytes that are said of what stands beside codes and scales, and tensors that it takes
LINE = 85  # bytes that the manifest, or the index of shards, spends on a file or a tensor


class Sized(Protocol):
    """What tells an export's size: a registry.Method."""

    @property
    def storage(self) -> Callable[..., Any] | None: ...

    @property
    def size(self) -> Callable[..., int] | None: ...


def export_size(
    export: Sized, model: ModelHandle, schemes: dict[str, Scheme], options: Options, additions: dict[str, int] | None = None
) -> int:
    """Bytes of the folder that an export will write, before any work.

    `additions`: bytes of low-rank factors, outliers and the like of a linear, which a dense export adds to its weights, and of
    the scales of an attention's cache.
    """
    if export.storage is not None:
        return checkpoint_size(model, schemes, export.storage(model, schemes, options), additions or {})
    assert export.size is not None, "an export has a storage or tells its size"
    return export.size(model, schemes, options)


def checkpoint_size(model: ModelHandle, schemes: dict[str, Scheme], storage: Storage, additions: dict[str, int]) -> int:
    """Bytes of the folder that write_checkpoint will fill, the linears in `schemes` quantized."""
    stored = model.stored_names()
    parameters = model.model.named_parameters(remove_duplicate=False)
    dense = {name: p.numel() * model.dtype.itemsize for name, p in parameters if name in stored}
    names, tensors = list(dense), sum(dense.values())
    if storage.encode is not None:
        packed: dict[object, tuple[int, int]] = {}
        for name, scheme in schemes.items():
            shape = model.linear_shape(name)
            kind = (shape, scheme, len(model.checkpoint.stored_as(name)))
            if kind not in packed:
                packed[kind] = packed_size(name, shape, scheme, storage)
            n_bytes, n_tensors = packed[kind]
            tensors += n_bytes - dense[f"{name}.weight"]
            names += [name] * (n_tensors - 1)
        for name, more in additions.items():
            tensors += more and more + FACTS
            names += [name] * (PARTS if more else 0)
    listed = sum(len(name) + ENTRY for name in names)
    if tensors > SHARD_BYTES:
        listed += sum(len(name) + LINE for name in names)
    return tensors + listed + settings_size(model, storage)


def packed_size(name: str, shape: tuple[int, int], scheme: Scheme, storage: Storage) -> tuple[int, int]:
    """(bytes, number) of the tensors of one quantized linear of shape (out, in), with what is said of them."""
    encode, describe = storage.encode, storage.describe
    assert encode is not None

    inputs = None
    if scheme.activations is not None and scheme.activations.static:
        zero = None if scheme.activations.symmetric else torch.zeros(1, dtype=torch.uint8)
        inputs = InputScales(scheme.activations, torch.ones(1), zero)

    def measure(out: int) -> tuple[int, int]:
        zeros = quantize(torch.zeros(out, shape[1]), scheme.weights)
        tensors, _ = encode(name, QuantLinear(zeros, None, scheme.activations, inputs=inputs))
        words = {} if describe is None else describe(tensors)
        return sum(tensor.nbytes for tensor in tensors.values()) + len(json.dumps(words)), len(tensors)

    if shape[0] <= 2 * FLAT:
        return measure(shape[0])
    (first, _), (second, count) = measure(FLAT), measure(2 * FLAT)
    return first + (second - first) * (shape[0] - FLAT) // FLAT, count


def settings_size(model: ModelHandle, storage: Storage = DENSE) -> int:
    """Bytes of what stands beside the weights, the manifest and the model card among it."""
    copied, written = copied_files(model), settings_of(model, storage)
    names = [*(path.name for path in copied), *written, "model.safetensors", MANIFEST]
    listed = sum(len(name) + LINE for name in names)
    return sum(path.stat().st_size for path in copied) + sum(map(len, written.values())) + listed + CARD
