"""The dense export: plain transformers reloads it and computes what the compressed model computes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.model.store import save_changes
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
Reload = Callable[[Path], torch.Tensor]


def keys(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return set(file.keys())


def test_plain_transformers_computes_the_same(
    export: Export,
    family: str,
    tiny_model: Callable[..., Path],
    quantized: Quantized,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model(family), "w4a16g32")
    # float32 sums in another order where experts are fused again
    torch.testing.assert_close(reload(export("safetensors", model).path), logits_of(model), rtol=1e-5, atol=1e-5)


def test_names_are_those_of_the_original_checkpoint(
    export: Export, family: str, tiny_model: Callable[..., Path], quantized: Quantized
) -> None:
    folder = tiny_model(family)
    assert keys(export("safetensors", quantized(folder, "w4a16g32")).path) == keys(folder)


@pytest.mark.parametrize("scheme", ["w3a16g32-asym", "w4a16g32-asymf16"])
def test_bfloat16_weights_are_equal_to_the_bit(
    export: Export,
    scheme: str,
    tiny_model: Callable[..., Path],
    quantized: Quantized,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    assert torch.equal(reload(export("safetensors", model).path), logits_of(model))


def test_experts_left_dense_are_written_too(
    export: Export, tiny_model: Callable[..., Path], quantized: Quantized, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("mixtral"), {"self_attn.*": "w4a16g32"})
    # float32 sums in another order: experts fused again
    torch.testing.assert_close(reload(export("safetensors", model).path), logits_of(model), rtol=1e-5, atol=1e-5)


def test_a_tied_head_is_written_once(
    export: Export, tiny_model: Callable[..., Path], quantized: Quantized, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "w4a16g32")
    out = export("safetensors", model).path
    assert "lm_head.weight" not in keys(out)
    assert torch.equal(reload(out), logits_of(model))


def test_a_quantized_head_is_written_dense(
    export: Export, tiny_model: Callable[..., Path], quantized: Quantized, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w4a16g32"})
    assert torch.equal(reload(export("safetensors", model).path), logits_of(model))


def test_zeros_of_sparse_weights_stay(export: Export, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, name = tiny_model("llama"), "model.layers.0.mlp.up_proj.weight"
    sparse = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).relu()
    save_changes(tmp_path / "changes" / "block_000.safetensors", {name: sparse})
    model = ModelHandle(ModelOptions(path=str(folder)), changes=(tmp_path / "changes",))
    with safe_open(export("safetensors", model).path / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(name), sparse)


def test_no_trace_of_qtool_is_left(export: Export, tiny_model: Callable[..., Path], quantized: Quantized) -> None:
    out = export("safetensors", quantized(tiny_model("llama"), "w4a16g32")).path
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert not any(b"qtool" in path.read_bytes() for path in out.iterdir())


def test_the_dtype_that_was_asked_for_is_written(export: Export, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama")), dtype="bfloat16"))
    out = export("safetensors", model).path
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_compressed_export_can_be_made_dense(
    export: Export, tiny_model: Callable[..., Path], quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    packed = export("compressed_tensors", model, out="packed").path
    out = export("safetensors", ModelHandle(ModelOptions(path=str(packed)))).path
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert torch.equal(reload(out), logits_of(model))


def test_quantized_activations_are_refused(
    export: Export, tiny_model: Callable[..., Path], quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama"), "w8a8")
    with pytest.raises(QtoolError, match="q_proj is quantized to w8a8, but a dense checkpoint holds weights alone"):
        export("safetensors", model)
    assert list((tmp_path / "out").iterdir()) == []
