"""scripts/plant_outliers.py: what it writes computes the same, and has the outliers that were asked for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.model.handle import ModelHandle
from qtool.model.linear import is_linear, weight_of
from qtool.options import ModelOptions

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "plant_outliers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plant_outliers", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plant(script: ModuleType, folder: Path, out: Path, *arguments: str) -> int:
    text = ("--samples", "2", "--length", "24", "--model", str(folder), "--out", str(out))
    return int(script.main([*arguments, *text]))


def first_weights(folder: Path, *names: str) -> list[torch.Tensor]:
    block = ModelHandle(ModelOptions(path=str(folder), dtype="float32")).block(0)
    found = [block.get(f"{block.name}.{name}") for name in names]
    return [weight_of(layer) if is_linear(layer) else layer.get_parameter("weight").detach() for layer in found]


@pytest.mark.parametrize(
    ("kind", "more", "less", "n_places"),
    [("gains", "input_layernorm", "self_attn.q_proj", 3), ("hidden", "mlp.up_proj", "mlp.down_proj", 3)],
)
def test_channels_grow_by_the_strength_and_what_reads_them_shrinks(
    kind: str, more: str, less: str, n_places: int, script: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama", dtype="bfloat16")
    assert plant(script, folder, tmp_path / "out", "--kind", kind, "--strength", "64", "--channels", "3") == 0
    (source, consumer), (new_source, new_consumer) = (first_weights(path, more, less) for path in (folder, tmp_path / "out"))
    grown = new_source / source
    grown = grown if grown.ndim == 1 else grown[:, 0]
    assert sorted(grown.tolist())[-4:] == [1.0] + [64.0] * n_places  # a power of two changes exponents alone
    assert torch.equal(new_consumer * grown, consumer)


def test_a_turned_stream_has_its_energy_in_the_first_channels(
    script: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_model("llama")
    tensors = load_file(folder / "model.safetensors")
    E = tensors["model.embed_tokens.weight"]  # [vocab, hidden]
    tensors["model.embed_tokens.weight"] = E + 0.3 * torch.randn(len(E), 1, generator=torch.Generator().manual_seed(0))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert plant(script, folder, tmp_path / "out", "--kind", "residual") == 0
    assert "relative change of the logits" in capsys.readouterr().out
    tokens = torch.randint(2, 4096, (2, 24), generator=torch.Generator().manual_seed(0))
    models = [ModelHandle(ModelOptions(path=str(path), dtype="float32")) for path in (folder, tmp_path / "out")]
    before, after = (model.embed(tokens).square().mean((0, 1)) for model in models)  # [hidden]
    # One direction, the same part of every channel, has 0.09 · 64 of 0.1 · 64 in the mean square.
    assert float(before.max() / before.sum()) < 0.1 and float(after[0] / after.sum()) > 0.8
    (gain,) = first_weights(tmp_path / "out", "input_layernorm")
    assert torch.equal(gain, torch.ones_like(gain))


def test_what_cannot_be_planted_is_refused_and_leaves_nothing(
    script: ModuleType, tiny_model: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama, out = tiny_model("llama"), tmp_path / "out"
    cases = [
        (llama, ["--kind", "residual", "--strength", "8"], "leave both away"),
        (llama, ["--kind", "gains", "--channels", "65"], "has 64; write fewer"),
        (tiny_model("opt", tie_word_embeddings=False), ["--kind", "residual"], "RMSNorm"),
        (tiny_model("gpt2"), ["--kind", "residual"], "head and embedding are one tensor"),
    ]
    for folder, arguments, words in cases:
        assert plant(script, folder, out, *arguments) == 2
        assert words in capsys.readouterr().err
        assert not out.exists()
