"""Range search: the range of least cost, found again by trying each one alone in float64."""

import pytest
import torch

from qtool.calibration.statistics import LayerStats
from qtool.formats.codebook import CodebookGrid
from qtool.formats.integer import IntegerGrid, Params
from qtool.formats.scheme import Grid
from qtool.linalg import ranges
from qtool.linalg.ranges import diagonal_blocks, output_cost, plain_cost, search_range, weighted_cost

GRIDS = [
    IntegerGrid(3, True),
    IntegerGrid(4, False),
    IntegerGrid(8, True),
    CodebookGrid("e2m1", "float32"),
    CodebookGrid("e2m1", "float8_e8m0fnu"),
    CodebookGrid("nf4", "bfloat16", zero_dtype="float16"),
]
IDS = ["3-symmetric", "4-asymmetric", "8-symmetric", "e2m1", "mxfp4", "nf4-asymmetric"]
OUT, GROUPS, GROUP = 5, 3, 12


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """w [out, groups, group] with outliers, x [tokens, in] correlated."""
    random = torch.Generator().manual_seed(0)
    w = torch.randn(OUT, GROUPS, GROUP, generator=random)
    w[:, :, 0] *= 3
    n_in = GROUPS * GROUP
    x = torch.randn(64, n_in, generator=random) @ torch.randn(n_in, n_in, generator=random)
    return w, x


def brute(w: torch.Tensor, grid: Grid, cost: object, steps: int) -> float:
    """Least cost(error) over every shrunken range of one group w [group]."""
    costs = []
    low, high = grid.shares
    n_steps = round(steps * (high - low) / (1 - low))
    for share in [1.0, *torch.linspace(high, low, n_steps + 1).tolist()]:
        params = grid.fit_range(share * w.min().reshape(1), share * w.max().reshape(1))
        costs.append(float(cost((grid.snap(w, params) - w).double())))  # type: ignore[operator]
    return min(costs)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
@pytest.mark.parametrize(("name", "steps"), [("plain", 24), ("weighted", 7), ("output", 60)])
def test_the_search_finds_the_least_cost_of_all_ranges(grid: Grid, name: str, steps: int) -> None:
    w, x = problem()
    stats = LayerStats(GROUPS * GROUP, ("hessian",))
    stats.update(x)
    H = stats.hessian()
    weights = H.diagonal().reshape(GROUPS, GROUP)
    output = output_cost(diagonal_blocks(H, GROUP))
    cost = {"plain": plain_cost, "weighted": weighted_cost(weights), "output": output}[name]
    found = search_range(w, grid, cost, steps)
    error = (grid.snap(w, found) - w).double()  # [out, groups, group]
    for g in range(GROUPS):
        part = x[:, g * GROUP : (g + 1) * GROUP].double()  # [tokens, group]
        costs = {
            "plain": lambda e: (e.abs() ** 2.4).sum(),
            "weighted": lambda e, g=g: sum(float(weights[g, j]) * float(e[j]) ** 2 for j in range(GROUP)),
            "output": lambda e, part=part: ((part @ e) ** 2).mean(),  # over the tokens themselves, not their Hessian
        }
        for o in range(OUT):
            # Costs in float32 may tie within their last digits.
            assert float(costs[name](error[o, g])) == pytest.approx(brute(w[o, g], grid, costs[name], steps), rel=1e-4)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_the_search_is_never_worse_than_the_full_range(grid: Grid) -> None:
    w, _ = problem()
    searched, full = search_range(w, grid, plain_cost), grid.fit(w)
    assert bool((plain_cost(grid.snap(w, searched) - w) <= plain_cost(grid.snap(w, full) - w)).all())


def test_an_outlier_that_no_input_reaches_is_clipped() -> None:
    w = torch.ones(1, 1, 8)
    w[0, 0, 0] = 2.0
    weights = torch.ones(1, 8)
    weights[0, 0] = 0
    grid = IntegerGrid(2, True, "float32")
    assert float(search_range(w, grid, weighted_cost(weights)).scale) < float(grid.fit(w).scale)


def test_a_group_without_any_weight_keeps_the_full_range() -> None:
    w, _ = problem()
    grid = IntegerGrid(3, True)
    assert torch.equal(search_range(w, grid, weighted_cost(torch.zeros(GROUPS, GROUP))).scale, grid.fit(w).scale)


@pytest.mark.parametrize("grid", GRIDS, ids=IDS)
def test_chunks_of_rows_give_what_all_rows_give(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    w, _ = problem()
    whole = search_range(w, grid, plain_cost)
    monkeypatch.setattr(ranges, "CHUNK", 1)
    parts = search_range(w, grid, plain_cost)
    assert torch.equal(whole.scale, parts.scale)
    assert (whole.zero is None) == (parts.zero is None)
    assert whole.zero is None or parts.zero is None or torch.equal(whole.zero, parts.zero)


def test_diagonal_blocks_are_the_blocks_on_the_diagonal() -> None:
    H = torch.arange(36.0).view(6, 6)
    blocks = diagonal_blocks(H, 3)
    assert torch.equal(blocks[0], H[:3, :3]) and torch.equal(blocks[1], H[3:, 3:])


def test_the_largest_weight_of_a_group_may_move_to_the_level_before_the_last() -> None:
    # At a scale of 1.5 they are the levels 4, 3, -3, 2 and 1 of e2m1; at 1, where the largest is the last level, 4.5 is none.
    w = torch.tensor([[[6.0, 4.5, -4.5, 3.0, 1.5, 0.0]]])
    grid = CodebookGrid("e2m1", "float32")
    found = search_range(w, grid, plain_cost)
    assert float(found.scale) == 1.5 and torch.equal(grid.snap(w, found), w)
    assert float(grid.fit(w).scale) == 1.0


def test_every_scale_of_eight_bits_in_reach_is_tried() -> None:
    w, _ = problem()
    w[0, 0] = 0  # a group without a range
    grid = CodebookGrid("e2m1", "float8_e4m3fn").for_tensor(w)
    found = search_range(w, grid, plain_cost, steps=1)
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * grid.of_tensor  # all above zero
    least, greatest = (grid.fit(share * w).scale for share in grid.shares)  # [out, groups, 1]
    for o in range(OUT):
        for g in range(GROUPS):
            tried = [scale for scale in codes if least[o, g] <= scale <= greatest[o, g]]
            costs = [plain_cost(grid.snap(w[o, g], Params(scale.view(1), None)) - w[o, g]) for scale in tried]
            assert float(plain_cost(grid.snap(w[o, g], Params(found.scale[o, g], None)) - w[o, g])) == float(min(costs))
