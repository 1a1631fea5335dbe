"""What each unit of text contributes to a metric, from which follow standard errors, alone and in pairs.

    θ = g(R),  R = Σ w_i v_i / Σ w_i        v_i, w_i of unit i: a window, a document
    c_i = θ + g'(R) n w_i (v_i - R) / Σ w   to first order in one unit's part of the sum; their mean is θ
    se(θ) = sd(c) / √n                      se(a θ - b θ') = sd(a c_i - b c'_i) / √n, of two models over the same units
    θ - θ' is more than chance where |θ - θ'| > t se(θ - θ'),  t the 97.5 % point of Student's distribution of n - 1 degrees
Pairs take out how hard each unit is, so that a difference is known far better than either metric.
Why numbers and no tensors: a thousand or so of them, also where results are compared without any model at hand.
Source: the delta method for ratios, Cochran 1977, Sampling Techniques, section 6.4; jackknife: Tukey 1958, Ann. Math. Stat. 29.
"""

import math
from collections.abc import Sequence

CONFIDENT = 0.95  # share of the cases in which chance alone keeps within what is called no significant change


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


def is_significant(difference: float, error: float | None, n_units: int) -> bool | None:
    """Whether a difference is further from zero than chance takes it in 95 of 100 cases; None where its error is unknown.

    error: its standard error, from pairs over n_units units. Few tell their own spread badly, which Student's t answers.
    """
    if error is None:
        return None
    from scipy.special import stdtrit  # here, because only a finished measurement asks

    return abs(difference) > float(stdtrit(n_units - 1, (1 + CONFIDENT) / 2)) * error
