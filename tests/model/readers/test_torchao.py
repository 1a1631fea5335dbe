"""The reader of torchao checkpoints: takes what others write, refuses what it cannot decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

NAME = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], object]
Export = Callable[[str], Path]
ChangeFile = Callable[[Path, Change], ModelHandle]


def change_config(folder: Path, change: Change) -> ModelHandle:
    """The model after a change of what quant_type has under default."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"]["quant_type"]["default"])
    (folder / "config.json").write_text(json.dumps(config))
    return ModelHandle(ModelOptions(path=str(folder)))


def test_weights_made_number_by_number_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    codes = torch.randint(-128, 128, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()  # [out, in]

    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{NAME}._weight_qdata"] = torch.tensor(codes, dtype=torch.int8)
        tensors[f"{NAME}._weight_scale"] = torch.tensor([[0.5, 2.0]] * 64, dtype=torch.bfloat16)
        del tensors[f"{NAME}._weight_zero_point"]

    layer = change_tensors(exported("torchao", "w8a16g32"), change).block(0).get(NAME)
    assert isinstance(layer, QuantLinear) and str(layer.scheme) == "w8g32"
    W = [[codes[o][i] * (0.5 if i < 32 else 2.0) for i in range(64)] for o in range(64)]  # powers of two: exact
    assert layer.weight_values(torch.float32).tolist() == W


def test_a_granularity_that_is_left_out_is_a_row(exported: Export) -> None:
    model = change_config(exported("torchao", "w8a16"), lambda default: default["_data"].pop("granularity"))
    assert {str(scheme) for scheme in model.schemes().values()} == {"w8a16"}


@pytest.mark.parametrize(
    ("scheme", "change", "message"),
    [
        (
            "w8a16",
            lambda d: d.update(_type="Int4WeightOnlyConfig"),
            "torchao's Int4WeightOnlyConfig cannot be read, Int8Weight",
        ),
        ("w8a16", lambda d: d.clear(), "torchao's None cannot be read"),
        (
            "w8a16",
            lambda d: d["_data"]["granularity"].update(_type="PerTensor"),
            "Int8WeightOnlyConfig PerTensor cannot be read",
        ),
        (
            "w8a8",
            lambda d: d["_data"]["granularity"].update(_type="PerGroup", _data={"group_size": 32}),
            "WeightConfig PerGroup cannot be read, PerRow can, and PerGroup for weights alone",
        ),
        (
            "w8a8",
            lambda d: d["_data"]["act_mapping_type"].update(_data="ASYMMETRIC"),
            "ASYMMETRIC activations .* cannot be read",
        ),
        (
            "w8a16g32",
            lambda d: d["_data"]["granularity"].update(_data={"group_size": 64}),
            r"q_proj: scales \[64, 2\] must be \[64, 1\] for w8a16g64; config.json does not describe this file",
        ),
    ],
)
def test_a_config_that_cannot_be_decoded_is_refused(scheme: str, change: Change, message: str, exported: Export) -> None:
    model = change_config(exported("torchao", scheme), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}._weight_qdata"), r"q_proj: _weight_qdata is missing, must be torch.int8 \[out, in\]"),
        (lambda t: t.update({f"{NAME}._weight_qdata": torch.ones(64, 64)}), r"_weight_qdata is torch.float32 \[64, 64\]"),
        (
            lambda t: t.update({f"{NAME}._weight_scale": torch.ones(1, 1)}),
            r"q_proj: scales \[1, 1\] must be \[64, 1\] for w8a16",
        ),
        (lambda t: t.update({f"{NAME}._weight_scale": torch.ones(64, 1).double()}), "scales of torch.float64 cannot be read"),
        (lambda t: t[f"{NAME}._weight_zero_point"].fill_(3), "q_proj: zero points other than 0 cannot be read"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    change: Change, message: str, exported: Export, change_tensors: ChangeFile
) -> None:
    model = change_tensors(exported("torchao", "w8a16"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)
