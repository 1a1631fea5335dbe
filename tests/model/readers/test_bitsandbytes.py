"""The reader of bitsandbytes checkpoints: takes what others write, refuses what it cannot decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

NAME = "model.layers.0.self_attn.q_proj"
STATE = f"{NAME}.weight.quant_state.bitsandbytes__nf4"
Change = Callable[[dict[str, Any]], object]
Export = Callable[[str], Path]
ChangeFile = Callable[[Path, Change], ModelHandle]


def change_state(tensors: dict[str, Any], **fields: object) -> None:
    state = json.loads(bytes(tensors[STATE].tolist())) | fields
    tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def layers(model: ModelHandle) -> dict[str, torch.Tensor]:
    return {name: weight_of(layer) for block in model.blocks() for name, layer in block.linears().items()}


def test_weights_made_number_by_number_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    levels = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635)
    codes = torch.randint(0, 5, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()  # [out, in]

    def change(tensors: dict[str, Any]) -> None:
        flat = [code for row in codes for code in row]
        bytes_ = [flat[place] * 16 + flat[place + 1] for place in range(0, len(flat), 2)]
        tensors[f"{NAME}.weight"] = torch.tensor(bytes_, dtype=torch.uint8).view(-1, 1)
        tensors[f"{NAME}.weight.absmax"] = torch.tensor([0.5, 2.0] * 64)  # two blocks of 32 in a row

    layer = change_tensors(exported("bitsandbytes", "nf4g32"), change).block(0).get(NAME)
    assert isinstance(layer, QuantLinear) and str(layer.scheme) == "nf4g32"
    W = [[levels[codes[o][i]] * (0.5 if i < 32 else 2.0) for i in range(64)] for o in range(64)]  # powers of two: exact
    assert layer.weight_values(torch.float32).tolist() == W


def test_scales_quantized_by_the_table_of_bitsandbytes_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    folder = exported("bitsandbytes", "nf4g32-dq")
    table = torch.linspace(-1, 1, 256).pow(3)
    c = torch.randint(0, 256, (128,), generator=torch.Generator().manual_seed(0))

    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{NAME}.weight.absmax"] = c.to(torch.uint8)
        tensors[f"{NAME}.weight.nested_quant_map"] = table
        tensors[f"{NAME}.weight.nested_absmax"] = torch.tensor([0.25])
        change_state(tensors, nested_offset=1.5)

    model = change_tensors(folder, change)
    layer = model.block(0).get(NAME)
    assert isinstance(layer, QuantLinear)
    assert torch.equal(layer.qt.scale.flatten(), table[c] * 0.25 + 1.5)
    schemes = model.schemes()
    assert str(schemes[NAME]) == "nf4g32" and str(schemes["model.layers.0.self_attn.k_proj"]) == "nf4g32-dq"


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("bnb_4bit_quant_storage"),
        lambda config: config.update(llm_int8_skip_modules=None, bnb_4bit_compute_dtype="float32"),
        lambda config: config.update(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True),  # the tensors know better
        lambda config: config.update(_load_in_4bit=True, _load_in_8bit=False, llm_int8_threshold=6.0),
    ],
)
def test_configs_as_others_write_them_are_read(change: Change, exported: Export, change_config: ChangeFile) -> None:
    folder = exported("bitsandbytes", "nf4g32")
    expected = layers(ModelHandle(ModelOptions(path=str(folder))))
    found = layers(change_config(folder, change))
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)


def test_rows_without_a_format_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    model = change_tensors(
        exported("bitsandbytes", "w8a16"), lambda t: [t.pop(name) for name in [*t] if name.endswith("weight_format")]
    )
    assert isinstance(model.block(0).get(NAME), QuantLinear)


def test_codes_that_are_not_kept_in_bytes_are_refused(exported: Export, change_config: ChangeFile) -> None:
    model = change_config(exported("bitsandbytes", "nf4g32"), lambda config: config.update(bnb_4bit_quant_storage="bfloat16"))
    with pytest.raises(QtoolError, match=r"codes kept as bfloat16 \(bnb_4bit_quant_storage\) cannot be read, uint8 can"):
        model.block(0)


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        ("nf4g32", lambda t: t.pop(f"{NAME}.weight"), "q_proj: weight is missing, must be 2048 numbers of torch.uint8"),
        ("nf4g32", lambda t: t.pop(f"{NAME}.weight.absmax"), "q_proj: weight.absmax is missing"),
        ("nf4g32", lambda t: t[f"{NAME}.weight.absmax"].fill_(torch.nan), "absmax holds 128 NaN or infinite values"),
        ("nf4g32", lambda t: change_state(t, shape=[128, 48]), "q_proj: its blocks of 32 run from row to row"),
        ("nf4g32", lambda t: t[STATE].zero_(), "q_proj: weight.quant_state.bitsandbytes__nf4 is no JSON"),
        ("w8a16", lambda t: t.pop(f"{NAME}.weight"), "q_proj: its weight is missing, must be torch.int8"),
        ("w8a16", lambda t: t[f"{NAME}.weight_format"].fill_(1), "q_proj: its weight_format is that of an old kernel"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    scheme: str, change: Change, message: str, exported: Export, change_tensors: ChangeFile
) -> None:
    model = change_tensors(exported("bitsandbytes", scheme), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


def test_experts_in_this_layout_are_refused_by_name(tiny_model: Callable[..., Path], change_tensors: ChangeFile) -> None:
    folder = tiny_model("mixtral")

    def change(tensors: dict[str, Any]) -> None:
        expert = next(name for name in tensors if ".experts.0.w1.weight" in name).removesuffix(".weight")
        tensors[f"{expert}.SCB"] = torch.ones(128)

    change_tensors(folder, change)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="experts can be read from compressed-tensors checkpoints, not from this one"):
        ModelHandle(ModelOptions(path=str(folder))).block(0)


@pytest.mark.parametrize("scheme", ["nf4g32-dq", "w8a16"])
def test_a_dense_export_holds_nothing_of_the_layout(scheme: str, exported: Export, export: Callable[..., Artifact]) -> None:
    model = ModelHandle(ModelOptions(path=str(exported("bitsandbytes", scheme))))
    tensors = load_file(export("safetensors", model).path / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert not [name for name in tensors if name.rsplit(".", 1)[-1] not in ("weight", "bias")]
