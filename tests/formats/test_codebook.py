"""Codebooks: every code point of every table, the nearest one with ties as the formats say, and the published errors."""

import pytest
import torch

from qtool.formats.codebook import LEVELS, NF4, CodebookGrid
from qtool.formats.integer import Params

GRIDS = [CodebookGrid(name, "float32") for name in LEVELS]
IDS = list(LEVELS)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_eight_bit_floats_are_torchs(name: str) -> None:
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    finite = values.isfinite()
    assert torch.equal(torch.tensor(LEVELS[name])[finite], values[finite])
    assert int(finite.sum()) == {"e4m3": 254, "e5m2": 248}[name]


@pytest.mark.parametrize(
    ("name", "magnitudes"),
    [
        ("e2m1", [0, 0.5, 1, 1.5, 2, 3, 4, 6]),
        ("e1m2", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75]),
        ("e3m0", [0, 0.25, 0.5, 1, 2, 4, 8, 16]),
        ("fp4_bnb", [0, 0.0052083333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25]),
    ],
)
def test_four_bit_floats_are_the_published_tables(name: str, magnitudes: list[float]) -> None:
    assert LEVELS[name] == pytest.approx([*magnitudes, *(-m for m in magnitudes)], rel=1e-6)


def test_six_bit_floats_end_where_the_standard_says() -> None:
    assert (max(LEVELS["e2m3"]), max(LEVELS["e3m2"])) == (7.5, 28.0)
    assert (sorted(map(abs, LEVELS["e2m3"]))[2], sorted(map(abs, LEVELS["e3m2"]))[2]) == (0.125, 0.0625)  # subnormal


def test_nf4_holds_quantiles_of_the_normal_distribution() -> None:
    normal, offset = torch.distributions.Normal(0.0, 1.0), 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat([positive, negative, torch.zeros(1)]).sort().values
    # The published table was made in float32.
    assert torch.allclose(levels / levels.max(), torch.tensor(NF4, dtype=torch.float64), atol=2e-7)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_every_code_point_decodes_to_its_value_and_back(grid: CodebookGrid) -> None:
    levels = LEVELS[grid.format]
    codes = torch.arange(len(levels)).float()
    for scale in (0.0078125, 0.3, 7.0):
        params = Params(torch.tensor([scale]), None)
        decoded = grid.decode(codes, params)
        # One float32 product against the same in float64.
        assert torch.allclose(decoded.double(), torch.tensor([scale * v for v in levels], dtype=torch.float64), rtol=1e-6)
        assert torch.equal(grid.decode(grid.encode(decoded, params), params), decoded)  # one of the codes of a value


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_every_code_is_the_nearest_one(grid: CodebookGrid) -> None:
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-4, 3, 32).view(-1, 1)
    params = grid.fit(w)
    levels = torch.tensor(LEVELS[grid.format]) * params.scale  # [rows, codes]
    nearest = (w.unsqueeze(-1) - levels.unsqueeze(1)).abs().amin(-1)  # [rows, group]
    # A value half way between two levels may go to either: float32 division decides in the last digit.
    assert torch.allclose((grid.snap(w, params) - w).abs(), nearest, rtol=1e-4, atol=float(1e-6 * params.scale.max()))


@pytest.mark.parametrize("name", ["e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"])
def test_ties_go_to_the_even_code(name: str) -> None:
    grid, one = CodebookGrid(name, "float32"), Params(torch.ones(1), None)
    positive = sorted({value for value in LEVELS[name] if value >= 0})
    for code, (low, high) in enumerate(zip(positive, positive[1:], strict=False)):
        even = low if code % 2 == 0 else high
        for sign in (1, -1):
            assert grid.snap(torch.tensor([sign * (low + high) / 2]), one).item() == sign * even, (low, high)


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_encoding_rounds_as_torch_does(name: str) -> None:
    dtype = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[name]
    grid, one = CodebookGrid(name, "float32"), Params(torch.ones(1), None)
    w = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 2, 4096)
    assert torch.equal(grid.snap(w, one), w.to(dtype).float())
    assert grid.snap(torch.tensor([1e9, -1e9]), one).tolist() == [grid.largest, -grid.largest]  # it saturates


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_snapping_twice_is_snapping_once(grid: CodebookGrid) -> None:
    w = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    params = grid.fit(w)
    once = grid.snap(w, params)
    assert torch.equal(grid.snap(once, params), once)
    if 0.0 in grid.table:
        assert torch.equal(grid.snap(torch.zeros(16, 64), params), torch.zeros(16, 64))
    zeros = torch.zeros(16, 64)
    assert float(grid.snap(zeros, grid.fit(zeros)).abs().max()) <= 2.0**-14


@pytest.mark.parametrize(
    ("name", "group", "scale_dtype", "expected"),
    [  # relative squared error of N(0, 1) weights under absmax scaling
        ("e2m1", 16, "float32", 0.00886),
        ("e2m1", 128, "float32", 0.0119),
        ("e3m0", 64, "float32", 0.0354),
        ("nf4", 64, "float32", 0.00845),
        ("nf4", 128, "float32", 0.00914),
        ("e2m1", 32, "float8_e8m0fnu", 0.0132),
    ],
)
def test_errors_on_normal_weights_are_the_known_ones(name: str, group: int, scale_dtype: str, expected: float) -> None:
    w = torch.randn(1 << 20, generator=torch.Generator().manual_seed(2)).view(-1, group)
    grid = CodebookGrid(name, scale_dtype)
    error = float((grid.snap(w, grid.fit(w)) - w).square().mean())
    assert error == pytest.approx(expected, rel=0.03)


def test_rf8_holds_every_number_of_two_binary_digits_that_are_four_places_apart_at_most() -> None:
    expected = {0.0} | {2.0**e for e in range(16)} | {2.0**e + 2.0 ** (e - d) for e in range(16) for d in (1, 2, 3, 4)}
    assert {value for value in LEVELS["rf8"] if value >= 0} == expected
    assert len(LEVELS["rf8"]) == 256 and LEVELS["rf8"][128 + 9] == -LEVELS["rf8"][9] == -3.0  # sign, e = 1, d = 1
    largest_power = 2.0 ** torch.tensor([value for value in expected if value > 0]).log2().floor()
    assert bool((torch.tensor([value for value in expected if value > 0]) <= 1.5 * largest_power).all())


def test_rf8_rounds_normal_weights_with_the_error_of_its_nearest_digits() -> None:
    w = torch.randn(1 << 18, generator=torch.Generator().manual_seed(2)).view(-1, 4096)
    grid = CodebookGrid("rf8", "float32")
    error = float((grid.snap(w, grid.fit(w)) - w).square().mean())
    magnitude = 2.0 ** w.abs().log2().floor()  # the same without a table: the nearest of six significands, unscaled
    significands = torch.tensor([1, 1.0625, 1.125, 1.25, 1.5, 2])
    nearest = (w.abs() / magnitude).unsqueeze(-1).sub(significands).abs().amin(-1) * magnitude
    assert error == pytest.approx(float(nearest.square().mean()), rel=0.25)  # where powers of two fall differs by the scale


@pytest.mark.parametrize("name", [name for name in LEVELS if name[0] == "e" and name[2:3] == "m"])
def test_floats_snap_as_their_tables_say(name: str) -> None:
    grid = CodebookGrid(name, "float32")
    levels = torch.tensor(sorted(set(LEVELS[name])))
    borders = (levels[1:] + levels[:-1]) / 2
    near = torch.cat([levels, borders, borders.nextafter(torch.tensor(torch.inf)), borders.nextafter(torch.tensor(-torch.inf))])
    spread = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * grid.largest
    x = torch.cat([near, spread, spread * 1e-3, torch.tensor([1e-30, -1e-38, 3e38, -torch.inf, torch.inf])])
    for scale in (1.0, 0.3):
        params = Params(torch.tensor([scale]), None)
        assert torch.equal(grid.snap(x, params), grid.decode(grid.encode(x, params), params))
