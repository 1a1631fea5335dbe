"""qtool.load: a folder that qtool reads as a transformers model that computes and writes the same as the one measured."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import qtool
from qtool import registry
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle

Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
TOKENS = torch.randint(2, 4096, (2, 12), generator=torch.Generator().manual_seed(0))  # [samples, length]


def export(name: str, model: ModelHandle, out: Path) -> Path:
    method = registry.load(f"export/{name}")
    out.mkdir()
    method.export(model, out, method.options())
    return out


def greedy(model: PreTrainedModel, count: int) -> Tensor:
    """TOKENS continued [samples, length + count], all computed anew for each token."""
    written = TOKENS
    for _ in range(count):
        written = torch.cat([written, model(written, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return written


@torch.no_grad()
def assert_computes_as(found: PreTrainedModel, model: ModelHandle) -> None:
    """Logits to the bit, greedy tokens with the cache; nothing on the meta device."""
    assert not any(tensor.is_meta for tensor in (*found.parameters(), *found.buffers()))
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    with model.materialized() as expected:
        assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)
        tokens = greedy(expected, 4)
    end = found.generation_config.eos_token_id
    assert end not in tokens, "the test's own tokens end early"
    assert torch.equal(found.generate(TOKENS, max_new_tokens=4, do_sample=False, use_cache=True), tokens)


def test_a_model_with_every_feature_computes_and_writes_the_same(featured: ModelHandle, tmp_path: Path) -> None:
    model = qtool.load(export("qtool", featured, tmp_path / "out"), device="cpu")
    layers = [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]
    assert sorted(layers) == sorted(featured.schemes())
    assert model.dtype == torch.bfloat16
    assert_computes_as(model, featured)


@pytest.mark.parametrize("name", ["gptq", "safetensors"])
def test_other_formats_and_dense_ones_are_loaded_too(
    name: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "w4a16g32")
    found = qtool.load(str(export(name, model, tmp_path / "out")), device="cpu")
    assert found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert_computes_as(found, model)


@pytest.mark.parametrize("family", ["mixtral", "gemma3"])
def test_other_families(family: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path) -> None:
    model = quantized(tiny_model(family), "w8a16")
    assert_computes_as(qtool.load(export("qtool", model, tmp_path / "out"), device="cpu"), model)


def test_the_fast_runtime_writes_what_the_reference_does_and_says_what_it_could_not_do(
    tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16", num_key_value_heads=4), {"*_proj": "w4a16g32", "lm_head": "nf4g64"})
    folder = export("qtool", model, tmp_path / "out")
    with pytest.warns(UserWarning, match="14 of 15 linears: torch int4\n1 of 15 linears decode at each call, lm_head first"):
        found = qtool.load(folder, device="cpu", runtime="fast")
    expected = qtool.load(folder, device="cpu")
    with torch.no_grad():
        logits, exact = found(TOKENS).logits.float(), expected(TOKENS).logits.float()
    assert (logits - exact).norm() <= 2**-6 * exact.norm()  # two blocks in bfloat16, rounded at 2^-9 in another order
    assert found.generate(TOKENS, max_new_tokens=4, do_sample=False).shape == (2, 16)


def test_a_fast_runtime_of_a_dense_model_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match="no linear has a fast product"):
        qtool.load(tiny_model("llama", dtype="bfloat16"), device="cpu", runtime="fast")


def test_config_and_generation_config_are_the_folders(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "eos_token_id": [1, 7]}))
    model = qtool.load(folder, device="cpu")
    assert model.config.hidden_size == 64 and model.generation_config.eos_token_id == [1, 7]
    assert model.generate(TOKENS).shape[1] <= 15


@pytest.mark.parametrize(
    ("path", "device", "message"),
    [
        ("./none", "cpu", "the folder ./none does not exist"),
        ("demo", "gpu", 'device: "gpu" is no device; valid: auto, cpu'),
    ],
)
def test_what_cannot_be_loaded_is_refused(path: str, device: str, message: str) -> None:
    with pytest.raises(QtoolError, match=message):
        qtool.load(path, device)


def test_a_missing_shard_is_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(QtoolError, match="holds no weights"):
        qtool.load(folder)


def test_importing_qtool_imports_no_library() -> None:
    code = "import sys, qtool; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
