"""The reader of AWQ checkpoints: takes what others write, refuses what it cannot decode."""

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
ChangeFile = Callable[[Path, Change], ModelHandle]


@pytest.fixture
def packed(exported: Callable[..., Path]) -> Path:
    return exported("awq", "w4a16g32-asym")


def test_weights_made_nibble_by_nibble_are_read(packed: Path, change_tensors: ChangeFile) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes = torch.randint(0, 16, (64, 64), generator=torch.Generator().manual_seed(0)).tolist()  # [in, out]
    zeros = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(1)).tolist()  # [groups, out]

    def word(row: list[int], place: int) -> int:
        value = sum(row[8 * place + output] << 4 * nibble for nibble, output in enumerate(order))
        return value - (1 << 32) if value >> 31 else value

    def change(tensors: dict[str, Any]) -> None:
        for part, rows in (("qweight", codes), ("qzeros", zeros)):
            words = [[word(row, place) for place in range(8)] for row in rows]
            tensors[f"{NAME}.{part}"] = torch.tensor(words, dtype=torch.int32)
        tensors[f"{NAME}.scales"] = torch.full((2, 64), 0.5, dtype=torch.float16)

    layer = change_tensors(packed, change).block(0).get(NAME)
    assert isinstance(layer, QuantLinear)
    W = [[0.5 * (codes[i][o] - zeros[i // 32][o]) for i in range(64)] for o in range(64)]  # [out, in]
    assert layer.weight_values(torch.float32).tolist() == W


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("version"),
        lambda config: config.update(version="GEMM", modules_to_not_convert=None),
        lambda config: config.update(w_bit=config.pop("bits"), q_group_size=config.pop("group_size")),
        lambda config: config.update(format=config.pop("version"), zero_point=False),
    ],
)
def test_configs_as_others_write_them_are_read(change: Change, packed: Path, change_config: ChangeFile) -> None:
    expected = ModelHandle(ModelOptions(path=str(packed))).block(0).get(NAME)
    found = change_config(packed, change).block(0).get(NAME)
    assert isinstance(expected, QuantLinear) and isinstance(found, QuantLinear)
    assert torch.equal(found.qt.codes, expected.qt.codes) and found.scheme == expected.scheme


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(version="gemv"), "AWQ's layout gemv cannot be read, gemm can"),
        (lambda c: c.update(bits=3), "3 bits in AWQ's layout cannot be read, 4 can"),
        (lambda c: c.update(group_size=64), "q_proj: 2 groups of scales do not belong to 64 columns of w4g64-asym"),
        (lambda c: c.update(quant_method="gptq", sym=False), "q_proj: qweight is torch.int32 .*, must be"),
    ],
)
def test_what_it_cannot_decode_is_refused(change: Change, message: str, packed: Path, change_config: ChangeFile) -> None:
    model = change_config(packed, change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{NAME}.qweight"), "q_proj has scales but no qweight; is it AWQ's layout"),
        (lambda t: t.pop(f"{NAME}.qzeros"), "q_proj has scales but no qzeros; is it AWQ's layout"),
        (
            lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"][:, :4].clone()}),
            r"qweight is torch.int32 \[64, 4\], must be",
        ),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    change: Change, message: str, packed: Path, change_tensors: ChangeFile
) -> None:
    model = change_tensors(packed, change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)
