"""Rounding to ggml's types: as good as the package's own and a search by hand, exact where the weights are on a grid."""

import pytest
import torch
from gguf import GGMLQuantizationType, quants

from qtool.errors import QtoolError
from qtool.formats.ggml import CHUNK, TYPES, decode, decodes_to, from_codes
from qtool.formats.ggml_rounding import offset_scale, round_to, signed_scale
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize

PACKED = [name for name, kind in TYPES.items() if kind.dtype is None]
# Least signal-to-noise of normal weights, in dB. A uniform quantizer of b bits for normal weights has 4.4, 9.3, 14.3, 20.2,
# 25.6 and 31.9 dB at one to six bits (Max 1960, table II); a scale for each 16 to 32 weights adds one or two, and must
# take back what its own few bits lose.
LEAST_DB = {"q2_k": 9.5, "q3_k": 14.5, "q4_k": 20.5, "q5_k": 26.5, "q6_k": 32.0, "q4_0": 20.0, "q4_1": 20.5, "q5_0": 26.0}
LEAST_DB |= {"q5_1": 26.5, "q8_0": 42.0, "mxfp4": 17.0, "iq4_nl": 21.0}


def weights(n_out: int = 64, n_in: int = 512) -> torch.Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(0))


def db(W: torch.Tensor, rounded: torch.Tensor) -> float:
    return float(10 * torch.log10(W.square().sum() / (W - rounded).square().sum()))


@pytest.mark.parametrize("name", PACKED)
def test_normal_weights_lose_no_more_than_theory_says(name: str) -> None:
    W = weights()
    assert db(W, decode(round_to(W, TYPES[name]), TYPES[name])) > LEAST_DB[name]


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4"])
def test_rounding_loses_less_than_the_packages(name: str) -> None:
    W, number = weights(), GGMLQuantizationType[name.upper()]
    theirs = torch.from_numpy(quants.dequantize(quants.quantize(W.numpy(), number), number))
    # Of eight bits both round to nearest in nearly the same range.
    assert db(W, decode(round_to(W, TYPES[name]), TYPES[name])) >= db(W, theirs) - (0.05 if name == "q8_0" else 0)


@pytest.mark.parametrize("name", PACKED)
def test_rounding_twice_changes_little(name: str) -> None:
    W = weights()
    once = decode(round_to(W, TYPES[name]), TYPES[name])
    again = decode(round_to(once, TYPES[name]), TYPES[name])
    assert db(once, again) > LEAST_DB[name] + 6  # the grid is found again but for scales in few bits


@pytest.mark.parametrize("name", [*PACKED, "f32", "f16", "bf16"])
def test_zeros_and_constants_survive(name: str) -> None:
    W = torch.cat([torch.zeros(1, 512), torch.full((1, 512), 0.75), torch.full((1, 512), -0.75)])
    torch.testing.assert_close(decode(round_to(W, TYPES[name]), TYPES[name]), W, rtol=0.005, atol=0)


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_dense_types_round_to_nearest(name: str) -> None:
    W = weights(3, 7)
    dtype = TYPES[name].dtype
    data = round_to(W, TYPES[name])
    assert dtype is not None and torch.equal(decode(data, TYPES[name]), W.to(dtype).float())
    assert decodes_to(data, TYPES[name], W.to(dtype)) and decodes_to(data, TYPES[name], W) == (name == "f32")


def test_the_signed_scale_is_nearly_the_best_there_is() -> None:
    w = weights(40, 16)
    found = error_of(w, signed_scale(w, -4))
    grid = torch.linspace(-1.5, 1.5, 20001)
    best = torch.stack([error_of(w, torch.full((40, 1), float(s))) for s in grid]).amin(0)
    assert (found / best).mean() < 1.05  # 16 shares, each solved for its codes, against all scales


def error_of(w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    safe = torch.where(scale == 0, 1, scale)
    q = torch.where(scale == 0, 0, (w / safe).round().clamp(-4, 3))
    return (w - scale * q).square().sum(1)


def test_the_offset_scale_finds_a_line_exactly() -> None:
    q = torch.randint(0, 16, (8, 32), generator=torch.Generator().manual_seed(0)).float()
    q[:, 0], q[:, 1] = 0, 15
    w = 0.25 * q - 1.75
    for is_positive in (True, False):
        s, t = offset_scale(w, 4, is_positive)
        torch.testing.assert_close(s * q - t, w, rtol=0, atol=1e-5)  # the normal equations in float32


def test_offsets_stay_positive_where_the_type_has_no_other() -> None:
    _, t = offset_scale(weights(8, 32).abs() + 1, 4, is_positive=True)
    assert (t >= 0).all()


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(QtoolError, match=r"weights up to 1\.0e\+07 are beyond the float16 scales of q4_0"):
        round_to(torch.full((1, 32), 1e7), TYPES["q4_0"])


def test_rows_are_rounded_alone_however_many_there_are() -> None:
    W = weights(5, 256)
    whole = round_to(W, TYPES["q4_k"])
    assert torch.equal(whole, torch.cat([round_to(row, TYPES["q4_k"]) for row in W.split(1)]))
    wide = torch.randn(1, 2 * CHUNK, generator=torch.Generator().manual_seed(0))
    assert round_to(wide, TYPES["q8_0"]).shape == (1, TYPES["q8_0"].row_bytes(2 * CHUNK))


def test_mxfp4_is_qtools_own() -> None:
    W = weights(4, 64)
    own = from_codes(quantize(W, Scheme.model_validate("mxfp4").weights), TYPES["mxfp4"])
    assert torch.equal(round_to(W, TYPES["mxfp4"]), own)
