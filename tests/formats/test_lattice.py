"""E8P: every code is a point of its own of the lattice, and encoding finds the nearest of all, as a search of them does."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.lattice import LatticeGrid, nearest_codes, rows
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize

GRID = LatticeGrid("e8p", "float32")
ONE = Params(torch.ones(1), None)


def every_point() -> Tensor:
    """The level of each code, [65536, 8]."""
    return GRID.levels(torch.arange(1 << 16).unsqueeze(-1))


def brute_force(x: Tensor) -> Tensor:
    """Squared distances [points] of x [points, 8] to the nearest of all points, in float64."""
    points = every_point().double()
    lengths = points.square().sum(1)
    return torch.cat([(lengths - 2 * part @ points.T).amin(1) for part in x.double().split(128)]) + x.double().square().sum(1)


def test_all_codes_are_points_of_their_own_of_e8_shifted_by_a_quarter() -> None:
    points = every_point()
    assert len(torch.unique(points, dim=0)) == 1 << 16
    shifted = points - 0.25  # E8: all entries whole, or all of them halves, and an even sum
    twice = 2 * shifted
    assert torch.equal(twice, twice.round())
    is_odd = twice % 2 == 1
    assert torch.equal(is_odd.all(1), is_odd.any(1))
    assert torch.equal(shifted.sum(1) % 2, torch.zeros(1 << 16))


def test_a_code_holds_its_row_its_signs_and_its_shift() -> None:
    points = every_point()
    for code in (0, 1, 0x1234, 0x80FF, 0xFFFE, 0xFFFF):
        shift = 0.25 if code & 1 else -0.25
        signs = [-1 if code >> bit & 1 else 1 for bit in range(7, 0, -1)]
        signed = points[code] - shift
        assert torch.equal(signed.abs(), rows(torch.device("cpu"))[code >> 8])
        assert signed[1:].sign().tolist() == signs and float(signed.sum()) % 2 == 0


def test_the_rows_are_those_the_paper_counts() -> None:
    lengths = rows(torch.device("cpu")).square().sum(1).int()
    assert Counter(lengths.tolist()) == {2: 1, 4: 8, 6: 28, 8: 64, 10: 126, 12: 29}
    spread = rows(torch.device("cpu"))[-29:].mean(0)
    assert float(spread.max() - spread.min()) < 0.25  # no entry is favoured


@pytest.mark.parametrize("size", [0.2, 1.0, 1.4, 4.0])
def test_encoding_finds_the_nearest_of_all_points(size: float) -> None:
    x = size * torch.randn(1500, 8, generator=torch.Generator().manual_seed(0))
    found = (every_point()[nearest_codes(x)] - x).double().square().sum(1)
    assert torch.allclose(found, brute_force(x), rtol=1e-5, atol=1e-5)  # sums of eight float32 squares


def test_encoding_is_nearest_where_entries_are_equal_or_zero() -> None:
    random = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (1500, 8), generator=random) / 2
    found = (every_point()[nearest_codes(x)] - x).double().square().sum(1)
    assert torch.allclose(found, brute_force(x))


def test_every_code_point_decodes_to_its_value_and_back() -> None:
    codes = torch.arange(1 << 16).float().unsqueeze(-1)
    for scale in (0.0078125, 0.3, 7.0):
        params = Params(torch.tensor([scale]), None)
        assert torch.equal(GRID.encode(GRID.decode(codes, params), params), codes)


def test_snapping_twice_is_snapping_once_and_zeros_stay_near_zero() -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    params = GRID.fit(w)
    once = GRID.snap(w, params)
    assert torch.equal(GRID.snap(once, params), once)
    zeros = torch.zeros(4, 64)
    assert float(GRID.snap(zeros, GRID.fit(zeros)).abs().max()) <= 2.0**-14


def test_the_error_on_normal_weights_is_below_that_of_any_four_levels() -> None:
    w = torch.randn(1 << 17, generator=torch.Generator().manual_seed(2)).view(-1, 128)
    one_scale = GRID.snap(w, GRID.fit(torch.ones(1, 128)))
    error = float((one_scale - w).square().mean())
    # The best four levels for normal weights, Lloyd and Max's, have 0.1175; no two-bit code can be below 1/16.
    assert error == pytest.approx(0.0916, rel=0.02)
    for other in (0.9, 1.1):  # the scale of `fit` is the best one
        assert error < float((GRID.snap(w, GRID.fit(other * torch.ones(1, 128))) - w).square().mean())


@pytest.mark.parametrize(("short", "bits"), [("e8p", 2 + 16 / 512), ("e8pg64", 2.25), ("e8pg64-dq", 2 + 8 / 64 + 8 * 8 / 4096)])
def test_a_tensor_of_codes_counts_decodes_packs_and_splits(short: str, bits: float) -> None:
    W = torch.randn(8, 512, generator=torch.Generator().manual_seed(0))
    tensor = quantize(W, Scheme.model_validate(short).weights)
    assert (tensor.shape, tensor.codes.shape, tensor.codes.dtype) == ((8, 512), (8, 64), torch.int32)
    assert tensor.bits_per_weight == bits
    assert float((tensor.dequantize() - W).square().mean() / W.square().mean()) < 0.11
    if tensor.scheme.is_rowwise:
        assert torch.equal(tensor.rows(2, 5).dequantize(), tensor.dequantize()[2:5])


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"format": "e8p", "bits": 3}, "e8p has 2 bits, not 3"),
        ({"format": "e8p", "group": 12}, "group must be a multiple"),
        ({"format": "e8p", "symmetric": False, "zero_dtype": "float16"}, "e8p has no zero points"),
        ({"format": "e8p", "group_along": "in_channel"}, "groups along `in` alone"),
    ],
)
def test_what_a_lattice_does_not_have_is_refused(weights: dict[str, object], fault: str) -> None:
    with pytest.raises(ValueError, match=fault):
        Scheme.model_validate({"weights": weights})


def test_columns_that_do_not_divide_into_codes_are_refused() -> None:
    with pytest.raises(QtoolError, match="50 columns do not divide into codes of 8"):
        quantize(torch.randn(2, 50), Scheme.model_validate("e8p").weights)
