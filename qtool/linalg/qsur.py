"""QSUR, the quantization space utilization rate: how much of the cube that a quantizer covers the data fill.

    QSUR = V_X / V_box     x [in] ~ N(μ, Σ)     Σ [in, in], μ [in]     d = in
    V_X  = v_d c^(d/2) √det Σ,   v_d = π^(d/2) / Γ(d/2 + 1),   c the quantile of χ²_d:  the ellipsoid that holds a share of x
    V_box = (max_j (μ_j + r_j) - min_j (μ_j - r_j))^d,   r_j = √(c Σ_jj):              one range for all channels
Where μ = 0, c cancels:  QSUR = v_d √det Σ / (2^d max_j Σ_jj^(d/2)).
Rotations keep det Σ and change the diagonal: the best makes all Σ_jj = tr Σ / d. Whitening reaches v_d / 2^d, the most of all.
All functions give the d-th root of QSUR, as the source's figure 3 does: QSUR itself is 0 in floating point from d = 100 on.
Source: Hu et al. 2025, arXiv:2501.13987 (OSTQuant), section 3. Differs: r_j is the ellipsoid's true extent. The source takes
the end points of the longest axis alone, r = √(c λ₁) |q₁|, which leaves the box too small; `extent="paper"` does the same.
A score, no bound of an error: beside it, look at the error of the rounding itself.
Memory: one float64 copy of Σ, and its factor.
"""

import math
from typing import Literal

import torch
from torch import Tensor

CONFIDENCE = 0.99  # of x that the ellipsoid holds
SHRINKAGE = 1e-3  # far above what few tokens leave of Σ's smallest eigenvalues, far below its mean one
HALVINGS = 80


def qsur(
    Sigma: Tensor,
    mean: Tensor | None = None,
    shrinkage: float = SHRINKAGE,
    confidence: float = CONFIDENCE,
    extent: Literal["exact", "paper"] = "exact",
) -> float | None:
    """QSUR^(1/d) of a covariance Sigma [in, in] and a mean [in], which is 0 where not given; None where nothing varies.

    Sigma is only read: first it becomes (1 - shrinkage) Σ + shrinkage · tr Σ / d · I, because a Σ of fewer tokens than
    channels, or with a channel that never changes, has no volume at all. Rotations of x pass through the shrinkage:
    qsur(R.T @ Sigma @ R, R.T @ mean) is what it becomes after x -> x R.
    """
    d = len(Sigma)
    trace = float(Sigma.diagonal().sum(dtype=torch.float64))
    if trace <= 0:
        return None
    S = Sigma.double() * (1 - shrinkage)  # [in, in], float64: eigenvalues may lie further apart than float32 has digits
    S.diagonal().add_(shrinkage * trace / d)
    # c and d leave the ratio through 1/d: log of √c, which a mean of zero makes cancel.
    half = 0.5 * math.log(chi_square_quantile(d, confidence)) if mean is not None else 0.0
    reach = math.exp(half) * (S.diagonal().sqrt() if extent == "exact" else longest_axis(S))  # r [in]
    centre = torch.zeros_like(reach) if mean is None else mean.double().to(reach.device)
    side = float((centre + reach).max() - (centre - reach).min())
    factor, info = torch.linalg.cholesky_ex(S)
    if int(info) != 0:
        return 0.0  # without shrinkage: an ellipsoid without volume
    log_det = 2 * float(factor.diagonal().log().sum())
    return math.exp(log_ball(d) / d + half + log_det / (2 * d) - math.log(side))


def most(d: int) -> float:
    """The largest QSUR^(1/d) of d channels, that of x whose channels are independent and vary alike."""
    return math.exp(log_ball(d) / d - math.log(2))


def log_ball(d: int) -> float:
    """log v_d, of the volume of the ball of radius 1 in d dimensions."""
    return d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)


def longest_axis(S: Tensor) -> Tensor:
    """√λ₁ |q₁| [in] of S [in, in]: how far the end of its ellipsoid's longest axis lies out in each channel."""
    values, vectors = torch.linalg.eigh(S)
    axis: Tensor = values[-1].sqrt() * vectors[:, -1].abs()
    return axis


def chi_square_quantile(d: int, share: float) -> float:
    """c with P(χ²_d <= c) = share, by halving of P(d/2, c/2), the regularised incomplete gamma function."""
    a = torch.tensor(d / 2, dtype=torch.float64)
    low, high = 0.0, d + 20 * math.sqrt(2 * d) + 100.0  # beyond it lies less than 1e-20
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        below = float(torch.special.gammainc(a, torch.tensor(middle / 2, dtype=torch.float64)))
        low, high = (middle, high) if below < share else (low, middle)
    return (low + high) / 2
