"""Hidden states and attention are compared as told, and blocks are matched evenly."""

import pytest
import torch

from qtool.methods.distill.hidden import attention_loss, hidden_loss, matching


def test_blocks_are_matched_evenly_the_last_with_the_last() -> None:
    assert matching(4, 4) == [0, 1, 2, 3]
    assert matching(2, 6) == [2, 5] and matching(3, 6) == [1, 3, 5]
    assert matching(4, 6)[-1] == 5 and matching(1, 6) == [5]


def test_hidden_states_are_compared_relative_to_their_length_or_by_direction() -> None:
    random = torch.Generator().manual_seed(0)
    h, wanted = torch.randn(2, 3, 5, 8, generator=random)
    by_hand = (
        sum(float(((a - b) ** 2).sum() / (b**2).sum()) for a, b in zip(h.view(-1, 8), wanted.view(-1, 8), strict=True)) / 15
    )
    assert float(hidden_loss(h, wanted, "mse")) == pytest.approx(by_hand, rel=1e-5)
    assert float(hidden_loss(3 * wanted, wanted, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(hidden_loss(-wanted, wanted, "cosine")) == pytest.approx(2)
    assert float(hidden_loss(wanted, wanted, "mse")) == 0


def test_attention_is_compared_as_distributions_and_heads_of_another_number_by_their_mean() -> None:
    random = torch.Generator().manual_seed(0)
    A, wanted = torch.randn(2, 1, 2, 3, 3, generator=random).softmax(-1)
    by_hand = (wanted * (wanted / A).log()).sum(-1).mean()
    assert float(attention_loss(A, wanted)) == pytest.approx(float(by_hand), rel=1e-5)
    doubled = torch.cat([wanted, wanted], dim=1)
    assert float(attention_loss(wanted.mean(1, keepdim=True), doubled)) == pytest.approx(0, abs=1e-6)
    masked = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])  # later tokens have no attention at all
    assert float(attention_loss(masked, masked)) == 0
