"""What the tests of exports share: writing and reading one, logits in memory and by plain transformers, tiny mixtures."""

import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from qtool.artifact import Artifact
from qtool.calibration.tokens import ASSETS
from qtool.errors import QtoolError
from qtool.formats.inputs import InputScales
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.store import INPUTS, load_changes, save_changes
from qtool.options import ModelOptions

SIZES = {
    "vocab_size": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}
# Family: how it counts four experts, and sizes of its own. Granite's checkpoints keep experts fused.
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 64},
    "granitemoe": {"num_local_experts": 4},
}


@pytest.fixture
def config_of() -> Callable[[Path], dict[str, Any]]:
    """`config_of(folder)`: the quantization_config of its config.json."""

    def read(folder: Path) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
        return config

    return read


@pytest.fixture
def read() -> Callable[[Path], ModelHandle]:
    """`read(folder)`: the model of an export."""
    return lambda folder: ModelHandle(ModelOptions(path=str(folder)))


@pytest.fixture
def parts_of() -> Callable[[Path, str], dict[str, torch.Tensor]]:
    """`parts_of(folder, "model.layers.1.mlp.up_proj")`: what the file holds of a linear, by the rest of its names."""

    def collect(folder: Path, name: str) -> dict[str, torch.Tensor]:
        tensors = load_file(folder / "model.safetensors")
        return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}

    return collect


@pytest.fixture
def reload(windows: torch.Tensor) -> Callable[[Path], torch.Tensor]:
    """`reload(folder)`: logits by plain transformers, every key of the file and of the model accounted for."""

    def run(folder: Path) -> torch.Tensor:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert {kind: keys for kind, keys in info.items() if keys} == {}
        with torch.no_grad():
            return model.eval()(windows).logits

    return run


@pytest.fixture
def static() -> Callable[[ModelHandle], ModelHandle]:
    """`static(model)`: the same with static scales for all inputs that it rounds, some of which they clip."""

    def give(model: ModelHandle) -> ModelHandle:
        for path in model.changes[-1].glob("*.safetensors"):
            changes = load_changes(path)
            for number, (name, value) in enumerate(list(changes.items())):
                if not isinstance(value, tuple) or (rounding := value[1].activations) is None:
                    continue
                scheme = rounding.model_copy(update={"static": True})
                scale = torch.tensor([(2.0 + number) / scheme.grid.largest], dtype=model.dtype)
                if scheme.scale_dtype == "float8_e4m3fn":
                    scale = 1 / torch.tensor([500.0 + number])
                zero = None if scheme.symmetric else torch.tensor([scheme.grid.high // 3], dtype=torch.uint8)
                after = value[1].model_copy(update={"activations": scheme})
                changes |= {name: (value[0], after)}
                changes |= {f"{name.removesuffix('.weight')}{INPUTS}": InputScales(scheme, scale, zero)}
            save_changes(path, changes)
        return ModelHandle(model.options, model.changes)

    return give


@pytest.fixture
def full_disk() -> Callable[[], AbstractContextManager[None]]:
    """`with full_disk():` writing past 100,000 bytes of a file fails."""

    @contextmanager
    def limit() -> Iterator[None]:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limit


@pytest.fixture
def same_codes() -> Callable[[ModelHandle, ModelHandle], None]:
    """`same_codes(read, model)`: both hold the same codes, scales (in any dtype) and zero points for the same linears."""

    def check(read: ModelHandle, model: ModelHandle) -> None:
        with read.materialized() as theirs, model.materialized() as ours:
            layers = {name: module.qt for name, module in ours.named_modules() if isinstance(module, QuantLinear)}
            found = {name: module.qt for name, module in theirs.named_modules() if isinstance(module, QuantLinear)}
        assert layers and found.keys() == layers.keys()
        for name, expected in layers.items():
            assert torch.equal(found[name].codes, expected.codes) and found[name].codes.dtype == expected.codes.dtype, name
            assert torch.equal(found[name].scale.float(), expected.scale.float()), name
            assert (found[name].zero is None) == (expected.zero is None), name
            assert expected.zero is None or torch.equal(found[name].zero, expected.zero), name
            assert found[name].of_tensor == expected.of_tensor, name
        words = [{name: str(scheme) for name, scheme in handle.schemes().items()} for handle in (read, model)]
        assert words[0] == words[1]

    return check


@pytest.fixture
def comes_back(
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
    export: Callable[..., Artifact],
    tmp_path: Path,
    same_codes: Callable[[ModelHandle, ModelHandle], None],
    logits_of: Callable[[ModelHandle], torch.Tensor],
) -> Callable[..., None]:
    """`comes_back("gptq", "llama", "w4a16g32", "bfloat16")`: the export says that it is lossless, and qtool reads the same."""

    def check(name: str, family: str, scheme: object, dtype: str = "float32") -> None:
        model = quantized(tiny_model(family, dtype=dtype), scheme)
        assert export(name, model).lossless
        found = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
        same_codes(found, model)
        assert torch.equal(logits_of(found), logits_of(model))

    return check


@pytest.fixture
def refused(
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
    export: Callable[..., Artifact],
    tmp_path: Path,
) -> Callable[[str, str, object, str], None]:
    """`refused("gptq", "gpt2", "w4a16g32", "Conv1D cannot be held")`: in these words, before anything is written."""

    def check(name: str, family: str, scheme: object, message: str) -> None:
        with pytest.raises(QtoolError, match=message):
            export(name, quantized(tiny_model(family), scheme))
        assert list((tmp_path / "out").iterdir()) == []

    return check


@pytest.fixture
def tiny_mixture(tmp_path: Path) -> Callable[..., Path]:
    """`tiny_mixture("qwen2_moe", dtype="bfloat16")`: a random checkpoint with four experts, of which a token sees two."""

    def build(family: str, *, dtype: str = "float32") -> Path:
        folder = tmp_path / f"tiny-{family}"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **MIXTURES[family]))
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(ASSETS / "demo" / "model" / file, folder / file)
        return folder

    return build
