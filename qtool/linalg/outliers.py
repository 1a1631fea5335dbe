"""Outliers: the definitions by which activations, weights and attention are told to have them, one function each.

    activation outlier   |x_tj| > 1000 · mean |x|                        x [tokens, channels], one window after one block
    massive activation   |x_tj| > 100 and |x_tj| > 1000 · median |x|
    emergent feature     channel j with |x_tj| >= 6 in 25 % of all layers and for 6 % of all tokens      x after a norm
    weight outlier       row or column of W whose largest weight is over 10 times the median row's or column's largest one
    attention outlier    key k with mean over heads of sum_q A[q, k] >= 0.1 · length           A [heads, queries, keys]
    kurtosis             E (x - m)⁴ / (E (x - m)²)², Pearson's: 3 is normal, 6 Laplace; not lessened by 3
Source: An et al. 2025, arXiv:2502.06415 (Systematic Outliers) for activations and attention, thresholds as in its code, and
for `peaks` of weights, to which it sets no threshold: that of weight outliers is ours. Sun et al. 2024, arXiv:2402.17762,
section 2 (massive activations). Dettmers et al. 2022, arXiv:2208.07339, section 3.1 (emergent features). He et al. 2024,
arXiv:2405.19279, equation 1 (kurtosis of channels).
Why a second measure of weights: a column that is large throughout has no peak, but it is what a quantizer's range must hold.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TIMES_MEAN = 1000.0  # an activation outlier, of the mean magnitude
MASSIVE, TIMES_MEDIAN = 100.0, 1000.0
FEATURE, OF_LAYERS, OF_TOKENS = 6.0, 0.25, 0.06
TIMES_MEDIAN_REACH = 10.0  # a weight outlier
OF_QUERIES = 0.1  # an attention outlier, of all that the queries give away
ROWS = 512  # taken in at once by `Moments`: few enough that their float64 copies are small


def activation_outliers(x: Tensor) -> Tensor:
    """Which of x [tokens, channels] are more than 1000 times their mean magnitude, bool of the same shape."""
    magnitudes = x.abs()
    return magnitudes > TIMES_MEAN * magnitudes.mean(dtype=torch.float32)


def massive_activations(x: Tensor) -> Tensor:
    """Which of x [tokens, channels] are above 100 and 1000 times their median magnitude, bool of the same shape."""
    magnitudes = x.abs()
    return (magnitudes > MASSIVE) & (magnitudes > TIMES_MEDIAN * magnitudes.median())


def emergent_features(share: Tensor) -> Tensor:
    """Channels [channels] bool that are large in enough layers and for enough tokens.

    share [layers, channels] of tokens at which the channel's magnitude is FEATURE or more.
    """
    return ((share > 0).float().mean(0) >= OF_LAYERS) & (share.mean(0) >= OF_TOKENS)


def reaches(W: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each row [out] and each column [in] of W [out, in], over the median one; zeros of W = 0."""
    magnitudes = W.abs()
    return _over_median(magnitudes.amax(1)), _over_median(magnitudes.amax(0))


def peaks(W: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude of each row [out] and each column [in] of W [out, in], over its own mean one; zero of zeros."""
    magnitudes = W.abs()
    rows = magnitudes.amax(1) / magnitudes.mean(1).clamp(min=torch.finfo(torch.float32).tiny)
    columns = magnitudes.amax(0) / magnitudes.mean(0).clamp(min=torch.finfo(torch.float32).tiny)
    return rows, columns


def channel_ratio(amax: Tensor) -> float | None:
    """Largest of the channels' largest magnitudes amax [in], over their median; None where the median is zero."""
    median = float(amax.median())
    return float(amax.max()) / median if median > 0 else None


def kurtosis(x: Tensor) -> float | None:
    """Of all values of x [rows, in]; None where they are equal."""
    moments = Moments()
    moments.update(x)
    return moments.kurtosis()


def channel_kurtosis(mean_square: Tensor) -> float | None:
    """E_j s_j⁴ / (E_j s_j²)² of the channels' root mean squares s, s² = mean_square [in]: 1 where alike, in where one rules."""
    wide = mean_square.double()
    mean = float(wide.mean())
    return float(wide.square().mean()) / mean**2 if mean > 0 else None


def received_attention(A: Tensor) -> tuple[Tensor, Tensor]:
    """What each key gets of attention A [heads, queries, keys] whose rows sum to 1, masked ones exactly 0.

    Mean over heads of sum_q A[q, k], over the number of queries, [keys], which sums to 1: late keys are seen by few queries
    and get little. And the mean over heads and over those queries alone that see the key, in units of what it would be if
    every query gave all keys that it sees the same, [keys]: 1 throughout where attention is uniform.
    """
    given = A.sum(1, dtype=torch.float32).mean(0)  # [keys], the sum over queries
    sees = (A > 0).any(0)  # [queries, keys]: hidden from every head is masked
    uniform = (sees / sees.sum(1, keepdim=True).clamp(min=1)).sum(0)  # [keys], the same sum of uniform attention
    return given / A.shape[1], given / uniform.clamp(min=torch.finfo(torch.float32).tiny)


def attention_outliers(received: Tensor) -> Tensor:
    """Keys [keys] bool that get a tenth of all attention, received [keys] as `received_attention` has it."""
    return received >= OF_QUERIES


def _over_median(largest: Tensor) -> Tensor:
    median = largest.median()
    if median == 0:  # more than half of the rows are zero: of those that are not
        positive = largest[largest > 0]
        median = positive.median() if len(positive) else torch.ones_like(median)
    return largest / median


@dataclass
class Moments:
    """Kurtosis of values that come in batches, each seen once: sums of powers about the mean, merged exactly.

    Source: Pébay 2008, Sandia report SAND2008-6212, equations 3.1 for p = 2, 3, 4.
    Why not plain sums of x⁴: of values far from zero they leave nothing but rounding. Why float64 sums: so do float32's.
    """

    n: int = 0
    mean: float = 0.0
    second: float = 0.0  # sum of (x - mean)²
    third: float = 0.0
    fourth: float = 0.0

    def update(self, x: Tensor) -> None:
        """Take in x [rows, in]."""
        for rows in x.split(ROWS):
            if rows.numel() == 0:
                continue
            wide = rows.double()
            mean = wide.mean()
            D = wide - mean
            squares = D.square()
            sums = (squares.sum(), (squares * D).sum(), squares.square().sum())
            self._merge(rows.numel(), float(mean), *(float(value) for value in sums))

    def _merge(self, n: int, mean: float, second: float, third: float, fourth: float) -> None:
        a, b, delta, total = self.n, n, mean - self.mean, self.n + n
        self.fourth += fourth + delta**4 * a * b * (a * a - a * b + b * b) / total**3
        self.fourth += 6 * delta**2 * (a * a * second + b * b * self.second) / total**2
        self.fourth += 4 * delta * (a * third - b * self.third) / total
        self.third += third + delta**3 * a * b * (a - b) / total**2 + 3 * delta * (a * second - b * self.second) / total
        self.second += second + delta**2 * a * b / total
        self.mean += delta * b / total
        self.n = total

    def kurtosis(self) -> float | None:
        """None where all values are equal, or none came."""
        spread = self.second / max(self.n, 1)
        return self.n * self.fourth / self.second**2 if spread > 1e-24 * self.mean**2 and self.second > 0 else None
