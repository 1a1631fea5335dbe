"""Weights as whole numbers: every format that has such a form, to the bit, and why others have none."""

from dataclasses import replace

import pytest
import torch

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.kernels.whole_levels import WholeLevels, whole_levels


def tensor(scheme: str, n_in: int = 128) -> QuantizedTensor:
    W = torch.randn(16, n_in, generator=torch.Generator().manual_seed(0)) + 0.2
    return quantize(W, Scheme.model_validate(scheme).weights)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        *((f"w{bits}a16g32{ending}", 4) for bits in (2, 3, 4) for ending in ("", "-asym", "-asymf16")),
        *((f"w{bits}a16{ending}", 8) for bits in (5, 8) for ending in ("", "-asym", "-asymf16")),
        *((scheme, 4) for scheme in ("binary", "ternaryg32", "w2starg64-asymf16", "e1m2g32", "w4a16g32-dq", "w1a16g32-asym")),
        *((scheme, 8) for scheme in ("e2m1", "e3m0", "iq4_nl", "mxint8")),
    ],
)
def test_codes_scales_and_shifts_give_the_weights(scheme: str, bits: int) -> None:
    quantized = tensor(scheme)
    whole = whole_levels(quantized, bits)
    assert isinstance(whole, WholeLevels) and whole.code.dtype == torch.int8
    half = 1 << (bits - 1)
    assert -half <= int(whole.code.min()) and int(whole.code.max()) < half
    levels = whole.code.double().unflatten(1, (whole.scale.shape[1], -1))  # [out, groups, group]
    if whole.shift is not None:
        levels = levels + whole.shift.double().unsqueeze(-1)
    W = (levels * whole.scale.double().unsqueeze(-1)).flatten(1)
    expected = quantized.dequantize().double()
    rounding = 2**-21 * float(expected.abs().max())  # float32's, of scale times level and of a zero point over the unit
    torch.testing.assert_close(W, expected, rtol=0, atol=rounding)


def test_codes_lie_around_the_zero_points() -> None:
    whole = whole_levels(tensor("w2a16g32-asym"), 4)
    assert isinstance(whole, WholeLevels) and whole.shift is not None
    assert int(whole.code.min()) < 0 < int(whole.code.max()) and float(whole.shift.mean().abs()) < 1


@pytest.mark.parametrize(
    ("scheme", "bits", "reason"),
    [
        ("nf4g64", 8, "levels of nf4 are no 256 neighbouring whole numbers"),
        ("mxfp4", 4, "levels of e2m1 are no 16 neighbouring whole numbers"),
        ("w8a16", 4, "levels of int are no 16 neighbouring whole numbers"),
        ("e8pg64", 8, "levels of e8p are no 256"),
        ("w4a16g16-ic", 4, "groups along `out`"),
    ],
)
def test_what_has_no_such_form_says_why(scheme: str, bits: int, reason: str) -> None:
    found = whole_levels(tensor(scheme), bits)
    assert isinstance(found, str) and found.startswith(reason)


def test_what_stands_beside_codes_is_refused() -> None:
    found = whole_levels(replace(tensor("w4a16g32"), column_scale=torch.ones(128)), 4)
    assert found == "scales of columns beside the codes"
