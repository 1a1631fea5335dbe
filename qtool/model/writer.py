"""Writes a checkpoint folder that plain transformers loads, with one decoder block in memory at a time.

A safetensors file: header's length (8 bytes), header {name: dtype, shape, offsets} as JSON, tensors' bytes.
Names are those of the model's original checkpoints: transformers' own conversions, taken backwards.
Source: the safetensors format, https://github.com/huggingface/safetensors#format.
Why not safetensors' save_file: it wants every tensor of a file at once. Here a block's tensors go to disk and are
forgotten; the header, known at the end, comes before them by one copy of the file.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.experts import Experts
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import rotate_back, signs_of
from qtool.model.handle import ModelHandle
from qtool.model.linear import is_linear, weight_of
from qtool.model.store import ROTATION, write_atomically, write_text

SHARD_BYTES = 4 * 10**9
DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint32: "U32", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}  # tokenizer, chat template, generation settings
LICENCES = ("license", "licence", "notice", "copying", "use_policy")  # files that go along whatever they end in
REWRITTEN = {"config.json", "quantize_config.json", "quant_config.json"}  # what they say of quantized weights may end here

Encode = Callable[[str, QuantLinear], tuple[dict[str, Tensor], bool]]
Pack = Callable[[QuantizedTensor], tuple[dict[str, Tensor], Tensor]]
Describe = Callable[[dict[str, Tensor]], dict[str, str]]


@dataclass(frozen=True)
class Storage:
    """How an export keeps a model in one safetensors checkpoint, each linear by itself.

    `encode` gives the tensors of a quantized linear of some full name, an expert's too, by transformers' names, and whether
    they decode to its very weights; without it, they are decoded to dense ones. `quantization` becomes config.json's
    quantization_config, and `settings` more of its fields; `files` are further JSON files by name. `describe` gives what the
    metadata of the safetensors files is to say of tensors, by the names that they are stored under. `holds_rotations`:
    rotations of inputs are stored; else the weights take them back.
    """

    encode: Encode | None = None
    quantization: dict[str, Any] | None = None
    describe: Describe | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    holds_rotations: bool = False
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


DENSE = Storage()


class ShardWriter:
    """Safetensors files of at most `shard_bytes` (one `add` is never split); `close` gives them their names."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._metadata = {"format": "pt"}
        self._data = folder / "tensors.tmp"
        self._header: dict[str, dict[str, object]] = {}
        self._size = 0
        self._shards: list[tuple[Path, list[str], int]] = []

    def add(self, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        """Append tensors, and what this file's and all later headers tell of them; raises QtoolError where the disk refuses."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if self._size and self._size + size > self._shard_bytes:
            self._finish_shard()
        self._metadata |= metadata or {}
        # Wide elements first, so that tensors stay aligned to their elements.
        for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].element_size()):
            self._append(name, tensor, [tensor])

    def add_pieces(self, name: str, form: Tensor, pieces: Iterable[Tensor], metadata: dict[str, str] | None = None) -> None:
        """`add` of one tensor that comes in pieces; `form`, on the meta device, has its dtype and shape."""
        if self._size and self._size + form.nbytes > self._shard_bytes:
            self._finish_shard()
        self._metadata |= metadata or {}
        self._append(name, form, pieces)

    def _append(self, name: str, form: Tensor, pieces: Iterable[Tensor]) -> None:
        offsets = [self._size, self._size + form.nbytes]
        self._header[name] = {"dtype": DTYPE_NAMES[form.dtype], "shape": list(form.shape), "data_offsets": offsets}
        self._size += form.nbytes
        try:
            with self._data.open("ab") as file:
                for piece in pieces:
                    file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise QtoolError(f"{self._folder}: cannot write: {error}; free space or choose another --out") from error

    def close(self) -> None:
        """Finish the last file; one file is model.safetensors, several have an index."""
        self._finish_shard()
        count = len(self._shards)
        if count == 1:
            self._shards[0][0].replace(self._folder / "model.safetensors")
            return
        named = []
        for number, (path, names, size) in enumerate(self._shards, 1):
            named.append((shard_name(number, count), names, size))
            path.replace(self._folder / named[-1][0])
        write_index(self._folder, named)

    def _finish_shard(self) -> None:
        header = json.dumps({"__metadata__": self._metadata, **self._header}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path = self._folder / f"shard-{len(self._shards)}.safetensors"
        self._data.touch()  # a file of no tensors is a file too

        def write(temporary: Path) -> None:
            with temporary.open("wb") as out, self._data.open("rb") as data:
                out.write(len(header).to_bytes(8, "little") + header)
                shutil.copyfileobj(data, out, 1 << 20)

        write_atomically(path, write)
        self._data.unlink()
        self._shards.append((path, list(self._header), self._size))
        self._header, self._size = {}, 0


def shard_name(number: int, count: int) -> str:
    """The name of one of `count` files, which are counted from 1."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(folder: Path, shards: Iterable[tuple[str, Iterable[str], int]]) -> None:
    """Which of several files holds which tensor; a file is its name, its tensors' names and their bytes."""
    shards = list(shards)
    weight_map = {tensor: name for name, tensors, _ in shards for tensor in tensors}
    index = {"metadata": {"total_size": sum(size for _, _, size in shards)}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


def as_stored(model: ModelHandle, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of transformers' names under those of the model's original checkpoints."""
    renamed: dict[str, Tensor] = revert_weight_conversion(model.model, tensors)
    return renamed


def write_checkpoint(model: ModelHandle, out: Path, storage: Storage = DENSE, shard_bytes: int = SHARD_BYTES) -> bool:
    """Stream the model with its changes into `out`; returns whether every quantized linear came out as it is.

    Raises QtoolError where the disk refuses.
    """
    writer, is_lossless, describe = ShardWriter(out, shard_bytes), True, storage.describe
    encode, fuses_experts = storage.encode or decoder(model), storage.encode is None
    for tensors, is_exact in unit_tensors(model, encode, fuses_experts, storage.holds_rotations):
        is_lossless &= is_exact
        renamed = as_stored(model, tensors)
        writer.add(renamed, describe and describe(renamed))
    writer.close()
    write_settings(model, out, storage)
    return is_lossless


def written_by(storage: Callable[[ModelHandle, dict[str, Scheme], Any], Storage]) -> Callable[[ModelHandle, Path, Any], bool]:
    """The `run` of an export that is a storage; `storage` takes what its method's `holds` does."""

    def run(model: ModelHandle, out: Path, options: Any) -> bool:
        return write_checkpoint(model, out, storage(model, model.schemes(), options))

    return run


def packed_by(pack: Pack, where: str, dtype: torch.dtype) -> Encode:
    """An `encode` for codes, scales and zero points alone; errors begin with `where`.

    `pack` gives a linear's tensors by the ends of their names, and the weights [out, in] that they decode to: the linear is as
    it was where those are the same in `dtype`.
    """

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        assert layer.low_rank is None, f"{name}: the pipeline hands no low-rank factors to this export"
        try:
            parts, W = pack(layer.qt)
        except QtoolError as error:
            raise QtoolError(f"{where}: {name}: {error}") from error
        return {f"{name}.{key}": tensor for key, tensor in parts.items()}, torch.equal(W.to(dtype), layer.weight_values(dtype))

    return encode


def unit_tensors(
    model: ModelHandle, encode: Encode, fuses_experts: bool, holds_rotations: bool = False
) -> Iterator[tuple[dict[str, Tensor], bool]]:
    """The tensors outside the blocks, then each block's, by transformers' names, and whether `encode` kept all of the unit.

    One unit is in memory at a time.
    """
    with model.outer():
        yield _tensors(model, model.model, "", encode, fuses_experts, holds_rotations)
    for block in model.blocks():
        yield _tensors(model, block.module, f"{block.name}.", encode, fuses_experts, holds_rotations)


def write_settings(model: ModelHandle, out: Path, storage: Storage = DENSE) -> None:
    """Copy what stands beside the weights, tokenizer, chat template, licence; and write config.json and other settings."""
    for path in copied_files(model):
        shutil.copyfile(path, out / path.name)
    for name, text in settings_of(model, storage).items():
        write_text(out / name, text)


def copied_files(model: ModelHandle) -> list[Path]:
    """What stands beside the model's weights and goes into every export as it is."""
    files = [path for path in sorted(model.folder.iterdir()) if path.is_file() and path.name not in REWRITTEN]
    files = [path for path in files if path.suffix in COPIED or path.stem.lower() in LICENCES]
    return [path for path in files if not path.name.endswith(".index.json")]


def settings_of(model: ModelHandle, storage: Storage = DENSE) -> dict[str, str]:
    """The JSON files that say how the weights are stored, by name: config.json with this dtype, and the storage's own."""
    config = copy.deepcopy(model.stated_config)
    for key in ("torch_dtype", "quantization_config"):
        config.pop(key, None)
    config |= {"dtype": str(model.dtype).removeprefix("torch."), **storage.settings}
    if not model.is_tied and getattr(model.config.get_text_config(), "tie_word_embeddings", False):  # a step has parted them
        for part in (config, *(config[name] for name in ("text_config",) if name in config)):
            part["tie_word_embeddings"] = False
    if storage.quantization is not None:
        config["quantization_config"] = storage.quantization
    files = {"config.json": config, **storage.files}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in files.items()}


def rope_settings(model: ModelHandle) -> dict[str, Any]:
    """rope_theta and rope_scaling, as config.json had them before transformers 5; {} where rope_parameters say neither."""
    stated = model.stated_config
    rope = stated.get("rope_parameters") or {}
    if "rope_theta" not in rope or "rope_theta" in stated:
        return {}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    is_scaled = scaling.get("rope_type", "default") != "default"
    return {"rope_theta": rope["rope_theta"], **({"rope_scaling": scaling} if is_scaled else {})}


def _tensors(
    model: ModelHandle, root: nn.Module, prefix: str, encode: Encode, fuses_experts: bool, holds_rotations: bool
) -> tuple[dict[str, Tensor], bool]:
    """Every tensor under root by transformers' names, a tied one once; decoder blocks inside root are left out."""
    persistent = set(root.state_dict())
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    is_lossless = True

    def collect(module: nn.Module, name: str) -> None:
        nonlocal is_lossless
        full = prefix + name
        if full == f"{model.blocks_name}.":
            return
        if isinstance(module, QuantLinear):
            tensors, is_exact = encode(full.removesuffix("."), module)
            found.update(tensors)
            is_lossless &= is_exact
            if module.bias is not None:
                found[f"{full}bias"] = module.bias
            if holds_rotations and (signs := signs_of(module)) is not None:
                found[f"{full.removesuffix('.')}{ROTATION}::signs"] = signs
            return
        if isinstance(module, Experts) and fuses_experts:
            for side, linears in (("gate_up_proj", module.gate_up), ("down_proj", module.down)):
                weights = [_dense(linear, model.dtype) for linear in linears]
                found[full + side] = torch.stack(weights)  # [experts, out, in]
                is_lossless &= all(_is_kept(linear) for linear in linears)
            return
        if is_linear(module) and (signs := signs_of(module)) is not None:
            if holds_rotations:
                found[f"{full.removesuffix('.')}{ROTATION}::signs"] = signs
            else:
                found[f"{full}weight"], is_lossless = _dense(module, model.dtype), False
                taken.add(id(module.get_parameter("weight")))
        for local, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if name + local in persistent and id(tensor) not in taken:
                taken.add(id(tensor))
                found[full + local] = tensor
        for local, child in module.named_children():
            collect(child, f"{name}{local}.")

    collect(root, "")
    return found, is_lossless


def decoder(model: ModelHandle) -> Encode:
    """An `encode` to dense weights, as the model's class has them."""
    transposed = {name for name, module in model.model.named_modules() if isinstance(module, Conv1D)}

    def decode(name: str, layer: QuantLinear) -> tuple[dict[str, Tensor], bool]:
        W = _dense(layer, model.dtype)  # [out, in]
        return {f"{name}.weight": W.T if name in transposed else W}, _is_kept(layer)

    return decode


def _dense(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weights as the linear's class keeps them, [out, in] of a quantized one, a rotation of its input taken back."""
    signs = signs_of(linear)
    if isinstance(linear, QuantLinear):
        W = linear.weight_values(dtype if signs is None else torch.float32)
        return W if signs is None else rotate_back(W, signs).to(dtype)
    assert isinstance(linear, (nn.Linear, Conv1D))
    if signs is None:
        return linear.weight
    W = rotate_back(weight_of(linear), signs).to(dtype)
    return W.T if isinstance(linear, Conv1D) else W


def _is_kept(linear: nn.Module) -> bool:
    """Whether a dense weight holds all of a linear: no rank that rounding takes from, no rotation to take back."""
    return signs_of(linear) is None and not (isinstance(linear, QuantLinear) and linear.low_rank is not None)
