"""The reader of MLX folders: takes what mlx-lm writes, refuses what it cannot decode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle

NAME = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], object]
ChangeFile = Callable[[Path, Change], ModelHandle]
Export = Callable[..., Path]


def test_weights_made_bit_by_bit_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    codes = torch.randint(0, 8, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()  # [out, in]
    biases = [[float(o), -float(o)] for o in range(64)]

    def change(tensors: dict[str, Any]) -> None:
        rows = [sum(code << 3 * i for i, code in enumerate(row)) for row in codes]
        words = [[row >> 32 * place & 0xFFFFFFFF for place in range(6)] for row in rows]
        tensors[f"{NAME}.weight"] = torch.tensor(words, dtype=torch.uint32)
        tensors[f"{NAME}.scales"] = torch.full((64, 2), 0.5, dtype=torch.bfloat16)
        tensors[f"{NAME}.biases"] = torch.tensor(biases, dtype=torch.bfloat16)

    layer = change_tensors(exported("mlx", "w3a16g32"), change).block(0).get(NAME)
    assert isinstance(layer, QuantLinear) and str(layer.scheme) == "w3g32-asymf16"
    W = [[0.5 * codes[o][i] + biases[o][i // 32] for i in range(64)] for o in range(64)]
    assert layer.weight_values(torch.float32).tolist() == W


def test_a_mode_that_is_left_out_is_affine(exported: Export, change_config: ChangeFile) -> None:
    model = change_config(exported("mlx", "w4a16g32"), lambda config: config.pop("mode"))
    assert {str(scheme) for scheme in model.schemes().values()} == {"w4a16g32"}


def test_a_name_under_which_false_stands_is_dense(exported: Export, change_config: ChangeFile) -> None:
    model = change_config(exported("mlx", {"mlp.*": "w4a16g32"}), lambda config: config.update({NAME: False}))
    assert NAME not in model.schemes() and not isinstance(model.block(0).get(NAME), QuantLinear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(bits=8), r"q_proj: weight is torch.uint32 \[64, 8\], must be torch.uint32 \[64, 16\] for 8 bits"),
        (lambda c: c.update(bits=7), "q_proj: 7 bits in groups of 32 cannot be read"),
        (lambda c: c.update({NAME: {"mode": "nvfp4"}}), "q_proj: nvfp4 of 4 bits in groups of 32 with scales of torch.float32"),
        (lambda c: c.pop("bits"), "quantization by None cannot be read; .*mlx"),
    ],
)
def test_a_config_that_does_not_describe_the_file_is_refused(
    change: Change, message: str, exported: Export, change_config: ChangeFile
) -> None:
    model = change_config(exported("mlx", "w4a16g32"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.biases"), "q_proj: biases are missing, must be floats as scales"),
        (lambda t: t.pop(f"{NAME}.weight"), "q_proj: weight is missing, must be torch.uint32"),
        (
            lambda t: t.update({"model.embed_tokens.scales": torch.ones(4096, 2)}),
            "model.embed_tokens is a quantized embedding, qtool reads dense ones alone; convert the model again",
        ),
    ],
)
def test_a_file_that_cannot_be_decoded_is_refused(
    change: Change, message: str, exported: Export, change_tensors: ChangeFile
) -> None:
    model = change_tensors(exported("mlx", "w4a16g32"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)
