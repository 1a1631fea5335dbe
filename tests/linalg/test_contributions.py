"""Contributions of units: their standard errors against the bootstrap and against worked cases."""

import math
import random
import statistics

import pytest

from qtool.linalg.contributions import (
    RESAMPLES,
    difference_error,
    exponential_parts,
    half_width,
    is_significant,
    jackknife_parts,
    mean_parts,
    mean_parts_of,
    resampled_parts,
    standard_error,
)


def draws(n: int, seed: int) -> list[float]:
    source = random.Random(seed)
    return [source.gauss(2.0, 0.5) for _ in range(n)]


def bootstrap(statistic, n: int) -> float:  # type: ignore[no-untyped-def]
    """Standard deviation of a statistic of resampled unit numbers."""
    source = random.Random(7)
    return statistics.stdev(statistic([source.randrange(n) for _ in range(n)]) for _ in range(1000))


def test_a_plain_mean_has_the_textbook_error() -> None:
    assert mean_parts([1.0, 2.0, 6.0]) == (1.0, 2.0, 6.0)
    assert standard_error([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt(7 / 3))
    assert standard_error([1.0]) is None


def test_parts_of_a_weighted_mean_average_to_it_and_its_error_is_the_bootstraps() -> None:
    values, weights = draws(60, 0), [float(1 + i % 5) for i in range(60)]
    parts = mean_parts(values, weights)
    mean = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    assert statistics.fmean(parts) == pytest.approx(mean, rel=1e-12)

    def resampled(units: list[int]) -> float:
        return sum(values[i] * weights[i] for i in units) / sum(weights[i] for i in units)

    assert standard_error(parts) == pytest.approx(bootstrap(resampled, 60), rel=0.1)  # 1000 resamples know it to 3 %


def test_a_paired_difference_of_exponentials_has_the_bootstraps_error() -> None:
    before = draws(60, 1)
    after = [loss + 0.05 + 0.1 * extra for loss, extra in zip(before, draws(60, 2), strict=True)]
    parts, others = exponential_parts(mean_parts(after)), exponential_parts(mean_parts(before))

    def resampled(units: list[int]) -> float:
        return math.exp(statistics.fmean(after[i] for i in units)) - math.exp(statistics.fmean(before[i] for i in units))

    paired = difference_error(parts, others)
    assert paired == pytest.approx(bootstrap(resampled, 60), rel=0.1)
    alone = standard_error(parts)
    assert alone is not None and paired is not None and paired < alone / 2  # how hard a text is cancels


def test_a_factor_scales_what_is_taken_away() -> None:
    parts = draws(20, 3)
    assert difference_error(parts, [part / 1.05 for part in parts], 1.05) == pytest.approx(0, abs=1e-12)


def test_the_jackknife_of_a_mean_is_the_mean() -> None:
    values = draws(30, 4)
    without = [statistics.fmean(values[:left] + values[left + 1 :]) for left in range(30)]
    parts = jackknife_parts(statistics.fmean(values), without)
    assert parts == pytest.approx(values, rel=1e-9)


def test_resamples_of_a_median_have_the_bootstraps_error_and_pair_by_place() -> None:
    before = draws(101, 5)
    after = [value + 0.1 for value in before]
    parts, others = (resampled_parts(statistics.median(values), values, statistics.median) for values in (after, before))
    assert parts is not None and others is not None and len(parts) == RESAMPLES
    assert statistics.fmean(parts) == pytest.approx(statistics.median(after))
    assert difference_error(parts, others) == pytest.approx(0, abs=1e-12)  # the same units, each 0.1 more
    error = bootstrap(lambda units: statistics.median(before[i] for i in units), 101)
    assert standard_error(others) == pytest.approx(error, rel=0.2)  # 200 resamples know it to 5 %, 1000 to 2 %


def test_where_a_resample_has_no_figure_there_is_no_error() -> None:
    assert resampled_parts(1.0, [1.0], statistics.median) is None
    assert resampled_parts(1.0, [(1, 1), (1, 0)], lambda items: sum(a for a, _ in items) / sum(b for _, b in items)) is None
    assert resampled_parts(math.nan, [1.0, 2.0], lambda items: math.nan) is None
    assert mean_parts_of(0.5, [True, False]) == (1.0, 0.0) and mean_parts_of(0.4, [True, False]) is None
    assert mean_parts_of(0.5, [(0.5, 1)]) is None and mean_parts_of(0.5, []) is None


@pytest.mark.parametrize(("error", "verdict"), [(0.1, False), (0.04, True), (None, None), (0.0, True)])
def test_a_difference_counts_beyond_two_errors(error: float | None, verdict: bool | None) -> None:
    assert is_significant(0.1, error, 1000) is verdict


@pytest.mark.parametrize(("n_units", "point"), [(2, 12.706), (3, 4.303), (11, 2.228), (121, 1.980)])
def test_few_units_need_more_standard_errors_as_students_table_has_it(n_units: int, point: float) -> None:
    assert is_significant(point + 0.001, 1.0, n_units) is True
    assert is_significant(-point + 0.001, 1.0, n_units) is False


def test_an_interval_is_what_a_difference_must_leave_to_count() -> None:
    for n_units, point in ((3, 4.302653), (None, 1.959964)):  # as tables have them; many units: the normal distribution's
        width = half_width(0.5, n_units)
        assert width == pytest.approx(0.5 * point, rel=1e-6)
        assert is_significant(1.001 * width, 0.5, n_units) is True and is_significant(0.999 * width, 0.5, n_units) is False


def test_chance_alone_is_called_significant_in_one_of_twenty_cases() -> None:
    cases = [[value - 2.0 for value in draws(4, seed)] for seed in range(2000)]
    found = sum(bool(is_significant(statistics.fmean(case), standard_error(case), 4)) for case in cases)
    assert found / 2000 == pytest.approx(0.05, abs=0.015)  # three standard errors; with 1.96 it were 0.14


def test_nothing_is_no_significant_change() -> None:
    assert is_significant(0.0, 0.0, 5) is False
