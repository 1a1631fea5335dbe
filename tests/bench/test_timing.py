"""Timing: medians and quartiles, floors, calls that go round over the copies."""

import pytest
import torch

from qtool.bench import timing
from qtool.bench.timing import Rates, measure_rates, n_copies, summarize, time_calls

CPU = torch.device("cpu")


def test_a_time_is_the_median_with_its_quartiles_whatever_the_order() -> None:
    timed = summarize([5.0, 1.0, 100.0, 2.0, 3.0])
    assert (timed.low, timed.median, timed.high, timed.samples) == (2.0, 3.0, 5.0, 5)
    assert summarize([4.0]) == timing.Timed(4.0, 4.0, 4.0, 1)


def test_the_floor_is_the_longer_of_moving_and_computing() -> None:
    rates = Rates(copied=100.0, computed=1000.0)
    assert rates.floor(200, 1000) == 2.0
    assert rates.floor(200, 5000) == 5.0


def test_copies_exceed_what_is_rotated() -> None:
    assert n_copies(1 << 20, CPU) * (1 << 20) >= timing.ROTATED["cpu"]
    assert n_copies(1 << 40, CPU) == 2


def test_calls_take_turns_and_there_are_always_some_samples() -> None:
    seen: list[int] = []

    def call(index: int) -> torch.Tensor:
        seen.append(index)
        return torch.empty(0)

    timed = time_calls([lambda: call(0), lambda: call(1), lambda: call(2)], CPU, 0.0)
    assert timed.samples == timing.FEWEST and timed.low <= timed.median <= timed.high
    assert seen[2:] == [0, 1, 2, 0, 1, 2, 0]  # after the first calls, which are not measured


def test_rates_are_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 22)
    monkeypatch.setitem(timing.SIDE, "cpu", 128)
    rates = measure_rates(CPU, 0.0)
    assert 1e8 < rates.copied < 1e13 and 1e8 < rates.computed < 1e16
