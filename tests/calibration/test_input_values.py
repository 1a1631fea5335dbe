"""InputValues: exact counts of bfloat16 values, exact ends."""

import torch

from qtool.calibration.input_values import InputValues


def seen_of(*batches: torch.Tensor, group: int | None = None) -> InputValues:
    seen = InputValues(group)
    for batch in batches:
        seen.update(batch)
    return seen


def test_values_are_counted_one_by_one() -> None:
    x = torch.tensor([[1.0, -2.0, 1.0, 0.5], [0.0, 1.0, -300.0, 0.5]])
    found = seen_of(x[:1], x[1:].view(1, 1, 4)).histogram()
    assert found.values.tolist() == [-300, -2, 0, 0.5, 1] and found.counts.tolist() == [1, 1, 1, 2, 3]
    assert (found.minimum, found.maximum) == (-300, 1)


def test_the_ends_are_told_exactly_and_what_lies_between_to_bfloat16() -> None:
    x = torch.tensor([[1.0001, 100.03, -7.7777, 0.1]])
    found = seen_of(x).histogram()
    assert (found.minimum, found.maximum) == (float(x.min()), float(x.max()))
    assert torch.equal(found.values, x[0].to(torch.bfloat16).float().sort().values)


def test_zero_is_inside_the_range() -> None:
    found = seen_of(torch.tensor([[2.0, 4.0]])).histogram()
    assert (found.minimum, found.maximum) == (0, 4)


def test_groups_are_counted_by_their_largest_magnitudes() -> None:
    x = torch.arange(64.0).view(2, 32) - 40
    found = seen_of(x, group=16).histogram()
    assert found.values.tolist() == [8, 23, 24, 40] and found.counts.tolist() == [1, 1, 1, 1]


def test_what_is_not_finite_is_noticed_whatever_comes_after() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        seen = seen_of(torch.ones(2, 3), torch.tensor([[1.0, bad, 2.0]]), torch.ones(2, 3))
        assert not seen.is_finite, bad
    assert seen_of(torch.ones(2, 3)).is_finite


def test_no_token_at_all_is_no_error() -> None:
    seen = seen_of(torch.ones(0, 8))
    assert seen.n_tokens == 0 and seen.is_finite and len(seen.histogram().values) == 0


def test_pieces_of_one_batch_are_the_batch() -> None:
    x = torch.randn(3000, 512, generator=torch.Generator().manual_seed(0))  # two chunks
    whole, pieces = seen_of(x).histogram(), seen_of(*x.split(700)).histogram()
    assert torch.equal(whole.values, pieces.values) and torch.equal(whole.counts, pieces.counts)
    assert int(whole.counts.sum()) == x.numel()
