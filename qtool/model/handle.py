"""ModelHandle: a causal language model of which only the needed part is in memory.

The skeleton stands on the meta device; `block(i)` reads one decoder block from safetensors and lets it go again.
Activations between blocks are one tensor [samples, length, hidden] in host memory. How blocks are called (masks, positions)
is recorded once per batch shape, by letting the model itself call them: no code per architecture.
Why not fx tracing or per-model classes: the model's own forward already knows, and new families work unseen.
"""

import contextlib
import copy
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import qtool
from qtool.artifact import digest_file
from qtool.calibration.tokens import ASSETS, digest_tokens
from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.inputs import InputScales
from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.formats.low_rank import LowRank
from qtool.formats.rotations import InputRotation
from qtool.formats.scheme import KvScheme, Scheme
from qtool.layers.experts import Experts, is_fused
from qtool.layers.kv_cache import attentions_of, quantize_cache
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import carry_rotation, rotate_input
from qtool.linalg.half_products import HALF, use_float32_units
from qtool.model.acceleration import Acceleration
from qtool.model.architectures import is_router
from qtool.model.checkpoint import Checkpoint
from qtool.model.kept import Kept, machine
from qtool.model.linear import is_linear, shape_of
from qtool.model.memory import return_free_memory
from qtool.model.readers import reader_of
from qtool.model.rounded_attention import misfit, quantize_by_kivi, round_attention
from qtool.model.store import (
    INPUTS,
    LOW_RANK,
    ROTATION,
    ROUNDING,
    Changes,
    additions_among,
    load_additions,
    load_cache,
    load_changes,
    load_names,
    load_rounding,
    load_schemes,
)
from qtool.options import ModelOptions

BATCH = 8  # windows in one forward of a block
CONFIG = "config.json"  # of a checkpoint, and of a folder of changes after which the model has other sizes
DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md", "LICEN?E*", "NOTICE*")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class _Stop(Exception):
    """Ends a forward whose rest is not needed."""


class Block:
    """One decoder block with real weights, and the calls that the model makes of it."""

    def __init__(self, handle: "ModelHandle", index: int, module: nn.Module, name: str) -> None:
        self.index = index
        self.name = name
        self.module = module
        self._handle = handle

    def linears(self) -> dict[str, nn.Module]:
        """Full name: module, of every linear in the block except routers."""
        found = {f"{self.name}.{name}": module for name, module in self.module.named_modules() if is_linear(module)}
        return {name: module for name, module in found.items() if not is_router(name)}

    def get(self, name: str) -> nn.Module:
        """The module of a full name."""
        return self.module.get_submodule(name.removeprefix(f"{self.name}."))

    def put(self, name: str, layer: nn.Module) -> None:
        """Let `layer` stand at a full name inside the block; it rotates its input where what stood there did."""
        carry_rotation(self.get(name), layer)
        self._set(name, layer)

    def _set(self, name: str, layer: nn.Module) -> None:
        path, _, last = name.removeprefix(f"{self.name}.").rpartition(".")
        setattr(self.module.get_submodule(path), last, layer)

    @contextlib.contextmanager
    def replaced(self, layers: Mapping[str, nn.Module]) -> Iterator[None]:
        """Inside, `layers` stand at their full names; afterwards what stood there before."""
        before = {name: self.get(name) for name in layers}
        for name, layer in layers.items():
            self.put(name, layer)
        try:
            yield
        finally:
            for name, layer in before.items():
                self._set(name, layer)

    @property
    def head_dim(self) -> int | None:
        """Channels of an attention head, where the config tells."""
        return self._handle.head_dim

    def call_arguments(self, hidden: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model hands this block beside hidden [batch, length, hidden]: masks, positions."""
        shape = (hidden.shape[0], hidden.shape[1])
        if shape not in self._handle.calls:
            self._handle.record_calls(shape)
        return self._handle.calls[shape][self.index]

    def call(self, hidden: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """hidden [batch, length, hidden] through the block; `parameters`, by full name, stand in for its own."""
        args, kwargs = self.call_arguments(hidden)
        local = {name.removeprefix(f"{self.name}."): value for name, value in (parameters or {}).items()}
        out = torch.func.functional_call(self.module, local, (hidden, *args), kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)

    @torch.no_grad()
    def forward(self, hidden: Tensor) -> Tensor:
        """All samples [samples, length, hidden], batch by batch; returns a new tensor in host memory."""
        return torch.cat([self.call_from_host(batch) for batch in self.batches(hidden)])

    @property
    def model(self) -> "ModelHandle":
        """The model that the block is a part of."""
        return self._handle

    @property
    def device(self) -> torch.device:
        return self._handle.device

    @property
    def dtype(self) -> torch.dtype:
        return self._handle.dtype

    def batches(self, hidden: Tensor) -> list[Tensor]:
        """All samples [samples, length, hidden] in pieces that one forward takes."""
        return list(hidden.split(BATCH))

    def call_from_host(self, batch: Tensor, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`call` on the model's device; batch [batch, length, hidden] and the result are in host memory."""
        return self.call(batch.to(self._handle.device), parameters).to(batch.device)

    @torch.no_grad()
    def observe(self, hidden: Tensor, observers: dict[str, Any]) -> None:
        """Run all samples and hand every input of the named linears to `observer.update`; stops where all were seen."""
        seen: set[str] = set()

        def stop_when_seen(name: str) -> None:
            seen.add(name)
            if len(seen) == len(observers):
                raise _Stop

        with self._observed(observers, stop_when_seen):
            for batch in self.batches(hidden):
                seen.clear()
                with contextlib.suppress(_Stop):
                    self.call(batch.to(self._handle.device))

    def forward_observed(self, hidden: Tensor, observers: dict[str, Any]) -> Tensor:
        """`forward` and `observe` in one pass."""
        with self._observed(observers, lambda name: None):
            return self.forward(hidden)

    @contextlib.contextmanager
    def _observed(self, observers: dict[str, Any], then: Callable[[str], None]) -> Iterator[None]:
        hooks = []
        for name, observer in observers.items():

            def hook(module: nn.Module, args: tuple[Tensor, ...], name: str = name, observer: Any = observer) -> None:
                observer.update(args[0])
                then(name)

            hooks.append(self.get(name).register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in hooks:
                handle.remove()


class ModelHandle:
    """Owns the skeleton, the checkpoint and the changes made so far; see the module's docstring."""

    def __init__(self, options: ModelOptions, changes: tuple[Path, ...] = (), acceleration: Acceleration | None = None) -> None:
        """acceleration: makes quantized linears fast as they are loaded, and counts them; None: they decode."""
        self.options = options
        self.changes = changes
        self.acceleration = acceleration
        shaped = [place for place, folder in enumerate(changes) if (folder / CONFIG).is_file()]
        self._is_reshaped = bool(shaped)  # the latest such folder holds a config, and every tensor in that config's shapes
        self._live = changes[shaped[-1] :] if shaped else changes
        self.folder = resolve_folder(options)
        self.device = device_named(options.device)
        trust = options.trust_remote_code
        try:
            self.config = AutoConfig.from_pretrained(self.folder, trust_remote_code=trust)
            self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=trust)
        except (OSError, ValueError) as error:
            if "custom code" in str(error):
                raise QtoolError(
                    f"model: {options.path} brings Python code of its own, which is not run; if you trust it, write "
                    "model: {path: ..., trust_remote_code: true}"
                ) from error
            raise QtoolError(f"model: {options.path}: {str(error).splitlines()[0]}") from error
        self.quantization: dict[str, Any] | None = getattr(self.config, "quantization_config", None)
        if self.quantization is not None:
            del self.config.quantization_config
        stated = getattr(self.config, "dtype", None) or torch.float32
        self.dtype = DTYPES[options.dtype] if options.dtype != "auto" else stated
        if self.device.type == "cpu" and self.dtype in HALF:
            use_float32_units()
        place = self._live[0] if self._is_reshaped else self.folder
        self.stated_config: dict[str, Any] = json.loads((place / CONFIG).read_text(encoding="utf-8"))  # config.json's fields
        if self._is_reshaped:
            self.quantization = None
            self.config = type(self.config).from_dict(copy.deepcopy(self.stated_config))
        self.model: PreTrainedModel = self._skeleton()
        self.checkpoint = Checkpoint(self.folder, self.model, options.allow_pickle)
        if self.quantization is None and self.checkpoint.is_onnx and not self._is_reshaped:
            self.quantization = {"quant_method": "onnx"}
        self._is_parted = False
        self._arrange()

    def _skeleton(self) -> PreTrainedModel:
        """The model that the config makes, on the meta device but for its buffers."""
        with init_empty_weights(include_buffers=False):
            try:
                model: PreTrainedModel = AutoModelForCausalLM.from_config(
                    self.config, dtype=self.dtype, trust_remote_code=self.options.trust_remote_code
                )
            except ValueError as error:
                raise QtoolError(
                    f"model: {self.options.path}: transformers has no causal language model for {type(self.config).__name__}; "
                    "use a version that knows it, or another model"
                ) from error
        model.eval()
        return model

    def _arrange(self) -> None:
        """Find the blocks of a new skeleton, experts apart; nothing is known yet of how it calls them."""
        self._separate_experts()
        self.blocks_name, self._skeletons = self._find_blocks()
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self.calls: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}
        self._returns_tuple = False
        self._is_whole = False  # transformers has loaded all of it
        self._final: tuple[str, Tensor] | None = None
        self.kept: Kept | None = None  # set for an original whose results other runs may take up
        self._digest: str | None = None

    # ---- structure ----

    @property
    def n_blocks(self) -> int:
        return len(self._skeletons)

    @property
    def is_tied(self) -> bool:
        """Whether the output head and the embedding are one tensor: so the config says, and no change parts them."""
        if self._is_parted or not getattr(self.config.get_text_config(), "tie_word_embeddings", False):
            return False
        path = self._changes_file("outer")
        return path is None or not load_names(path) & self._tied_names()

    def parted(self) -> "ModelHandle":
        """The same model, to plan with, as it will be once a step has made head and embedding two tensors."""
        planned = copy.copy(self)
        planned._is_parted = True
        return planned

    def resized(self, fields: dict[str, Any]) -> "ModelHandle":
        """The same model, to plan with, as a config.json of other sizes makes it; it has no weights that could be loaded.

        Raises QtoolError where the model's class takes no such sizes.
        """
        planned = copy.copy(self)
        planned.stated_config = fields
        try:
            planned.config = type(self.config).from_dict(copy.deepcopy(fields))
            planned.model = planned._skeleton()
        except (StrictDataclassError, ValueError, AssertionError, TypeError, ZeroDivisionError) as error:  # as classes like
            reason = str(error.__cause__ or error).splitlines()[0]
            raise QtoolError(f"{type(self.model).__name__} takes no such sizes: {reason}") from error
        planned._arrange()
        return planned

    def outer_names(self) -> list[str]:
        """Parameters that belong to no block: embeddings, last norm, head."""
        return [name for name in self.model.state_dict() if not self._in_block(name)]

    def _in_block(self, name: str) -> bool:
        return name.startswith(f"{self.blocks_name}.")

    @property
    def revision(self) -> str | None:
        """The commit of a model from the hub, as the hub client's cache has it; None of a local folder."""
        return self.folder.name if self.folder.parent.name == "snapshots" else None

    def linear_names(self) -> list[str]:
        """Every linear that methods may work on, in blocks and outside."""
        modules = self.model.named_modules()
        return [name for name, module in modules if is_linear(module) and not is_router(name)]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear, nothing loaded."""
        return shape_of(self.model.get_submodule(name))

    def n_parameters(self) -> int:
        """Parameters, a head that is tied to the embedding counted once."""
        counted = self.stored_names()
        return sum(p.numel() for name, p in self.model.named_parameters(remove_duplicate=False) if name in counted)

    def stored_names(self) -> set[str]:
        """Parameters that a checkpoint stores: all but a head that is tied to the embedding."""
        return {name for name, _ in self.model.named_parameters(remove_duplicate=False)} - self.tied_names()

    def tied_names(self) -> set[str]:
        """Parameters that are the embedding itself."""
        return self._tied_names() if self.is_tied else set()

    def skeleton_of(self, index: int) -> nn.Module:
        """Block `index` without its weights."""
        return self._skeletons[index]

    def called_like(self, other: "ModelHandle") -> None:
        """Take over how another model of the same class calls its blocks."""
        self.calls, self._returns_tuple = other.calls, other._returns_tuple

    def _tied_names(self) -> set[str]:
        """Parameters that are the embedding itself where head and embedding are tied."""
        return set(getattr(self.model, "all_tied_weights_keys", None) or {})

    def _blocks_list(self) -> nn.ModuleList:
        return cast(nn.ModuleList, self.model.get_submodule(self.blocks_name))

    def block_modules(self) -> list[nn.Module]:
        """Every block as it stands in the model now, in memory or not."""
        return list(self._blocks_list())

    def _find_blocks(self) -> tuple[str, list[nn.Module]]:
        wanted = self.config.get_text_config().num_hidden_layers
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return name, list(module)
        raise QtoolError(f"model: {self.options.path}: no list of {wanted} blocks was found in {type(self.model).__name__}")

    def _separate_experts(self) -> None:
        for name, module in list(self.model.named_modules()):
            if is_fused(module):
                n_experts, hidden, intermediate = cast(Tensor, module.down_proj).shape
                separate = Experts(n_experts, hidden, intermediate, cast(nn.Module, module.act_fn), self.dtype)
                parent, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(parent), last, separate)

    # ---- loading and releasing ----

    def load_by_transformers(self, why: str) -> None:
        """Let transformers load the whole model, with whatever quantizer its config names; blocks then stay in memory.

        For measuring checkpoints that no reader of qtool's decodes: what is quantized in them is not known, only computed.
        why: what qtool cannot read. Raises QtoolError with that, transformers' own reason and the packages that it takes.
        """
        placed = {"device_map": {"": str(self.device)}} if self.device.type == "cuda" else {}
        dtype = "auto" if self.options.dtype == "auto" else self.dtype
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=dtype, trust_remote_code=self.options.trust_remote_code, **placed
            )
        except (ImportError, ValueError, RuntimeError, OSError) as error:  # a quantizer's package that is not there, mostly
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            is_gptq = (self.quantization or {}).get("quant_method") == "gptq"  # of whose packages it names one at a time
            needs = "; for GPTQ's layout it takes pip install optimum gptqmodel" if is_gptq else ""
            raise QtoolError(f"{why}; transformers cannot load {self.options.path} either: {reason}{needs}") from error
        self.model, self._is_whole = model.eval(), True
        self.blocks_name, self._skeletons = self._find_blocks()
        self.calls, self._final = {}, None

    def load(self, root: nn.Module, prefix: str, unit: str) -> None:
        """Give every parameter under root its checkpoint value, then apply the unit's changes."""
        changes = self.unit_changes(unit)
        inside = [n for n in self.checkpoint.names if n.startswith(prefix)] if prefix else self._outer_checkpoint_names()
        inside = [] if self._is_reshaped else inside  # the checkpoint's tensors have other shapes
        inside = [name for name in inside if name not in changes and "::" not in name]  # qtool's reader takes those
        factors: dict[str, LowRank | None] = {}
        inputs: dict[str, InputScales | None] = {}
        for name, tensor in self.checkpoint.read(inside, self.dtype):
            self._place(root, name.removeprefix(prefix), tensor.to(self.device))
        if self.quantization is not None:
            reader = reader_of(self.quantization)
            for name, module in list(root.named_modules()):
                if is_linear(module) and not (root is self.model and self._in_block(name)):
                    quantized = reader.read_linear(self.checkpoint, prefix + name, self.quantization)
                    if quantized is not None:
                        full = prefix + name
                        factors[full] = reader.read_low_rank(self.checkpoint, full, self.quantization)
                        inputs[full] = reader.read_inputs(self.checkpoint, full, self.quantization)
                        self._place_quantized(root, name, *quantized, factors[full], inputs[full])
                    rotation = reader.read_rotation(self.checkpoint, prefix + name, self.quantization)
                    if rotation is not None:
                        self._place_rotation(root, name, rotation)
            for name in attentions_of(root) if prefix else ():
                if (cache := reader.read_cache(self.checkpoint, prefix + name, self.quantization)) is not None:
                    self._place_cache(root, name, cache)
                if (rounding := reader.read_rounding(self.quantization)) is not None:
                    round_attention(root.get_submodule(name), rounding)
        for name, value in changes.items():
            if isinstance(value, Tensor):
                self._place(root, name.removeprefix(prefix), value.to(self.device))
            elif isinstance(value, tuple):
                linear = name.removesuffix(".weight")
                low_rank = changes.get(linear + LOW_RANK, factors.get(linear))
                static = changes.get(linear + INPUTS, inputs.get(linear))
                self._place_quantized(root, linear.removeprefix(prefix), *value, low_rank, static)
            elif isinstance(value, CacheScales | KiviScheme):
                self._place_cache(root, name.removeprefix(prefix), value)
            elif isinstance(value, AttentionRounding):
                round_attention(root.get_submodule(name.removeprefix(prefix).removesuffix(ROUNDING)), value)
            elif isinstance(value, InputRotation):
                self._place_rotation(root, name.removesuffix(ROTATION).removeprefix(prefix), value)
        if self.acceleration is not None:
            self.acceleration.accelerate(root, prefix, self.dtype)

    def unit_changes(self, unit: str) -> Changes:
        """All changes of `outer` or `block_000`: the latest folder that has the unit counts."""
        path = self._changes_file(unit)
        return {} if path is None else load_changes(path)

    def schemes(self) -> dict[str, Scheme]:
        """Full name: scheme, of every quantized linear; reads headers and scales alone."""
        found: dict[str, Scheme] = {}
        if self.quantization is not None:
            reader = reader_of(self.quantization)
            for name in self.linear_names():
                scheme = reader.read_scheme(self.checkpoint, name, self.quantization)
                if scheme is not None:
                    found[name] = scheme
        for unit in (*(f"block_{index:03d}" for index in range(self.n_blocks)), "outer"):
            path = self._changes_file(unit)
            if path is not None:
                found |= {name.removesuffix(".weight"): scheme for name, scheme in load_schemes(path).items()}
        return found

    def attention_names(self) -> list[str]:
        """Every attention that keeps keys and values in a cache."""
        return [f"{self.blocks_name}.{i}.{name}" for i, block in enumerate(self._skeletons) for name in attentions_of(block)]

    def check_kivi(self, scheme: KiviScheme, where: str) -> None:
        """Raise QtoolError, which begins with `where`, if an attention cannot read such a cache or its heads do not divide."""
        for name in self.attention_names():
            reason = misfit(self.model.get_submodule(name)) or scheme.misfit(self.head_dim, self.head_dim)
            if reason is not None:
                raise QtoolError(f"{where}: {name}: {reason}")

    @property
    def head_dim(self) -> int:
        """Channels of an attention head, as the config tells."""
        config = self.config.get_text_config()
        stated: int | None = getattr(config, "head_dim", None)
        return stated or int(config.hidden_size // config.num_attention_heads)

    @property
    def n_kv_heads(self) -> int:
        """Heads of keys and values in a block, as the config tells."""
        config = self.config.get_text_config()
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def cache(self) -> KvScheme | KiviScheme | None:
        """What the key/value cache is quantized to, the same in all blocks that have one; reads headers and scales alone."""
        for index in range(self.n_blocks):
            path = self._changes_file(f"block_{index:03d}")
            if path is not None and (scheme := load_cache(path)) is not None:
                return scheme
        if self.quantization is None:
            return None
        reader = reader_of(self.quantization)
        found = (reader.read_cache(self.checkpoint, name, self.quantization) for name in self.attention_names()[:1])
        return next((one.scheme if isinstance(one, CacheScales) else one for one in found if one is not None), None)

    def rounding(self) -> AttentionRounding | None:
        """What attentions round between their linears, the same in all blocks; reads headers alone."""
        for index in range(self.n_blocks):
            path = self._changes_file(f"block_{index:03d}")
            if path is not None and (rounding := load_rounding(path)) is not None:
                return rounding
        return None if self.quantization is None else reader_of(self.quantization).read_rounding(self.quantization)

    def additions(self) -> dict[str, str]:
        """Full names of the linears that have more than codes, scales and zero points: what more; reads headers alone."""
        units = (*(f"block_{index:03d}" for index in range(self.n_blocks)), "outer")
        paths = [path for unit in units if (path := self._changes_file(unit)) is not None]
        read = {} if self.quantization is None else additions_among(self.checkpoint.names)
        return read | {name: what for path in paths for name, what in load_additions(path).items()}

    def _changes_file(self, unit: str) -> Path | None:
        paths = [folder / f"{unit}.safetensors" for folder in reversed(self._live)]
        return next((path for path in paths if path.is_file()), None)

    def block(self, index: int) -> Block:
        """Load block `index`; `release(index)` lets it go."""
        if self._is_whole:
            return Block(self, index, self._skeletons[index], f"{self.blocks_name}.{index}")
        module = copy.deepcopy(self._skeletons[index])
        prefix = f"{self.blocks_name}.{index}."
        self.load(module, prefix, f"block_{index:03d}")
        missing = [name for name, p in module.named_parameters() if p.is_meta]
        if missing:
            raise QtoolError(
                f"model: {self.folder} has no tensor {prefix}{missing[0]} ({len(missing)} missing); is it the right checkpoint?"
            )
        self._blocks_list()[index] = module
        return Block(self, index, module, f"{self.blocks_name}.{index}")

    def release(self, index: int) -> None:
        if self._is_whole:
            return
        self._blocks_list()[index] = self._skeletons[index]
        return_free_memory()

    def blocks(self) -> Iterator[Block]:
        """Each block in turn, loaded when it is asked for, released when the next one is."""
        for index in range(self.n_blocks):
            try:
                yield self.block(index)
            finally:
                self.release(index)

    @contextlib.contextmanager
    def outer(self) -> Iterator[None]:
        """Embeddings, last norm and head are in memory inside this context."""
        if self._is_whole:
            yield
            return
        linears = {name: self.model.get_submodule(name) for name in self.linear_names() if not self._in_block(name)}
        before = {name: _get(self.model, name) for name in self.outer_names()}
        try:
            self._load_outer()
            yield
        finally:
            for name, module in linears.items():
                path, _, last = name.rpartition(".")
                setattr(self.model.get_submodule(path), last, module)
            for name, tensor in before.items():
                self._place(self.model, name, tensor)

    @contextlib.contextmanager
    def materialized(self) -> Iterator[PreTrainedModel]:
        """The whole model in memory, for what needs it at once: training, lm-eval, generation."""
        configs = {id(one): one for one in (self.config, self.config.get_text_config())}.values()
        tying = [one for one in configs if not self.is_tied and getattr(one, "tie_word_embeddings", False)]
        with self.outer():
            for index in range(self.n_blocks):
                self.block(index)
            try:
                for one in tying:  # a step has parted them, and lm-eval ties what the config says is tied
                    one.tie_word_embeddings = False
                yield self.model
            finally:
                for one in tying:
                    one.tie_word_embeddings = True
                for index in range(self.n_blocks):
                    self.release(index)

    def take(self) -> PreTrainedModel:
        """The whole model, in memory for good; the handle has given it away and loads nothing more."""
        self._load_outer()
        for index in range(self.n_blocks):
            self.block(index)
        if (self.folder / "generation_config.json").is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.folder)
        unread = [name for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()) if tensor.is_meta]
        assert not unread, f"{unread[0]} was left on the meta device"
        return self.model

    def _load_outer(self) -> None:
        self.load(self.model, "", "outer")
        if self.is_tied:
            self.model.tie_weights()
        missing = [name for name in self.outer_names() if _get(self.model, name).is_meta]
        if missing:
            raise QtoolError(f"model: {self.folder} has no tensor {missing[0]}; is it the right checkpoint?")

    def _outer_checkpoint_names(self) -> list[str]:
        return [name for name in self.checkpoint.names if not self._in_block(name)]

    def _place(self, root: nn.Module, name: str, tensor: Tensor) -> None:
        path, _, last = name.rpartition(".")
        try:
            owner = root.get_submodule(path)
        except AttributeError:
            return  # a tensor the module does not have, such as old checkpoints' rotary tables
        if isinstance(owner, Experts) and last in ("gate_up_proj", "down_proj"):
            linears = owner.gate_up if last == "gate_up_proj" else owner.down
            for linear, weight in zip(linears, tensor.unbind(0), strict=True):
                linear.weight = nn.Parameter(weight, requires_grad=False)
        elif last in owner._buffers:
            owner._buffers[last] = tensor
        elif last in owner._parameters:
            owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)

    def _place_quantized(self, root: nn.Module, name: str, quantized: Any, scheme: Any, low_rank: Any, inputs: Any) -> None:
        path, _, last = name.rpartition(".")
        owner = root.get_submodule(path)
        old = owner.get_submodule(last)
        if tuple(quantized.shape) != shape_of(old):
            is_, must = list(quantized.shape), list(shape_of(old))
            raise QtoolError(f"model: {self.folder}: {name} is {is_}, the config makes it {must}; is it the right checkpoint?")
        bias = getattr(old, "bias", None)
        layer = QuantLinear(quantized, bias, scheme.activations, low_rank, inputs).to(self.device)
        carry_rotation(old, layer)
        owner.register_module(last, layer)

    def _place_cache(self, root: nn.Module, name: str, cache: CacheScales | KiviScheme) -> None:
        if isinstance(cache, KiviScheme):
            quantize_by_kivi(root.get_submodule(name), cache)
        else:
            quantize_cache(root.get_submodule(name), cache.to(self.device))

    def _place_rotation(self, root: nn.Module, name: str, rotation: InputRotation) -> None:
        linear = root.get_submodule(name)
        if len(rotation.signs) != shape_of(linear)[1]:
            raise QtoolError(
                f"model: {self.folder}: the rotation of {name}'s input has {len(rotation.signs)} signs, must have "
                f"{shape_of(linear)[1]}; is it the right checkpoint?"
            )
        rotate_input(linear, rotation.signs.to(self.device))

    # ---- running ----

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """tokens [samples, length] to the first block's input [samples, length, hidden]; records how blocks are called."""
        first = self.block(0)
        try:
            with self.outer():
                self._enter_blocks(first, tokens[:1])  # so that single samples can be tried on a block too
                return torch.cat([self._enter_blocks(first, batch) for batch in tokens.split(BATCH)])
        finally:
            self.release(0)

    @torch.no_grad()
    def record_calls(self, shape: tuple[int, int]) -> None:
        """Learn how blocks are called for batches of `shape` (batch, length)."""
        with self.outer():
            self._enter_blocks(self.block(0), torch.zeros(shape, dtype=torch.int64))
        self.release(0)

    def _enter_blocks(self, first: Block | None, batch: Tensor) -> Tensor:
        """The first block's input for batch [batch, length]; fills `calls` for a batch shape not seen before."""
        shape = tuple(batch.shape)
        entered: list[Tensor] = []
        recorded: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def begin(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append(hidden.cpu())
            if shape in self.calls:
                raise _Stop
            assert first is not None, "a batch shape not seen before needs the first block"
            out = type(first.module).forward(first.module, hidden, *args, **kwargs)
            self._returns_tuple = isinstance(out, tuple)
            return follow(hidden, *args, **kwargs)

        def follow(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            recorded.append((args, kwargs))
            if len(recorded) == self.n_blocks:
                self.calls[shape] = recorded
                raise _Stop
            return (hidden,) if self._returns_tuple else hidden

        with self._blocks_replaced(begin, follow), contextlib.suppress(_Stop):
            self.model(batch.to(self.device), use_cache=False)
        return entered[0]

    @torch.no_grad()
    def enter(self, batch: Tensor) -> Tensor:
        """The first block's input for tokens [batch, length] of a shape embedded before; call inside `outer()`."""
        assert tuple(batch.shape) in self.calls, "embed() learns how blocks are called"
        return self._enter_blocks(None, batch)

    def widen_outer(self, name: str) -> None:
        """Let one parameter outside the blocks be float64, and a tensor of its own, until `outer()` ends."""
        tensor = _get(self.model, name)
        if tensor.is_floating_point():
            self._place(self.model, name, tensor.detach().double())

    def put_outer(self, name: str, value: Tensor) -> None:
        """Let one parameter outside the blocks be `value` until `outer()` ends."""
        self._place(self.model, name, value)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last block's output [batch, length, hidden] to logits [batch, length, vocab]; call inside `outer()`.

        Gradients reach hidden where it asks for them.
        """

        def begin(_: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (hidden.to(self.device),) if self._returns_tuple else hidden.to(self.device)

        def pass_on(value: Tensor, *args: Any, **kwargs: Any) -> Any:
            return (value,) if self._returns_tuple else value

        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self.device)
        with self._blocks_replaced(begin, pass_on):
            return cast(Tensor, self.model(ids, use_cache=False).logits)

    def final_hidden(self, tokens: Tensor) -> Tensor:
        """The last block's output [samples, length, hidden], block by block; the latest answer is kept."""
        key = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        if self._final is None or self._final[0] != key:
            recalled = self._recalled(tokens)
            self._final = (key, self._computed(tokens) if recalled is None else recalled)
        return self._final[1]

    def _computed(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for block in self.blocks():
            hidden = block.forward(hidden)
        if self.kept is not None:
            flag = torch.tensor([self._returns_tuple])
            self.kept.write(self.kept_key("the output of the blocks", digest_tokens(tokens)), {"hidden": hidden, "tuple": flag})
        return hidden

    def _recalled(self, tokens: Tensor) -> Tensor | None:
        """What an earlier run kept of these tokens."""
        if self.kept is None:
            return None
        tensors = self.kept.read(self.kept_key("the output of the blocks", digest_tokens(tokens)))
        if tensors is None:
            return None
        self._returns_tuple = bool(tensors["tuple"])  # as embedding would have found
        return tensors["hidden"]

    def kept_key(self, what: str, inputs: str) -> dict[str, str]:
        """All that a result of this model, as it is stored, depends on; inputs: a digest of what it was fed."""
        assert not self.changes, "results are kept of originals alone"
        if self._digest is None:
            beside = sorted(path for kind in ("*.py", "*.onnx") for path in self.folder.glob(kind))  # code and graphs
            files = [self.folder / "config.json", *beside, *self.checkpoint.files]
            self._digest = hashlib.sha256("".join(digest_file(path) for path in files if path.is_file()).encode()).hexdigest()
        device = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
        place = {"device": device, "dtype": str(self.dtype), **machine()}
        return {"what": what, "model": self._digest, "inputs": inputs, **place, **versions, "qtool": qtool.__version__}

    @contextlib.contextmanager
    def _blocks_replaced(self, begin: Any, follow: Any) -> Iterator[None]:
        blocks = list(self._blocks_list())
        for index, module in enumerate(blocks):
            module.forward = begin if index == 0 else follow
        try:
            yield
        finally:
            for module in blocks:
                del module.forward


def _get(root: nn.Module, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    owner = root.get_submodule(path)
    value = owner._parameters.get(last)
    return cast(Tensor, owner._buffers[last] if value is None else value)


def device_named(name: str) -> torch.device:
    """A device by what an option says of it; raises QtoolError for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise QtoolError(f"device: {name} is asked for, but torch sees no GPU; use device: cpu, and see qtool doctor")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise QtoolError(f'device: "{name}" is no device; valid: auto, cpu, cuda, cuda:0, ...') from error


def resolve_folder(options: ModelOptions) -> Path:
    """The folder of `demo`, of a local path, or of a hub id (from the cache, or downloaded)."""
    if options.path == "demo":
        return ASSETS / "demo" / "model"
    local = Path(options.path).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise QtoolError(f"model: {local} has no config.json; name a folder that transformers can load")
        return local
    if local.exists() or options.path.startswith((".", "/", "~")) or options.path.count("/") > 1:
        raise QtoolError(f"model: the folder {options.path} does not exist; use demo, a local folder or a hub id")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                options.path,
                revision=options.revision,
                allow_patterns=[*DOWNLOADED, *(["*.bin"] if options.allow_pickle else [])],
            )
        )
    except Exception as error:  # the hub client raises many kinds; all mean that the model is not to be had
        raise QtoolError(
            f"model: {options.path} is no local folder and is not in the cache, and the hub cannot be reached or does not "
            f"have it ({type(error).__name__}); use demo, a local folder, or download it once with network"
        ) from error
