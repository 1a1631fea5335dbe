"""Streaming: a checkpoint of any size quantized file by file, one linear in memory at a time, and no model built.

For each safetensors file of the checkpoint:  read a tensor -> round it -> pack it -> append it to the file of the same number.
The skeleton on the meta device tells names and shapes; method and export are those of `qtool run`, whose files hold the same
tensors to the bit. An expert's linear that the checkpoint keeps in parts goes to the file of its first part.
    .OUT.part/state/             fingerprint.json, and a record for each file that is done
    .OUT.part/exports/FORMAT/    what becomes OUT when all is done; a file that stands there is whole
    .OUT.part/shard-00001/       the file being written; begun anew by the next run
Memory: the libraries, and for each worker one linear in float32 with what rounding and packing take, four or five times that;
what stays dense passes in pieces of some MiB.
Why threads: torch computes without the interpreter's lock, and the libraries are in memory once. Why one by default: torch
already spreads a large tensor over all cores, and every worker takes memory for a linear of its own.
"""

import shutil
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qtool import registry
from qtool.artifact import Artifact, describe_folder, write_manifest
from qtool.errors import QtoolError, RecipeError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.quant_linear import QuantLinear
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.memory import large_pieces_returned, return_free_memory
from qtool.model.plain_reads import Place, read_float32, read_pieces, read_places
from qtool.model.wiring import oriented
from qtool.model.writer import (
    Describe,
    ShardWriter,
    Storage,
    as_stored,
    decoder,
    shard_name,
    write_index,
    write_settings,
)
from qtool.pipeline.checks import check_exports, check_step, planned_schemes
from qtool.pipeline.folder import RunFolder, StepFolder
from qtool.pipeline.run import digest_model
from qtool.progress import Progress
from qtool.recipe import Recipe, Step

TAKES = "stream takes a recipe of one quantize step that needs no text, such as quantize/rtn, and one export step"


class _Stopped(Exception):
    """Ends a worker because another one failed."""


@dataclass(frozen=True)
class Copied:
    """A tensor that stays dense, and the name that it is stored under."""

    name: str
    place: Place


@dataclass(frozen=True)
class Rounded:
    """A linear to quantize: its full name, and the parts whose rows make its weight, each by its name among parameters."""

    name: str
    scheme: Scheme
    parts: dict[str, Place]


Shards = dict[Path, list[Copied | Rounded]]


@large_pieces_returned()
def stream_recipe(recipe: Recipe, out: Path, progress: Progress, workers: int = 1, fresh: bool = False) -> Artifact:
    """Write the export of a recipe that `streamed_steps` lets pass into the new folder `out`, going on where it was stopped."""
    step, export = streamed_steps(recipe)
    out = Path(out).resolve()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise QtoolError(f"--out: {out} exists already; name a new folder, or remove it")
    model = ModelHandle(recipe.model)
    if model.quantization is not None:
        raise QtoolError(f"model: {model.options.path} is quantized already; stream takes a dense checkpoint")
    for each in (step, export):
        check_step(each, model)
    check_exports(recipe.steps, model)
    schemes = next(iter(planned_schemes(model, [step])))
    check_experts(model, export, schemes)
    shards = plan_shards(model, schemes)
    folder = RunFolder(out.with_name(f".{out.name}.part"))
    folder.open({"recipe": recipe.digest, "model": digest_model(model)}, fresh)
    stream = Stream(model, step, export, schemes, shards, folder, progress)
    stream.write_shards(workers)
    artifact = stream.finish(out)
    shutil.rmtree(folder.path, ignore_errors=True)
    return artifact


def streamed_steps(recipe: Recipe) -> tuple[Step, Step]:
    """The quantize step and the export step; raises RecipeError that names every step that has no place here."""
    quantize = [step for step in recipe.steps if step.method.kind == "quantize"]
    export = [step for step in recipe.steps if step.method.kind == "export"]
    problems = [
        f"{step.where}: {step.key} has no place here" for step in recipe.steps if step.method.kind not in ("quantize", "export")
    ]
    for found, kind in ((quantize, "quantize"), (export, "export")):
        problems += [f"{step.where}: {step.key} is one {kind} step too many" for step in found[1:]]
        problems += [] if found else [f"there is no {kind} step"]
    for step in quantize[:1]:
        method = step.method
        if method.scope != "linear" or method.needed(step.options):
            what = " or ".join(method.needed(step.options)) or f"a whole {method.scope}"
            problems.append(f"{step.where}: {step.key} with these options looks at more than weights ({what})")
        elif method.chooses or method.adds:
            problems.append(f"{step.where}: {step.key} decides by itself what a linear is stored as; use qtool run")
    for step in export[:1]:
        if step.method.storage is None:
            problems.append(
                f"{step.where}: {step.key} does not write each linear by itself into safetensors; use qtool run, or one of "
                f"{', '.join(streaming_exports())}"
            )
    if recipe.gates:
        problems.append("gates need an evaluate step, which has no place here")
    if problems:
        raise RecipeError([*problems, f"{TAKES}; everything else is for qtool run"])
    return quantize[0], export[0]


def check_experts(model: ModelHandle, export: Step, schemes: dict[str, Scheme]) -> None:
    """Raise QtoolError where some experts become codes and others, which a file keeps as parts of one tensor, stay dense."""
    assert export.method.storage is not None, "streamed_steps asks for an export that has one"
    if export.method.storage(model, schemes, export.options).encode is None:
        return
    experts = [found for name in model.linear_names() if (found := EXPERT.fullmatch(name)) is not None]
    chosen = {(found[1], found[2], found[0] in schemes) for found in experts}
    for name, side, _ in chosen:
        if {(name, side, True), (name, side, False)} <= chosen:
            raise QtoolError(
                f"{export.key}: {name}: some experts' {side} are quantized and others dense, which stream cannot write; "
                "quantize all or none of them, or use qtool run"
            )


def streaming_exports() -> list[str]:
    """The exports that can be streamed to."""
    keys = [key for key in registry.list_methods() if key.startswith("export/")]
    return [key for key in keys if registry.load(key).storage is not None]


def plan_shards(model: ModelHandle, schemes: dict[str, Scheme]) -> Shards:
    """What each of the checkpoint's files will come to, in the files' order; reads headers alone.

    Raises QtoolError where a tensor is missing or has another shape than the model's, or must be converted with others.
    """
    files = model.checkpoint.files
    if files[0].suffix != ".safetensors":
        raise QtoolError(f"model: {files[0]} is no safetensors file, which is what stream reads; use qtool run")
    places = {path: read_places(path) for path in files}
    shards: Shards = {path: [] for path in files}
    kept = model.stored_names() | {name for name, _ in model.model.named_buffers()}
    for name, value in model.model.state_dict().items():
        if name not in kept:  # a head that is tied to the embedding
            continue
        try:
            parts = {part: _place(places, key, path) for part, key, path in model.checkpoint.stored_parts(name)}
        except QtoolError as error:
            raise QtoolError(f"model: {error}; stream takes linears one by one: use qtool run") from error
        if not parts:
            raise QtoolError(f"model: {model.folder} has no tensor {name}; is it the right checkpoint?")
        _check_shape(name, value, list(parts.values()))
        scheme = schemes.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if scheme is not None:
            rounded = Rounded(name.removesuffix(".weight"), scheme, parts)
            shards[next(iter(parts.values())).path].append(rounded)
            continue
        for part, place in parts.items():
            shards[place.path].append(Copied(_stored_name(model, part, place), place))
    return shards


class Stream:
    """What the workers of one run share; the model is a skeleton, and its plan is made."""

    def __init__(
        self,
        model: ModelHandle,
        step: Step,
        export: Step,
        schemes: dict[str, Scheme],
        shards: Shards,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self.model = model
        self.step = step
        self.export = export
        self.schemes = schemes
        self.items = list(shards.values())
        self.folder = folder
        self.state = StepFolder(folder, 0, "stream")
        self.files = folder.path / "exports" / export.key.split("/")[1]
        self.progress = progress
        self._lock = threading.Lock()  # of progress
        self._stop = threading.Event()

    def path(self, index: int) -> Path:
        """The finished file of a number; it stands if and only if it is whole."""
        return self.files / shard_name(index + 1, len(self.items))

    def storage(self) -> Storage:
        """How the export keeps linears; a new one for each file, since what describes files remembers what came before."""
        assert self.export.method.storage is not None, "streamed_steps asks for an export that has one"
        storage: Storage = self.export.method.storage(self.model, self.schemes, self.export.options)
        return storage

    def write_shards(self, workers: int) -> None:
        """Write every file that does not stand yet."""
        self.files.mkdir(parents=True, exist_ok=True)
        left = [index for index in range(len(self.items)) if not self.path(index).is_file()]
        if len(left) < len(self.items):
            self.progress.note(f"{len(self.items) - len(left)} of {len(self.items)} files were finished before")
        self.progress.stage(f"{self.step.key}, {self.export.key}", sum(len(self.items[index]) for index in left))
        # What a file says of the tensors of all files is in the last one: it waits for the others.
        last = [index for index in left if index == len(self.items) - 1] if self.storage().describe else []
        for group in ([index for index in left if index not in last], last):
            self._write_all(group, workers)

    def _write_all(self, indices: Sequence[int], workers: int) -> None:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in as_completed([pool.submit(self._write_or_stop, index) for index in indices]):
                    future.result()
            except (QtoolError, OSError) as error:
                done = sum(self.path(index).is_file() for index in range(len(self.items)))
                raise QtoolError(
                    f"{error}\n{done} of {len(self.items)} files are finished and kept; the same command goes on after them"
                ) from error
            finally:
                self._stop.set()
                pool.shutdown(cancel_futures=True)
                self._stop.clear()

    def _write_or_stop(self, index: int) -> None:
        try:
            self._write_shard(index)
        except _Stopped:  # the failure of another worker is what is told
            return
        except BaseException:
            self._stop.set()
            raise

    @torch.no_grad()
    def _write_shard(self, index: int) -> None:
        storage = self.storage()
        describe = storage.describe
        unfinished = self.folder.path / f"shard-{index + 1:05d}"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            writer, is_lossless = ShardWriter(unfinished, sys.maxsize), True
            if describe is not None and index == len(self.items) - 1:
                for before in map(self.path, range(index)):
                    forms = {name: _form(place.dtype, place.shape) for name, place in read_places(before).items()}
                    writer.add({}, describe(forms))
            for item in self.items[index]:
                if self._stop.is_set():
                    raise _Stopped
                if isinstance(item, Copied):
                    self._copy(item, writer, describe)
                else:
                    tensors, is_exact = self._quantize(item, storage)
                    is_lossless &= is_exact
                    writer.add(tensors, describe and describe(tensors))
                    del tensors
                    return_free_memory()
                with self._lock:
                    self.progress.advance(f"{self.path(index).name}: {item.name}")
            writer.close()
            self.state.write_records(f"shard-{index + 1:05d}", {"lossless": is_lossless})
            (unfinished / "model.safetensors").replace(self.path(index))
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def _copy(self, item: Copied, writer: ShardWriter, describe: Describe | None) -> None:
        form = _form(item.place.dtype_in(self.model.dtype), item.place.shape)
        pieces = read_pieces(item.place, self.model.dtype)
        writer.add_pieces(item.name, form, pieces, describe and describe({item.name: form}))

    def _quantize(self, item: Rounded, storage: Storage) -> tuple[dict[str, Tensor], bool]:
        """The tensors that the export stores of a linear, by the checkpoint's names, and whether they decode to its codes."""
        try:
            layer = QuantLinear(self._round(item), None, item.scheme.activations)
        except QtoolError as error:
            raise QtoolError(f"{self.step.where}: {self.step.key}: {item.name}: {error}") from error
        except RuntimeError as error:  # torch's own, for a GPU's memory of a class of its own, for the host's of none
            if not (isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)):
                raise
            raise QtoolError(f"{item.name}: the memory does not suffice for it; use fewer --workers") from error
        tensors, is_exact = (storage.encode or decoder(self.model))(item.name, layer)
        if storage.encode is None:
            rows = [place.shape[0] for place in item.parts.values()]
            tensors = dict(zip(item.parts, tensors[f"{item.name}.weight"].split(rows), strict=True))
        return as_stored(self.model, tensors), is_exact

    def _round(self, item: Rounded) -> QuantizedTensor:
        def note(text: str) -> None:
            with self._lock:
                self.progress.note(f"{self.step.key}: {item.name}: {text}")

        weights = [read_float32(place, self.model.dtype) for place in item.parts.values()]
        W = weights[0] if len(weights) == 1 else torch.cat(weights)
        del weights
        W = oriented(self.model.model.get_submodule(item.name), W).to(self.model.device)  # [out, in]
        found: QuantizedTensor = self.step.method.run(W, None, item.scheme.weights, self.step.options, note)
        return found

    def finish(self, out: Path) -> Artifact:
        """Write what stands beside the weights, and give the folder its name."""
        storage, paths = self.storage(), [self.path(index) for index in range(len(self.items))]
        records = [self.state.records(f"shard-{index + 1:05d}") for index in range(len(paths))]
        try:
            for path in set(self.files.iterdir()) - set(paths):  # what a run that was killed right here had begun to write
                path.unlink()
            if len(paths) > 1:
                held = [(path.name, read_places(path)) for path in paths]
                write_index(self.files, [(name, places, sum(p.nbytes for p in places.values())) for name, places in held])
            write_settings(self.model, self.files, storage)
            is_lossless = all(record["lossless"] for record in records)
            found = describe_folder(self.export.key.split("/")[1], self.files, is_lossless)
            write_manifest(self.files, found.sha256)
            self.files.replace(out)
        except OSError as error:
            raise QtoolError(f"{self.export.key}: cannot write {out}: {error}; free space, then go on") from error
        return Artifact(found.format, out, found.bytes, found.lossless, found.sha256)


def _place(places: dict[Path, dict[str, Place]], key: str, path: Path) -> Place:
    if key not in places[path]:
        raise QtoolError(f"model: {path} has no {key}, though the index names it; download it again")
    return places[path][key]


def _check_shape(name: str, value: Tensor, parts: Sequence[Place]) -> None:
    """Raise QtoolError where the parts' rows do not make a tensor of the model's shape."""
    rows = sum(place.shape[0] for place in parts) if value.ndim else 1
    shape = (rows, *parts[0].shape[1:]) if value.ndim else parts[0].shape
    if shape != tuple(value.shape) or any(place.shape[1:] != parts[0].shape[1:] for place in parts):
        raise QtoolError(
            f"model: {parts[0].path}: {parts[0].key} makes {name} {list(shape)}, but the config makes it {list(value.shape)}; "
            "is it the right checkpoint?"
        )


def _stored_name(model: ModelHandle, name: str, place: Place) -> str:
    """The name that a checkpoint has a dense tensor under."""
    found = as_stored(model, {name: torch.empty(place.shape, device="meta")})
    if [tuple(tensor.shape) for tensor in found.values()] != [place.shape]:
        raise QtoolError(f"{name} is stored as {', '.join(found)}, which stream cannot write; use qtool run")
    return next(iter(found))


def _form(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
