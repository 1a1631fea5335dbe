"""The bitsandbytes export: qtool's reader gives back every code, the config says what lies in the file, misfits are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.bitsandbytes import METHOD, BitsandbytesOptions
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
ConfigOf = Callable[[Path], dict[str, Any]]
Read = Callable[[Path], ModelHandle]
SCHEMES = ("nf4g64", "nf4g32", "fp4_bnbg64", "nf4g32-dq", "fp4_bnbg64-dq", "w8a16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
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
    assert export("bitsandbytes", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (
            "nf4g32",
            {
                "weight": ("torch.uint8", (1024, 1)),
                "weight.absmax": ("torch.float32", (64,)),
                "weight.quant_map": ("torch.float32", (16,)),
                "weight.quant_state.bitsandbytes__nf4": ("torch.uint8", (78,)),
            },
        ),
        (
            "fp4_bnbg32-dq",
            {
                "weight": ("torch.uint8", (1024, 1)),
                "weight.absmax": ("torch.uint8", (64,)),
                "weight.nested_absmax": ("torch.float32", (1,)),
                "weight.nested_quant_map": ("torch.float32", (256,)),
                "weight.quant_map": ("torch.float32", (16,)),
                "weight.quant_state.bitsandbytes__fp4": ("torch.uint8", None),  # its length is that of a number's digits
            },
        ),
        (
            "w8a16",
            {"weight": ("torch.int8", (32, 64)), "SCB": ("torch.float32", (32,)), "weight_format": ("torch.uint8", ())},
        ),
    ],
)
def test_the_file_holds_a_linear_under_the_names_of_the_layout(
    export: Export, scheme: str, expected: dict[str, Any], tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("bitsandbytes", quantized(tiny_model("qwen2", dtype="bfloat16"), scheme))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        name = "model.layers.1.self_attn.k_proj"  # [32, 64], with a bias
        parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(name)}
    found = {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items()}
    wanted = {key: (dtype, found[key][1] if shape is None else shape) for key, (dtype, shape) in expected.items()}
    assert found == wanted | {"bias": ("torch.bfloat16", (32,))}


def test_the_config_says_what_the_file_holds(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf
) -> None:
    export("bitsandbytes", quantized(tiny_model("llama", dtype="bfloat16"), "nf4g64-dq"), out="four")
    assert config_of(tmp_path / "four") == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "llm_int8_skip_modules": ["lm_head"],
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
    }
    export("bitsandbytes", quantized(tiny_model("llama", name="other"), "w8a16"), out="eight")
    assert config_of(tmp_path / "eight") == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False,
    }


def test_formats_and_dense_linears_go_together(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama"), {"layers.0.self_attn.*": "fp4_bnbg64", "mlp.*": "nf4g32-dq"})
    assert export("bitsandbytes", model).lossless
    config = config_of(tmp_path / "out")
    assert config["llm_int8_skip_modules"] == [*(f"model.layers.1.self_attn.{side}_proj" for side in "qkvo"), "lm_head"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]  # what most linears have
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("scheme", ["nf4g64-dq", "w8a16"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox", "gpt2"])
def test_other_families_come_back_too(
    export: Export,
    family: str,
    scheme: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    read: Read,
) -> None:
    model = quantized(tiny_model(family), scheme)
    assert export("bitsandbytes", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_quantized_head_is_not_skipped(
    export: Export,
    family: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model(family, tie_word_embeddings=False), {"lm_head": "fp4_bnbg32", "*": "nf4g64"})
    assert export("bitsandbytes", model).lossless
    assert config_of(tmp_path / "out")["llm_int8_skip_modules"] == []  # null would mean the head
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_tied_embeddings_are_written_once_and_dense(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "nf4g64")
    export("bitsandbytes", model)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not [key for key in tensors if key.startswith("lm_head")]
    assert config_of(tmp_path / "out")["llm_int8_skip_modules"] == ["lm_head"]
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_row_scales_that_lose_a_bit_by_127_are_reported(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    wide = {"weights": {"bits": 8, "scale_dtype": "float32"}}
    assert not export("bitsandbytes", quantized(tiny_model("llama"), wide)).lossless
    assert export("bitsandbytes", quantized(tiny_model("llama", name="again"), "w8a16"), out="again-out").lossless


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", {}, "export/bitsandbytes: no linear is quantized; put a quantize step before it"),
        ("llama", "w4a16g64", r"q_proj: w4a16g64: bitsandbytes has nf4, fp4_bnb and int of 8 bits; quantize so"),
        ("llama", "nvfp4", "bitsandbytes has nf4, fp4_bnb and int of 8 bits"),
        ("llama", "w8a8", r"q_proj: w8a8: this export holds weights alone; quantize to w8, or by quantize/llm_int8"),
        ("llama", {"weights": {"format": "nf4", "group": 64}, "kv": {"bits": 8}}, "weights alone; quantize to nf4g64"),
        ("llama", "w8a16g64", r"its 8 bits have one plain scale for each row; quantize to w8a16, or use export/gptq"),
        ("llama", "w8a16-dq", r"its 8 bits have one plain scale for each row"),
        ("llama", "w8a16-asym", r"no zero points, and groups along `in` alone; quantize without -asym, or"),
        ("llama", "nf4g64-asymf16", r"quantize without -asymf16, or use export/safetensors"),
        ("llama", "nf4g32-ic", r"quantize without -ic, or use export/safetensors"),
        ("llama", "nf4", r"q_proj: nf4: its blocks are of 32, 64, .*, 4096; quantize so, such as nf4g64, or use"),
        ("llama", "nf4g16", r"q_proj: nf4g16: its blocks are of 32, 64,"),
        ("llama", {"mlp.*": "w8a16", "*": "nf4g64"}, r"q_proj is nf4g64, .*gate_proj is w8a16, but a model is loaded in four"),
        ("falcon", "nf4g64", r"transformers puts bitsandbytes' linears in place of nn.Linear, not of FalconLinear; use"),
        ("mixtral", "nf4g64", "a mixture's experts cannot be held"),
    ],
)
def test_what_bitsandbytes_cannot_hold_is_refused_before_anything_is_written(
    export: Export, family: str, scheme: object, message: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model(family), scheme)
    with pytest.raises(QtoolError, match=message):
        export("bitsandbytes", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_misfits_are_refused_by_the_plan_alone(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    planned = dict.fromkeys(model.linear_names()[:-1], Scheme.model_validate("nf4g16"))
    assert METHOD.holds is not None and METHOD.check is not None
    METHOD.check(model, BitsandbytesOptions())
    with pytest.raises(QtoolError, match="its blocks are of 32, 64"):
        METHOD.holds(model, planned, BitsandbytesOptions())


def test_a_mixture_is_refused_before_any_step(tiny_model: TinyModel) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="a mixture's experts cannot be held"):
        METHOD.check(ModelHandle(ModelOptions(path=str(tiny_model("mixtral")))), BitsandbytesOptions())
