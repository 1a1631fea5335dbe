"""KIVI's groups: each number worked out one by one, the words of a packed group, and what is no group."""

import math

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme, PackedGroups, Side, fit
from qtool.linalg.hadamard import hadamard_product


def keys_and_values(tokens: int, head_dim: int = 32) -> tuple[Tensor, Tensor]:
    k, v = torch.randn(2, 2, 3, tokens, head_dim, generator=torch.Generator().manual_seed(0)).unbind(0)
    k[:, 1, :, 5] = 20 + k[:, 1, :, 5]  # a channel far out
    return k, v


def rounded(numbers: list[float], bits: int) -> list[float]:
    """One group, number by number; scale and zero as float16 holds them."""
    zero = float(torch.tensor(min(numbers)).half())
    scale = float(torch.tensor((max(numbers) - min(numbers)) / (2**bits - 1)).half())
    codes = [min(max(round((x - zero) / scale), 0), 2**bits - 1) for x in numbers]
    return [code * scale + zero for code in codes]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_key_is_rounded_with_its_channel_and_a_value_with_its_token(bits: int) -> None:
    k, v = keys_and_values(32)
    keys, values = KiviScheme(key_bits=bits, value_bits=bits, group=16).sides  # type: ignore[arg-type]
    found_k, found_v = keys.round(k), values.round(v)
    expected_k, expected_v = torch.empty_like(k), torch.empty_like(v)
    for sample in range(2):
        for head in range(3):
            for start in (0, 16):
                for i in range(32):
                    group = k[sample, head, start : start + 16, i].tolist()
                    expected_k[sample, head, start : start + 16, i] = torch.tensor(rounded(group, bits))
                    group = v[sample, head, i, start : start + 16].tolist()
                    expected_v[sample, head, i, start : start + 16] = torch.tensor(rounded(group, bits))
    torch.testing.assert_close(found_k, expected_k, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found_v, expected_v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("which", [0, 1])
def test_packed_groups_hold_what_was_rounded_in_the_bits_that_are_told(which: int, bits: int) -> None:
    side = KiviScheme(key_bits=bits, value_bits=bits).sides[which]  # type: ignore[arg-type]
    x = keys_and_values(64, 64)[which]
    packed = PackedGroups.of(side, x)
    assert torch.equal(packed.dequantize(x.dtype), side.round(x))
    stored = sum(part.nbytes for part in packed.parts)
    assert stored == 2 * 3 * 64 * side.bytes_per_token(64) == x.numel() * (bits / 8 + 4 / 32)


def test_the_words_of_a_group_are_those_worked_by_hand() -> None:
    """0, 1, 2, 3 over and over: a step of 1 from 0, codes 0 1 2 3 from the lowest bits on: 0b11100100."""
    side = Side(bits=2, group=16, along="channels", sinks=0, residual=0, is_rotated=False)
    packed = PackedGroups.of(side, torch.arange(16.0).remainder(4).view(1, 1, 1, 16))
    assert packed.words.tolist() == [[[[[0xE4E4E4E4 - 2**32]]]]]
    assert packed.scale.item() == 1 and packed.zero.item() == 0


def test_the_rotation_is_orthonormal_and_comes_undone() -> None:
    H = hadamard_product(torch.eye(8))
    expected = [[(-1) ** (i & j).bit_count() / math.sqrt(8) for j in range(8)] for i in range(8)]
    torch.testing.assert_close(H, torch.tensor(expected))
    side = KiviScheme(key_bits=8, keys="per_token", rotate="hadamard").sides[0]
    k, _ = keys_and_values(4)
    torch.testing.assert_close(side.from_groups(side.to_groups(k)), k, rtol=1e-5, atol=1e-5)


def test_a_rotation_helps_keys_by_token_where_a_channel_stands_out() -> None:
    k, _ = keys_and_values(16)
    lost = [
        float((KiviScheme(keys="per_token", rotate=rotate).sides[0].round(k) - k).norm())  # type: ignore[arg-type]
        for rotate in ("none", "hadamard")
    ]
    assert lost[1] < 0.8 * lost[0]


def test_a_group_of_one_number_comes_back() -> None:
    side = KiviScheme(group=16).sides[1]
    x = torch.full((1, 1, 2, 16), 0.375)
    assert torch.equal(side.round(x), x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_what_float16_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(QtoolError, match="NaN, infinity or numbers that float16 cannot hold; check the model's weights"):
        fit(torch.tensor([0.0, bad]), 2)


@pytest.mark.parametrize("side", [0, 1])
def test_gradients_pass_as_if_errors_were_fixed_shares_of_the_scale(side: int) -> None:
    side_of = KiviScheme(group=16).sides[side]
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    (side_of.round(x) * weights).sum().backward()
    if side == 0:  # a group of keys is one channel of the tokens
        x, weights, grad = x.mT, weights.mT, x.grad.mT if x.grad is not None else None
    else:
        grad = x.grad
    for row, weight, found in zip(x.detach()[0, 0], weights[0, 0], grad[0, 0] if grad is not None else (), strict=True):
        codes, scale, zero = fit(row, 2)
        share = (codes * scale + zero - row) / scale
        pull = float((share * weight).sum()) / 3  # of the scale, by range / 3
        expected = weight.clone()
        expected[row.argmax()] += pull
        expected[row.argmin()] -= pull
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "dims", "reason"),
    [
        ({"group": 32}, (64, 64), None),
        ({"group": 32}, (80, 80), "a head's 80 channels of values do not divide into groups of 32; use group: 16"),
        ({"group": 16}, (64, 24), "a head's 24 channels of values do not divide into groups of 16; use quantize/kv_cache"),
        ({"group": 64, "keys": "per_token"}, (96, 64), "channels of keys do not divide into groups of 64; use group: 16, 32"),
        ({"group": 32, "rotate": "hadamard"}, (96, 96), "takes heads of a power of two of channels, not 96; use rotate: none"),
    ],
)
def test_heads_that_do_not_fit_are_told(fields: dict[str, object], dims: tuple[int, int], reason: str | None) -> None:
    found = KiviScheme.model_validate(fields).misfit(*dims)
    assert found is None if reason is None else found is not None and reason in found


def test_a_scheme_has_a_name() -> None:
    assert str(KiviScheme()) == "kivi-k2v2g32r128"
    fields = {"key_bits": 4, "value_bits": 3, "group": 64, "residual": 0, "sinks": 4, "keys": "per_token", "rotate": "hadamard"}
    assert str(KiviScheme.model_validate(fields)) == "kivi-k4v3g64r0-s4-per_token-hadamard"
