"""Checkpoint: the tensors of a safetensors, GGUF or ONNX folder, read one block at a time under the names transformers uses.

Checkpoint keys become parameter names through transformers' own conversion mapping, so a mixture's per-expert keys
arrive as the fused tensor that the module holds. Unless pickles are allowed, nothing but these is read: a pickle can run code.
Why a GGUF file is read as dense tensors, and not by a reader of quantized linears: its types hold more than qtool's schemes can
say, and dense values are what a linear of codes multiplies by too, so what is measured is the same.
"""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qtool.errors import QtoolError
from qtool.model.gguf import GGUF
from qtool.model.gguf_names import GgufFile
from qtool.model.onnx_file import DATA, ONNX, OnnxFile

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)  # torch.isfinite takes none of them
PICKLE = "pytorch_model.bin"
EXPERT = re.compile(r"(.+\.experts)\.(gate_up|down)\.(\d+)")  # a linear of layers/experts.py by its full name


def find_files(folder: Path, allow_pickle: bool = False) -> dict[str, Path]:
    """Checkpoint key: the file that holds it; raises QtoolError where a file is missing or broken, or a pickle not allowed."""
    names = ["model.safetensors", *([PICKLE] if allow_pickle else [])]
    for index in (folder / f"{name}.index.json" for name in names):
        if index.is_file():
            weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            outside = [name for name in weight_map.values() if Path(name).name != name]
            if outside:
                raise QtoolError(f"{index}: {outside[0]} lies outside the folder; download the model again")
            return {key: folder / name for key, name in weight_map.items()}
    single = next((folder / name for name in ("model.safetensors", GGUF, DATA, *names[1:]) if (folder / name).is_file()), None)
    if single is None:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        advice = "convert it to safetensors, or read it with --allow-pickle if you trust where it comes from"
        why = f"only {pickled[0]}, a pickle that could run code; {advice}" if pickled else "no weights"
        raise QtoolError(f"model: {folder} holds {why}; expected model.safetensors, its index, {GGUF}, or {ONNX} with {DATA}")
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_tensors(path: Path) -> "GgufFile | OnnxFile | PickleFile | safe_open":
    """Open safetensors, GGUF, ONNX data or a pickle; raises QtoolError where it is none, missing or truncated."""
    if path.name == DATA:
        return OnnxFile(path)
    if path.suffix == ".bin":
        return PickleFile(path)
    return GgufFile(path) if path.suffix == ".gguf" else open_file(path)


def open_file(path: Path) -> safe_open:
    """Open a safetensors file; raises QtoolError where it is missing, truncated or no safetensors file."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise QtoolError(f"model: the file {path} is missing, though the index names it; download the model again") from error
    except (SafetensorError, OSError) as error:
        raise QtoolError(f"model: {path} is truncated or no safetensors file ({error}); download it again") from error


class PickleFile:
    """A pickled state dict, opened as safetensors files are; torch lets tensors and plain containers alone through."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise QtoolError(f"model: the file {path} is missing, though the index names it; download it again") from error
        except (UnpicklingError, RuntimeError, OSError, EOFError) as error:
            reason = str(error).splitlines()[0][:200]
            raise QtoolError(f"model: {path} is no plain state dict ({reason}); convert it to safetensors") from error

    def __enter__(self) -> "PickleFile":
        return self

    def __exit__(self, *error: object) -> None:
        self._tensors = {}

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, key: str) -> Tensor:
        return self._tensors[key]


class Checkpoint:
    """Reads parameters by transformers' names; owns no tensor."""

    def __init__(self, folder: Path, model: PreTrainedModel, allow_pickle: bool = False) -> None:
        self.folder = folder
        files = find_files(folder, allow_pickle)
        self.files = sorted(set(files.values()))
        mapping = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self._model = model
        self._latest: tuple[str, dict[str, tuple[str, Path]]] = ("", {})  # what _unconverted found
        names = model.state_dict()
        self.embeddings = [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        self._sources: dict[str, list[tuple[str, str | None, Path]]] = {}
        for key, path in sorted(files.items(), key=lambda item: _natural(item[0])):
            target, pattern = rename_source_key(key, self._renamings, self._converters, model.base_model_prefix, names)
            if target not in names and key in names:
                target, pattern = key, None
            self._sources.setdefault(target, []).append((key, pattern, path))

    @property
    def is_onnx(self) -> bool:
        """Whether the folder is an ONNX one, whose graph says what is quantized."""
        return any(path.name == DATA for sources in self._sources.values() for _, _, path in sources)

    @property
    def names(self) -> list[str]:
        return list(self._sources)

    def stored_as(self, name: str) -> list[str]:
        """The linears, by names that `read` takes, that checkpoints keep the linear `name` as.

        An expert's gate_up is two of them, whose outputs it joins; there are none where experts are stored fused.
        """
        expert = EXPERT.fullmatch(name)
        if expert is None:
            return [name]
        experts, side, index = expert.groups()
        patterns = [pattern for entry in self._converters for pattern in entry.source_patterns]  # such as .experts.*.w1.weight
        parts = dict.fromkeys(part for pattern in patterns for part in re.findall(r"(\w+)\.weight$", pattern))
        names = [f"{experts}.{index}.{part}" for part in parts]
        fused = f"{experts}.{side}_proj"
        return [part for part in names if rename_source_key(f"{part}.weight", [], self._converters)[0] == fused]

    def stored_parts(self, name: str) -> list[tuple[str, str, Path]]:
        """What the parameter `name` is stored as: a name that `read` takes, the key in the file, and the file, of each part.

        One part of its own name, or the parts of an expert's linear, whose rows it joins. Empty where the checkpoint has no
        such tensor; raises QtoolError where tensors in it must be converted together to become this one.
        """
        linear = name.removesuffix(".weight")
        expert = EXPERT.fullmatch(linear)
        if expert is None:
            sources = self._sources.get(name, [])
            if len(sources) > 1 or any(pattern is not None for _, pattern, _ in sources):
                raise QtoolError(f"{name}: the checkpoint keeps it as {sources[0][0]}, which must be converted to become it")
            return [(name, key, path) for key, _, path in sources]
        fused, parts = f"{expert[1]}.{expert[2]}_proj", self.stored_as(linear)
        if not parts:
            raise QtoolError(f"{linear}: the checkpoint keeps all experts of a block in one tensor")
        found = self._unconverted(fused)
        return [(f"{part}.weight", *found[f"{part}.weight"]) for part in parts if f"{part}.weight" in found]

    def _unconverted(self, name: str) -> dict[str, tuple[str, Path]]:
        """Of the tensors that become the parameter `name` together: their names before that, key and file."""
        if self._latest[0] != name:
            experts, found = name.rpartition(".")[0], {}
            for key, _, path in self._sources.get(name, []):
                part = rename_source_key(key, self._renamings, [])[0]
                whole = part if part.startswith(experts) else f"{self._model.base_model_prefix}.{part}"
                found[whole] = (key, path)
            self._latest = (name, found)
        return self._latest[1]

    def read(self, names: list[str], dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor) of the names that the checkpoint has, floats cast to dtype, checked to be finite."""
        for name in names:
            sources = self._sources.get(name)
            if sources is None:
                continue
            if sources[0][1] is None:
                key, _, path = sources[0]
                found = {name: self._tensor(path, key, dtype)}
            else:
                found = self._convert(name, sources, dtype)
            for target, tensor in found.items():
                wide = tensor.float() if tensor.dtype in FLOAT8 else tensor
                if wide.is_floating_point() and not torch.isfinite(wide).all():
                    bad = int((~torch.isfinite(wide)).sum())
                    raise QtoolError(
                        f"model: {target} holds {bad} NaN or infinite values; the checkpoint is damaged, download it again"
                    )
                yield target, tensor

    def _convert(self, name: str, sources: list[tuple[str, str | None, Path]], dtype: torch.dtype | None) -> dict[str, Tensor]:
        pattern = sources[0][1]
        converter = copy.deepcopy(next(entry for entry in self._converters if pattern in entry.source_patterns))
        for key, source_pattern, path in sources:
            assert source_pattern is not None
            converter.add_tensor(name, key, source_pattern, self._tensor(path, key, dtype))  # type: ignore[arg-type]
        converted = converter.convert(name, model=self._model, config=self._model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in converted.items()}

    @staticmethod
    def _tensor(path: Path, key: str, dtype: torch.dtype | None) -> Tensor:
        with open_tensors(path) as file:
            try:
                tensor: Tensor = file.get_tensor(key)
            except SafetensorError as error:
                raise QtoolError(f"model: {path}: {key} cannot be read ({error}); download the file again") from error
            # A copy, so that the file's pages can leave memory with the file.
            return tensor.to(dtype, copy=True) if dtype is not None and tensor.is_floating_point() else tensor.clone()


def _natural(key: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in key.split(".")]
