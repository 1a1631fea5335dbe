"""Gradual pruning follows its cubic schedule, by the smallest weights, with what is asked at the end."""

import pytest

from qtool.methods.prune.gradual import GradualOptions, share_at


def test_the_schedule_is_the_papers_cubic() -> None:
    options = GradualOptions(sparsity=0.8, begin=0.1, end=0.6, every=10)  # of 100 steps: t_0 = 10, n = 5, dt = 10
    at = {step: 0.8 * share_at(step, 100, options) for step in range(100)}
    for rise in range(6):
        by_hand = 0.8 + (0 - 0.8) * (1 - (10 + rise * 10 - 10) / 50) ** 3
        assert at[10 + rise * 10] == pytest.approx(by_hand)
    assert at[0] == at[9] == 0 and at[19] == at[10] == 0  # t_0 begins with s_i = 0
    assert at[60] == at[99] == 0.8
    assert list(at.values()) == sorted(at.values())


def test_a_schedule_shorter_than_a_rise_ends_at_once() -> None:
    options = GradualOptions(begin=0.0, end=0.5, every=50)
    assert share_at(0, 10, options) == 0.0 and share_at(50, 10, options) == 1.0
