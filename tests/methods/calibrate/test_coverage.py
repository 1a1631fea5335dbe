"""Coverage: bins as the paper's loop makes them, from the middle of a cloud to its rim, and even draws from them."""

import pytest
import torch

from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.methods.calibrate.coverage import METHOD, CoverageOptions, bins_of, coverage, draw_evenly
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


def cloud(n: int) -> torch.Tensor:
    """Points round one direction, made to length 1."""
    points = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)) + torch.tensor([3.0] + [0.0] * 7)
    return torch.nn.functional.normalize(points, dim=-1)


def slow_bins(similarity: torch.Tensor, n_bins: int, balance: float) -> list[list[int]]:
    """The sums of the definition, anew for every candidate."""
    n = len(similarity)
    rest, bins = set(range(n)), []
    for number in range(n_bins):
        own: list[int] = []
        for _ in range(n * (number + 1) // n_bins - n * number // n_bins):
            gains = {
                x: balance * sum(float(similarity[x, v]) for v in rest) - 2 * sum(float(similarity[x, v]) for v in own)
                for x in sorted(rest - set(own))
            }
            own.append(max(gains, key=lambda x: gains[x]))
        rest -= set(own)
        bins.append(own)
    return bins


@pytest.mark.parametrize("balance", [1.0, 0.3])
def test_bins_are_the_definitions(balance: float) -> None:
    E = cloud(17).double()
    found = bins_of(E @ E.T, 4, balance)
    assert found == slow_bins(E @ E.T, 4, balance)
    assert sorted(index for one in found for index in one) == list(range(17))
    assert {len(one) for one in found} == {4, 5}


def test_early_bins_lie_in_the_middle() -> None:
    E = cloud(60)
    bins = bins_of(E @ E.T, 3, 1.0)
    distances = [float((E[torch.tensor(one)] - E.mean(0)).norm(dim=-1).mean()) for one in bins]
    assert distances[0] < distances[-1]


def test_draws_are_even_and_a_short_bin_is_made_up_for() -> None:
    bins = [[0, 1, 2, 3], [4], [5, 6, 7, 8]]
    chosen = draw_evenly(bins, 7, seed=0).tolist()
    assert len(set(chosen)) == 7 and 4 in chosen
    assert [sum(index in one for index in chosen) for one in bins] == [3, 1, 3]
    assert sorted(draw_evenly(bins, 9, seed=1).tolist()) == list(range(9))


def test_one_bin_draws_from_the_whole_pool() -> None:
    counts = torch.zeros(10)
    for seed in range(300):
        counts[draw_evenly([list(range(10))], 3, seed)] += 1
    assert float(counts.min()) > 60  # 90 expected, standard deviation 8


def test_windows_come_from_the_pool_and_bins_must_fit() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    options = CoverageOptions(source="demo:calibration", samples=3, length=32, candidates=12, bins=3)
    pool = read_tokens(TextOptions(source="demo:calibration", length=32), model.tokenizer, 0)[:12].tolist()
    assert all(window in pool for window in coverage(model, options, 0).tolist())
    with pytest.raises(ValueError, match="bins is 4, must be no more than samples and candidates"):
        CoverageOptions(source="demo:calibration", samples=3, bins=4)
    assert METHOD.check is not None
    with pytest.raises(Exception, match="calibrate/coverage: length 513 is more than"):
        METHOD.check(model, options.model_copy(update={"length": 513}))
