"""The AWQ export: qtool's reader gives back every code, the config says what lies in the file, misfits are refused first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.awq import METHOD, AwqOptions
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
ConfigOf = Callable[[Path], dict[str, Any]]
Read = Callable[[Path], ModelHandle]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a16g16", "w4a16", "w4a16g32-asym", "w4a16-asym"])
def test_every_code_comes_back(
    export: Export,
    scheme: str,
    dtype: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), scheme)
    assert export("awq", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_file_holds_four_tensors_a_linear_in_the_shapes_of_the_layout(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("awq", quantized(tiny_model("qwen2", dtype="bfloat16"), "w4a16g32"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        name = "model.layers.1.self_attn.k_proj"  # [32, 64], with a bias
        parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(name)}
    assert {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items()} == {
        "qweight": ("torch.int32", (64, 4)),
        "qzeros": ("torch.int32", (2, 4)),
        "scales": ("torch.float16", (2, 32)),
        "bias": ("torch.bfloat16", (32,)),
    }


def test_the_config_says_what_the_file_holds(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf
) -> None:
    export("awq", quantized(tiny_model("llama"), "w4a16-asym"))
    assert config_of(tmp_path / "out") == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": ["lm_head"],
    }


def test_symmetric_and_asymmetric_and_dense_linears_go_together(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    config_of: ConfigOf,
    read: Read,
) -> None:
    schemes = {"layers.0.self_attn.*": "w4a16g32-asym", "mlp.*": "w4a16g32"}
    model = quantized(tiny_model("llama"), schemes)
    export("awq", model)
    dense = [f"model.layers.1.self_attn.{side}_proj" for side in "qkvo"]
    config = config_of(tmp_path / "out")
    assert config["modules_to_not_convert"] == [*dense, "lm_head"]
    assert config["dynamic"] == {rf"-:^model\.layers\.1\.self_attn\.{side}_proj$": {} for side in "qkvo"}
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox", "falcon"])
def test_other_families_come_back_too(
    export: Export, family: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, same_codes: SameCodes, read: Read
) -> None:
    model = quantized(tiny_model(family), "w4a16g32-asym")
    assert export("awq", model).lossless
    same_codes(read(tmp_path / "out"), model)


def test_tied_embeddings_are_written_once_and_dense(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, read: Read
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "w4a16g32")
    export("awq", model)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if key.startswith("lm_head")]
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_smallest_matrices_that_kernels_take_come_back(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, same_codes: SameCodes, read: Read
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = quantized(tiny_model("llama", **sizes), "w4a16g16")
    export("awq", model)
    same_codes(read(tmp_path / "out"), model)


def test_scales_that_float16_loses_are_reported(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    wide = {"weights": {"bits": 4, "group": 32, "scale_dtype": "float32"}}
    assert not export("awq", quantized(tiny_model("llama"), wide)).lossless


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", {}, "export/awq: no linear is quantized; put a quantize step before it"),
        ("llama", "w8a16g32", r"q_proj: w8a16g32: kernels take 4 bits; quantize so, or use export/compressed_tensors"),
        ("llama", "w3a16g32", "kernels take 4 bits"),
        ("llama", "w4a8g32", "this export holds weights alone; quantize to w4g32, or"),
        ("llama", "w4a16g32-asymf16", "zero points must be codes"),
        ("llama", "nf4g32", "this export holds whole numbers"),
        (
            "llama",
            {"mlp.*": "w4a16g64", "*": "w4a16g32"},
            r"q_proj is w4a16g32, .*gate_proj is w4a16g64, but .* one group size",
        ),
        ("llama", {"lm_head": "w4a16g32"}, "lm_head: w4a16g32: runtimes take a dense head alone; add it to ignore"),
        ("llama", {"q_proj": "w4a16g32"}, r"q_proj w4a16g32, k_proj dense, v_proj dense; runtimes join them as qkv_proj"),
        ("gpt2", "w4a16g32", r"c_attn: Conv1D cannot be held"),
        ("mixtral", "w4a16g32", r"a mixture's experts cannot be held; use export/compressed_tensors"),
    ],
)
def test_what_format_or_kernels_cannot_hold_is_refused_before_anything_is_written(
    export: Export, family: str, scheme: object, message: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model(family), scheme)
    with pytest.raises(QtoolError, match=message):
        export("awq", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_misfits_are_refused_by_the_plan_alone(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama", num_key_value_heads=1))))
    planned = dict.fromkeys(model.linear_names()[:-1], Scheme.model_validate("w4a16g16"))
    assert METHOD.holds is not None and METHOD.check is not None
    METHOD.check(model, AwqOptions())
    with pytest.raises(QtoolError, match=r"k_proj: 16 outputs are no multiple of 32"):
        METHOD.holds(model, planned, AwqOptions())


def test_a_scale_beyond_float16_names_its_linear(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    folder, name = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"] *= 1e7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QtoolError, match=rf"export/awq: {name}: a scale of .* is beyond float16"):
        export("awq", quantized(folder, "w4a16g32"))
