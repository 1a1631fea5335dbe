"""The reader of HQQ checkpoints: takes what hqq writes, refuses what it cannot decode."""

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


def test_weights_made_nibble_by_nibble_are_read(exported: Export, change_tensors: ChangeFile) -> None:
    codes = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()  # [out, in]
    rows = [row[start : start + 32] for row in codes for start in (0, 32)]  # [out groups, group]
    zeros = [[group / 8] for group in range(128)]

    def change(tensors: dict[str, Any]) -> None:
        words = [[16 * high + low for high, low in zip(*pair, strict=True)] for pair in zip(rows[:64], rows[64:], strict=True)]
        tensors[f"{NAME}.W_q"] = torch.tensor(words, dtype=torch.uint8)
        tensors[f"{NAME}.scale"] = torch.full((128, 1), 0.5, dtype=torch.bfloat16)
        tensors[f"{NAME}.zero"] = torch.tensor(zeros, dtype=torch.bfloat16)

    layer = change_tensors(exported("hqq", "w4a16g32"), change).block(0).get(NAME)
    assert isinstance(layer, QuantLinear) and str(layer.scheme) == "w4g32-asymf16"
    W = [[0.5 * (codes[o][i] - zeros[2 * o + i // 32][0]) for i in range(64)] for o in range(64)]  # [out, in]
    assert layer.weight_values(torch.float32).tolist() == W


def test_nothing_of_the_config_but_the_method_counts(exported: Export, change_config: ChangeFile) -> None:
    folder = exported("hqq", "w3a16g32-asym")
    model = change_config(folder, lambda config: [config.pop(key) for key in ("quant_config", "skip_modules")])
    assert {str(scheme) for scheme in model.schemes().values()} == {"w3a16g32-asym"}
    assert isinstance(model.block(0).get(NAME), QuantLinear)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.W_q"), r"q_proj: W_q is missing, must be torch.uint8 \[64, 32\]"),
        (lambda t: t.pop(f"{NAME}.scale"), "q_proj: scale is missing beside scale or W_q; is it the state of an HQQLinear"),
        (lambda t: t[f"{NAME}.axis"].fill_(0), r"q_proj: its groups do not lie along `in` \(axis 0\)"),
        (lambda t: t[f"{NAME}.nbits"].fill_(2), "q_proj: its packing is not 2bit_u8"),
    ],
)
def test_a_file_that_cannot_be_decoded_is_refused(
    change: Change, message: str, exported: Export, change_tensors: ChangeFile
) -> None:
    model = change_tensors(exported("hqq", "w4a16g32"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)
