"""The integer grid: every code point, its bounds, its zeros and the dtype its scales are stored in."""

import pytest
import torch

from qtool.formats.integer import IntegerGrid, Params
from qtool.formats.scales import SCALE_DTYPES

GRIDS = [IntegerGrid(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
IDS = [f"{grid.bits}-{'symmetric' if grid.symmetric else 'asymmetric'}" for grid in GRIDS]


def values(seed: int = 0) -> torch.Tensor:
    """[rows, group] of many scales and offsets."""
    random = torch.Generator().manual_seed(seed)
    shift = torch.linspace(-3, 3, 32).view(-1, 1)  # [rows, 1]
    return torch.randn(32, 48, generator=random) * 10 ** torch.linspace(-4, 3, 32).view(-1, 1) + shift


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_every_code_point_decodes_to_its_value_and_back(grid: IntegerGrid) -> None:
    codes = torch.arange(grid.low, grid.high + 1).float()  # [codes]
    assert len(codes) == 2**grid.bits
    for scale in (0.0078125, 0.3, 7.0):
        for zero in [None] if grid.symmetric else range(grid.high + 1):
            params = Params(torch.tensor([scale]), None if zero is None else torch.tensor([float(zero)]))
            expected = [scale * (code - (zero or 0)) for code in range(grid.low, grid.high + 1)]
            decoded = grid.decode(codes, params)
            # One float32 product against the same in float64.
            assert torch.allclose(decoded, torch.tensor(expected), rtol=1e-6, atol=0)
            assert torch.equal(grid.encode(decoded, params), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_every_code_is_the_nearest_one(grid: IntegerGrid) -> None:
    w = values()
    params = grid.fit(w)
    levels = grid.decode(torch.arange(grid.low, grid.high + 1).float(), params)  # [rows, codes]
    nearest = (w.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)  # [rows, group]
    # A value half way between two levels may go to either: float32 division decides in the last digit.
    assert torch.allclose((grid.snap(w, params) - w).abs(), nearest, rtol=1e-4, atol=float(1e-5 * params.scale.max()))


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_snapping_twice_is_snapping_once(grid: IntegerGrid) -> None:
    w = values()
    params = grid.fit(w)
    once = grid.snap(w, params)
    assert torch.equal(grid.snap(once, params), once)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_the_full_range_clips_nothing_by_more_than_half_a_step(grid: IntegerGrid) -> None:
    w = values()
    params = IntegerGrid(grid.bits, grid.symmetric, "float32").fit(w)
    steps = (grid.snap(w, params) - w).abs() / params.scale
    # Asymmetric: rounding the zero point may push the far end out by half a step more.
    assert float(steps.max()) <= (0.5 if grid.symmetric else 1.0) + 1e-3


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_zero_is_a_level_whatever_the_range(grid: IntegerGrid) -> None:
    for w in (torch.tensor([[3.0, 5.0]]), torch.tensor([[-5.0, -3.0]]), torch.tensor([[-1.0, 7.0]])):
        params = grid.fit(w)
        assert grid.snap(torch.zeros(1, 1), params).item() == 0


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_an_all_zero_group_stays_zero_with_a_scale_of_one(grid: IntegerGrid) -> None:
    params = grid.fit(torch.zeros(2, 8))
    assert torch.equal(params.scale, torch.ones(2, 1))
    assert torch.equal(grid.snap(torch.zeros(2, 8), params), torch.zeros(2, 8))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_are_exact_in_the_dtype_they_are_stored_in(name: str, symmetric: bool) -> None:
    scale = IntegerGrid(4, symmetric, name).fit(values()).scale
    assert torch.equal(scale.to(SCALE_DTYPES[name]).float(), scale)


FLOAT_ZEROS = [IntegerGrid(bits, False, "float32", zero_dtype="float16") for bits in (2, 3, 4, 8)]


@pytest.mark.parametrize("grid", FLOAT_ZEROS, ids=[f"{grid.bits}" for grid in FLOAT_ZEROS])
def test_a_float_zero_point_lies_between_codes_and_every_weight_goes_to_its_nearest_level(grid: IntegerGrid) -> None:
    w = values()
    params = grid.fit(w)
    assert params.zero is not None and bool((params.zero != params.zero.round()).any())
    assert torch.equal(params.zero.half().float(), params.zero)
    levels = grid.decode(torch.arange(grid.high + 1).float(), params)  # [rows, codes]
    nearest = (w.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)  # [rows, group]
    distance = (grid.snap(w, params) - w).abs()
    # A value half way between two levels may go to either: float32 division decides in the last digits.
    assert torch.allclose(distance, nearest, rtol=1e-4, atol=float(1e-4 * params.scale.max()))
    # No rounding of the zero point pushes an end out, but for float16's share of it: 2^-11 of at most 2^bits.
    assert bool((distance <= (0.501 + 2.0 ** (grid.bits - 11)) * params.scale).all())
    assert torch.equal(grid.encode(grid.snap(w, params), params), grid.encode(w, params))


def test_an_all_zero_group_stays_zero_under_a_float_zero_point() -> None:
    grid = FLOAT_ZEROS[0]
    params = grid.fit(torch.zeros(2, 8))
    assert torch.equal(grid.snap(torch.zeros(2, 8), params), torch.zeros(2, 8))


def test_hand_worked_codes_of_all_kinds() -> None:
    w = torch.tensor([[-1.0, 0.0, 0.4, 2.0]])
    symmetric = IntegerGrid(3, True, "float32")  # scale = 2 / 3.5
    assert symmetric.encode(w, symmetric.fit(w)).tolist() == [[-2.0, 0.0, 1.0, 3.0]]
    signed = IntegerGrid(3, True, "float32", signed_scale=True)  # scale = -max(2 / 4.5, 1 / 3.5): 2 lies half a step out
    assert signed.encode(w, signed.fit(w)).tolist() == [[2.0, 0.0, -1.0, -4.0]]
    v = torch.tensor([[-1.75, 0.0, 0.4, 2.0]])  # scale = -max(2 / 4.5, 1.75 / 3.5) = -0.5
    assert signed.fit(v).scale.item() == -0.5 and signed.encode(v, signed.fit(v)).tolist() == [[3.0, 0.0, -1.0, -4.0]]
    asymmetric = IntegerGrid(2, False, "float32")  # zero = round(4/3 - 1/2) = 1, scale = max(2 / 2.5, 1 / 1.5) = 0.8
    assert asymmetric.encode(w, asymmetric.fit(w)).tolist() == [[0.0, 1.0, 1.0, 3.0]]
    assert asymmetric.fit(w).scale.item() == pytest.approx(0.8)
    between = IntegerGrid(2, False, "float32", zero_dtype="float16")
    v = torch.tensor([[-0.75, 0.0, 0.4, 3.25]])  # scale = 4 / 4, zero = 0.75 - 0.5: levels -0.25, 0.75, 1.75, 2.75
    assert between.encode(v, between.fit(v)).tolist() == [[0.0, 0.0, 1.0, 3.0]]
    assert between.snap(v, between.fit(v)).tolist() == [[-0.25, -0.25, 0.75, 2.75]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "kind",
    [{"symmetric": True}, {"symmetric": True, "signed_scale": True}, {"symmetric": False},
     {"symmetric": False, "zero_dtype": "float16"}],
)  # fmt: skip
def test_no_value_is_further_than_half_a_step_from_its_level_which_a_scale_a_little_smaller_breaks(
    kind: dict[str, object], bits: int
) -> None:
    grid = IntegerGrid(bits, scale_dtype="float32", **kind)
    random = torch.Generator().manual_seed(bits)
    shift = torch.linspace(-4, 4, 41).unsqueeze(1)  # one side longer than the other, or alone
    w = torch.randn(41, 64, generator=random) + shift
    params = grid.fit(w)
    slack = 2**-10 * params.zero.abs().amax() if grid.zero_dtype == "float16" and params.zero is not None else 0.0
    assert bool(((grid.snap(w, params) - w).abs() <= params.scale.abs() * (0.5 + 1e-4 + slack)).all())
    less = Params(params.scale * 0.99, params.zero)
    too_far = (grid.snap(w, less) - w).abs().amax(1) > less.scale.abs().squeeze(1) * (0.5 + 1e-4)
    is_least = grid.symmetric == grid.signed_scale and grid.zero_dtype == "int"  # others round zero points or keep a side free
    assert bool(too_far.all()) or not is_least
