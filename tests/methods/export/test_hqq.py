"""The HQQ export: qtool's reader gives back every code, the file holds hqq's state, misfits are refused first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.hqq import METHOD, HqqOptions
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[[str, ModelHandle], Artifact]
Quantized = Callable[..., ModelHandle]
Read = Callable[[Path], ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ("w4a16g32", "bfloat16"),
        ("w4a16-asym", "float32"),
        ("w3a16g32-asymf16", "bfloat16"),
        ("w2a16g16-asym", "float32"),
        ("w1a16g32-asymf16", "bfloat16"),
    ],
)
def test_every_code_comes_back(scheme: str, dtype: str, comes_back: Callable[..., None]) -> None:
    comes_back("hqq", "llama", scheme, dtype)


def test_the_file_holds_the_whole_state_of_hqqs_layer(
    tiny_model: TinyModel,
    quantized: Quantized,
    export: Export,
    tmp_path: Path,
    parts_of: Callable[[Path, str], dict[str, torch.Tensor]],
) -> None:
    export("hqq", quantized(tiny_model("qwen2", dtype="bfloat16"), "w4a16g32-asymf16"))
    parts = parts_of(tmp_path / "out", "model.layers.1.self_attn.k_proj")  # [32, 64], with a bias
    found = {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items() if part.dtype.is_floating_point}
    assert found == {
        "bias": ("torch.bfloat16", (32,)),
        "scale": ("torch.bfloat16", (64, 1)),
        "zero": ("torch.float16", (64, 1)),
    }
    assert (parts["W_q"].dtype, tuple(parts["W_q"].shape)) == (torch.uint8, (32, 32))
    # hqq 0.2.8: HQQLinear(None, None).state_dict_keys()
    keys = "W_q nbits group_size shape scale zero axis packing unpack_view_dtype view_as_float quant_scale quant_zero"
    keys += " compute_dtype bias offload_meta encoded_state_dict stores_quant_config channel_wise optimize round_zero"
    assert set(parts) == set(keys.split())


def test_the_config_says_what_most_linears_have_and_which_are_dense(
    tiny_model: TinyModel,
    quantized: Quantized,
    export: Export,
    tmp_path: Path,
    read: Read,
    config_of: Callable[[Path], dict[str, Any]],
    same_codes: SameCodes,
) -> None:
    model = quantized(tiny_model("llama"), {"layers.0.self_attn.*": "w3a16g16-asym", "mlp.*": "w4a16g32"})
    export("hqq", model)
    assert config_of(tmp_path / "out") == {
        "quant_method": "hqq",
        "quant_config": {
            "weight_quant_params": {
                "nbits": 4,
                "group_size": 32,
                "axis": 1,
                "channel_wise": True,
                "optimize": True,
                "round_zero": True,
                "view_as_float": False,
            },
            "scale_quant_params": None,
            "zero_quant_params": None,
            "offload_meta": False,
        },
        "skip_modules": [*(f"model.layers.1.self_attn.{side}_proj" for side in "qkvo"), "lm_head"],
    }
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("family", ["gemma3", "phi3", "opt"])
def test_other_families_come_back_too(family: str, comes_back: Callable[..., None]) -> None:
    comes_back("hqq", family, "w4a16g32-asymf16")


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", {}, "export/hqq: no linear is quantized; put a quantize step before it"),
        ("llama", "w5a16g32", "q_proj: w5a16g32: hqq packs 1, 2, 3, 4, 8 bits; quantize so"),
        ("llama", "w4a8g32", "this export holds weights alone; quantize to w4g32, or"),
        ("llama", "w4a16g32-dq", "this export holds plain scales along `in`"),
        ("llama", "nf4g32", "hqq has whole numbers with plain scales; use export/safetensors"),
        ("llama", "mxint8", "hqq has whole numbers with plain scales"),
        ("gpt2", "w4a16g32", r"c_attn: Conv1D cannot be held"),
        ("mixtral", "w4a16g32", r"a mixture's experts cannot be held; use export/compressed_tensors"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    family: str, scheme: object, message: str, refused: Callable[[str, str, object, str], None]
) -> None:
    refused("hqq", family, scheme, message)


def test_misfits_are_refused_by_the_plan_alone(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama", intermediate_size=125))))
    assert METHOD.holds is not None and METHOD.check is not None
    METHOD.check(model, HqqOptions())
    with pytest.raises(QtoolError, match=r"gate_proj: w4a16: hqq puts codes of 2 groups into a byte, and 125 groups do not"):
        METHOD.holds(model, dict.fromkeys(model.linear_names(), Scheme.model_validate("w4a16")), HqqOptions())
    METHOD.holds(model, dict.fromkeys(model.linear_names(), Scheme.model_validate("w3a16")), HqqOptions())


def test_a_dense_name_that_begins_a_quantized_one_is_refused(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    mlp = model.model.get_submodule("model.layers.0.mlp")
    mlp.gate = torch.nn.Linear(64, 64)
    assert METHOD.holds is not None
    schemes = {"model.layers.0.mlp.gate_proj": Scheme.model_validate("w4a16g32")}
    with pytest.raises(QtoolError, match=r"model.layers.0.mlp.gate is dense, and transformers leaves dense what has that in"):
        METHOD.holds(model, schemes, HqqOptions())
