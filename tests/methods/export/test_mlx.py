"""The MLX export: qtool's reader gives back every code, the config says what lies in the file, misfits are refused first."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.export.mlx import METHOD, MlxOptions
from qtool.model.handle import ModelHandle

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
Read = Callable[[Path], ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("w4a16g32", "bfloat16"),
        ("w6a16g64", "bfloat16"),
        ("w3a16g64-asym", "float32"),
        ("w5a16g32-asymf16", "float32"),
        ("mxfp4", "bfloat16"),
        ("mxfp8_e4m3", "bfloat16"),
    ],
)
def test_every_code_comes_back(scheme: str, dtype: str, comes_back: Callable[..., None]) -> None:
    comes_back("mlx", "llama", scheme, dtype)


@pytest.mark.parametrize("scheme", ["w2a16g32-asym", "w4a16g32-asymf16"])
def test_zero_points_in_16_bits_lose_a_little_and_in_float32_nothing(
    scheme: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    export: Export,
    tmp_path: Path,
    read: Read,
    same_codes: SameCodes,
    logits_of: LogitsOf,
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    assert not export("mlx", model).lossless
    name, found = "model.layers.0.mlp.up_proj", read(tmp_path / "out")
    with found.materialized() as theirs, model.materialized() as ours:
        layers = [module.get_submodule(name) for module in (theirs, ours)]
    assert all(isinstance(layer, QuantLinear) for layer in layers)
    assert torch.equal(layers[0].qt.codes, layers[1].qt.codes)
    error = float((logits_of(found) - logits_of(model)).norm() / logits_of(model).norm())
    assert 0 < error < 2e-2  # the rounding of 16 bits
    (tmp_path / "out").rename(tmp_path / "in 16 bits")
    assert export("mlx", model, dtype="float32").lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_file_holds_words_scales_and_biases(
    tiny_model: TinyModel,
    quantized: Quantized,
    export: Export,
    tmp_path: Path,
    parts_of: Callable[[Path, str], dict[str, torch.Tensor]],
) -> None:
    export("mlx", quantized(tiny_model("qwen2", dtype="bfloat16"), "w3a16g32"))
    parts = parts_of(tmp_path / "out", "model.layers.1.self_attn.k_proj")  # [32, 64], with a bias
    assert {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items()} == {
        "weight": ("torch.uint32", (32, 6)),
        "scales": ("torch.bfloat16", (32, 2)),
        "biases": ("torch.bfloat16", (32, 2)),
        "bias": ("torch.bfloat16", (32,)),
    }


def test_the_config_says_what_most_linears_have_and_what_others_have(
    tiny_model: TinyModel,
    quantized: Quantized,
    export: Export,
    tmp_path: Path,
    read: Read,
    config_of: Callable[[Path], dict[str, Any]],
    same_codes: SameCodes,
) -> None:
    schemes = {"layers.0.self_attn.q_proj": "w8a16g64", "layers.0.*": "w4a16g32", "down_proj": "mxfp4", "lm_head": "w6a16g32"}
    model = quantized(tiny_model("llama"), schemes)
    export("mlx", model)
    config = config_of(tmp_path / "out")
    assert config == {
        "group_size": 32,
        "bits": 4,
        "mode": "affine",
        "model.layers.0.self_attn.q_proj": {"group_size": 64, "bits": 8, "mode": "affine"},
        "model.layers.1.mlp.down_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "lm_head": {"group_size": 32, "bits": 6, "mode": "affine"},
    }
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    assert whole["quantization"] == config and whole["tie_word_embeddings"] is False
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, {"rope_type": "linear", "factor": 2.0}])
def test_what_mlx_lm_has_other_defaults_for_is_said(
    rope: dict[str, object], tiny_model: TinyModel, quantized: Quantized, export: Export, tmp_path: Path, logits_of: LogitsOf,
    read: Read,
) -> None:  # fmt: skip
    folder = tiny_model("llama", rope_parameters={"rope_theta": 5e5, **rope})
    model = quantized(folder, "w4a16g32")
    export("mlx", model)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling") == (None if rope["rope_type"] == "default" else rope)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_other_families_come_back_too(family: str, comes_back: Callable[..., None]) -> None:
    comes_back("mlx", family, "w4a16g32-asym")


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", {}, "export/mlx: no linear is quantized; put a quantize step before it"),
        ("llama", "w7a16g32", "q_proj: w7a16g32: MLX has 1, 2, 3, 4, 5, 6, 8 bits in groups of 32, 64, 128; quantize so"),
        ("llama", "w4a16", "q_proj: w4a16: MLX has 1, 2"),
        ("llama", "w4a16g16", "MLX has 1, 2"),
        ("llama", "w4a8g32", "this export holds weights alone; quantize to w4g32, or"),
        ("llama", "w4a16g32-ic", "this export holds plain scales along `in`"),
        ("llama", "nvfp4", "q_proj: nvfp4: MLX has whole numbers with plain scales, mxfp4 and mxfp8_e4m3; quantize so"),
        ("llama", "nf4g32", "MLX has whole numbers with plain scales"),
        ("gpt2", "w4a16g32", r"c_attn: Conv1D cannot be held"),
        ("mixtral", "w4a16g32", r"a mixture's experts cannot be held; use export/compressed_tensors"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    family: str, scheme: object, message: str, refused: Callable[[str, str, object, str], None]
) -> None:
    refused("mlx", family, scheme, message)


def test_a_tied_head_is_refused(tiny_model: TinyModel, quantized: Quantized) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), {"mlp.*": "w4a16g32"})
    assert METHOD.holds is not None
    schemes = model.schemes()
    METHOD.holds(model, schemes, MlxOptions())
    with pytest.raises(QtoolError, match="export/mlx: lm_head is tied to the embedding, which stays dense"):
        METHOD.holds(model, schemes | {"lm_head": next(iter(schemes.values()))}, MlxOptions())


def test_a_scale_beyond_float16_names_its_linear(tiny_model: TinyModel, quantized: Quantized, export: Export) -> None:
    folder, name = tiny_model("llama", dtype="float16"), "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"][0, 0] = 6e4  # of one sign: its zero point reaches 6e4, its scale times 2^b more
    tensors[f"{name}.weight"][0, 1:32] = -6e4
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QtoolError, match=rf"export/mlx: {name}: a scale of .* is beyond torch.float16; use dtype: float32"):
        export("mlx", quantized(folder, "w2a16g32"))
