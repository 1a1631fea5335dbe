"""LayerStats: the same numbers as from all inputs at once, however they arrive."""

import pytest
import torch

from qtool.calibration import statistics
from qtool.calibration.statistics import LayerStats
from qtool.options import Needs, Statistic


def inputs() -> torch.Tensor:
    """[samples, length, in], channels of uneven strength and mean."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 10, 6, generator=random) * torch.arange(1.0, 7.0) + 0.5


ALL = ("amax", "mean_abs", "hessian")


def gather(needs: Needs, *batches: torch.Tensor) -> LayerStats:
    stats = LayerStats(6, needs)
    for batch in batches:
        stats.update(batch)
    return stats


@pytest.mark.parametrize("sizes", [[4], [1, 3], [1, 1, 1, 1]])
def test_batches_give_what_all_inputs_at_once_give(sizes: list[int]) -> None:
    stats = gather(ALL, *inputs().split(sizes))
    x = inputs().view(-1, 6).double()  # [tokens, in]
    assert stats.n_tokens == 40
    # Float32 sums of 40 terms.
    assert torch.allclose(stats.hessian().double(), x.T @ x / 40, rtol=1e-5, atol=1e-5)
    assert torch.allclose(stats.mean_abs().double(), x.abs().mean(0), rtol=1e-5)
    assert torch.equal(stats.amax().double(), x.abs().amax(0))


def test_a_batch_without_tokens_changes_nothing() -> None:
    stats = gather(("hessian",), inputs(), torch.zeros(0, 6))
    assert stats.n_tokens == 40
    assert torch.equal(stats.hessian(), gather(("hessian",), inputs()).hessian())


def test_where_no_token_came_everything_is_zero() -> None:
    stats = gather(ALL, torch.zeros(0, 6))
    assert stats.n_tokens == 0
    assert torch.equal(stats.hessian(), torch.zeros(6, 6))
    assert torch.equal(stats.amax(), torch.zeros(6)) and torch.equal(stats.mean_abs(), torch.zeros(6))


def test_inputs_of_low_precision_are_summed_in_float32() -> None:
    ones = torch.ones(1, 1000, 6, dtype=torch.bfloat16)  # a bfloat16 sum of ones ends at 256
    stats = gather(ALL, ones, ones)
    # Float32 sums of a thousand terms; a bfloat16 one would be off by half.
    assert torch.allclose(stats.hessian(), torch.ones(6, 6), rtol=1e-4) and torch.equal(stats.mean_abs(), torch.ones(6))


def test_inputs_are_kept_only_where_they_are_needed() -> None:
    kept = gather(("inputs",), *inputs().split(2))
    assert [tuple(x.shape) for x in kept.inputs()] == [(2, 10, 6)] * 2
    assert torch.equal(torch.cat(kept.inputs()), inputs())
    with pytest.raises(AssertionError, match="without them"):
        gather(("hessian",), inputs()).inputs()


@pytest.mark.parametrize("name", ["amax", "mean_abs", "hessian"])
def test_what_was_not_asked_for_cannot_be_read(name: Statistic) -> None:
    others: Needs = tuple(other for other in ALL if other != name)
    assert getattr(gather((name,), inputs()), name)().isfinite().all()
    with pytest.raises(AssertionError, match="gathered without it"):
        getattr(gather(others, inputs()), name)()


@pytest.mark.parametrize("n", [1, 127, 128, 129, 300, 2000])  # one strip, a narrow last one, the most there are
def test_a_hessian_summed_in_strips_is_whole_however_often_it_is_read(n: int) -> None:
    random = torch.Generator().manual_seed(n)
    x = torch.randn(3, 7, n, generator=random)  # [samples, length, in]
    stats = LayerStats(n, ("hessian",))
    stats.update(x[:1])
    assert torch.allclose(stats.hessian(), stats.hessian().T, rtol=1e-5, atol=1e-5)
    stats.update(x[1:])
    wide = x.view(-1, n).double()
    # Float32 sums of 21 terms.
    assert torch.allclose(stats.hessian().double(), wide.T @ wide / 21, rtol=1e-5, atol=1e-5)


def test_more_tokens_than_are_widened_at_once_count_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = gather(ALL, inputs())
    monkeypatch.setattr(statistics, "CHUNK", 7)
    pieces = gather(ALL, inputs())
    assert pieces.n_tokens == 40
    assert torch.allclose(pieces.hessian(), at_once.hessian(), rtol=1e-5) and torch.equal(pieces.amax(), at_once.amax())


def test_few_inputs_of_low_precision_leave_the_hessian_positive_semidefinite() -> None:
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(1, 100, 300, generator=random) * torch.rand(300, generator=random) ** 4).bfloat16()  # rank 100 of 300
    stats = LayerStats(300, ("hessian",))
    stats.update(x)
    H = stats.hessian().double()
    # Float32 rounding; sums rounded to bfloat16 would leave -1e-3 of the mean.
    assert float(torch.linalg.eigvalsh(H).min()) > -1e-5 * float(H.diagonal().mean())


# ---- a sample of the tokens ----


def test_a_short_text_is_its_own_sample() -> None:
    stats = gather(("sample",), *inputs().split(1))
    assert torch.equal(stats.sample(), inputs().view(-1, 6))


def test_a_sample_has_tokens_from_everywhere_and_is_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SAMPLE", 200)
    x = torch.arange(4000.0).view(20, 200, 1).expand(-1, -1, 6)  # [samples, length, in], each token tells its place
    found, again = (gather(("sample",), *x.split(3)).sample() for _ in range(2))
    assert torch.equal(found, again) and found.shape == (200, 6)
    place = found[:, 0]
    assert bool((place.diff() > 0).all())  # in their order, none twice
    # Of 200 draws a fifth of the text gets 40, give or take three times the deviation of 5.7.
    assert all(abs(int(((place >= start) & (place < start + 800)).sum()) - 40) < 18 for start in range(0, 4000, 800))
