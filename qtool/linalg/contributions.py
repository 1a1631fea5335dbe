"""What each unit of text contributes to a metric, from which follow standard errors, alone and in pairs.

    θ = g(R),  R = Σ w_i v_i / Σ w_i        v_i, w_i of unit i: a window, a document
    c_i = θ + g'(R) n w_i (v_i - R) / Σ w   to first order in one unit's part of the sum; their mean is θ
    se(θ) = sd(c) / √n                      se(a θ - b θ') = sd(a c_i - b c'_i) / √n, of two models over the same units
    c_b = θ + √B (θ_b - mean θ_b) of a figure of all units together, over B resamples: sd(c) / √B is the bootstrap's se(θ)
    θ - θ' is more than chance where |θ - θ'| > t se(θ - θ'),  t the 97.5 % point of Student's distribution of n - 1 degrees
Pairs take out how hard each unit is, so that a difference is known far better than either metric.
Why numbers and no tensors: a thousand or so of them, also where results are compared without any model at hand.
Source: the delta method for ratios, Cochran 1977, Sampling Techniques, section 6.4; jackknife: Tukey 1958, Ann. Math. Stat. 29;
bootstrap: Efron 1979, Ann. Stat. 7; of pairs, the same resamples for both: Koehn 2004, W04-3250, section 3.2.
"""

import math
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

CONFIDENT = 0.95  # share of the cases in which chance alone keeps within what is called no significant change
RESAMPLES = 200  # more hardly change a standard error: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 6.4


def mean_parts(values: Sequence[float], weights: Sequence[float] | None = None) -> tuple[float, ...]:
    """c_i of the weighted mean of values; without weights these are the values themselves."""
    if weights is None:
        return tuple(values)
    total = math.fsum(weights)
    mean = math.fsum(w * v for v, w in zip(values, weights, strict=True)) / total
    return tuple(mean + len(values) * w * (v - mean) / total for v, w in zip(values, weights, strict=True))


def exponential_parts(parts: Sequence[float]) -> tuple[float, ...]:
    """c_i of exp(θ), from those of θ."""
    center = math.fsum(parts) / len(parts)
    return tuple(math.exp(center) * (1 + part - center) for part in parts)


def jackknife_parts(whole: float, without: Sequence[float]) -> tuple[float, ...]:
    """c_i of any smooth statistic, from its value for all units and those without each of them in turn."""
    center = math.fsum(without) / len(without)
    return tuple(whole + (len(without) - 1) * (center - one) for one in without)


def mean_parts_of(value: float, items: Sequence[Any]) -> tuple[float, ...] | None:
    """Items of units, where they are numbers whose mean the value is."""
    if not items or not all(isinstance(item, (bool, int, float)) for item in items):
        return None
    is_mean = math.isclose(math.fsum(items) / len(items), value, rel_tol=1e-9, abs_tol=1e-12)
    return tuple(map(float, items)) if is_mean else None


def resampled_parts(value: float, items: Sequence[Any], figure: Callable[[list[Any]], float]) -> tuple[float, ...] | None:
    """c_b of a value that is the figure of all units' items together; None of one unit, or where a resample has no figure.

    Every call draws the same places of as many items, whichever model they are of.
    """
    if len(items) < 2:
        return None
    drawn = random.Random(0)  # one seed for all runs, so that runs of other seeds pair too
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as that a resample holds a single class
        try:
            found = [float(figure(drawn.choices(items, k=len(items)))) for _ in range(RESAMPLES)]
        except (ArithmeticError, ValueError):  # it divides by what a resample lacks
            return None
    if not all(map(math.isfinite, found)):
        return None
    center = math.fsum(found) / RESAMPLES
    return tuple(value + math.sqrt(RESAMPLES) * (one - center) for one in found)


def standard_error(parts: Sequence[float]) -> float | None:
    """sd(c) / √n, with n - 1; None for a single unit."""
    n = len(parts)
    if n < 2:
        return None
    center = math.fsum(parts) / n
    return math.sqrt(math.fsum((part - center) ** 2 for part in parts) / (n - 1) / n)


def difference_error(parts: Sequence[float], others: Sequence[float], factor: float = 1.0) -> float | None:
    """Standard error of θ - factor · θ', both over the same units."""
    return standard_error([part - factor * other for part, other in zip(parts, others, strict=True)])


def half_width(error: float, n_units: int | None) -> float:
    """What chance keeps to on either side in 95 of 100 cases, from a standard error over n_units units.

    Few units tell their own spread badly, which Student's t answers; None: so many that they tell it well.
    """
    from scipy.special import ndtri, stdtrit  # here, because only a finished measurement asks

    point = (1 + CONFIDENT) / 2
    return float(ndtri(point) if n_units is None else stdtrit(n_units - 1, point)) * error


def is_significant(difference: float, error: float | None, n_units: int | None) -> bool | None:
    """Whether a difference is further from zero than chance takes it in 95 of 100 cases; None where its error is unknown.

    error: its standard error, from pairs over n_units units.
    """
    return None if error is None else abs(difference) > half_width(error, n_units)
