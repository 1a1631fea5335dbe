"""Descent among orthogonal matrices: Cayley SGD and Cayley Adam, whose steps are rotations themselves.

    M <- β M - G               G = ∂ loss / ∂ R    M momentum    R [..., n, n] orthogonal
    Y = M^ - M^ᵀ,  M^ = M Rᵀ - ½ R Rᵀ M Rᵀ         skew: the part of M that moves along the manifold
    M <- Y R
    R <- (I - a/2 Y)⁻¹ (I + a/2 Y) R,  a = min(rate, 2 q / ‖Y‖₁),  q = ½
The factor before R is Cayley's transform of a skew matrix, which is orthogonal, so that R stays so to the last digits of
float64. With `keeps_ones`, Y 1 = 0 too, so that R 1 stays what it is.
Adam has M <- β₁ M + (1 - β₁) G and divides Y by √v, v <- β₂ v + (1 - β₂) mean G², both without their bias of the first steps.
Source: Li et al. 2020, arXiv:2002.01113, Algorithms 1 and 2; ‖Y‖₁ as in SpinQuant's code. Differs: the linear system is solved
instead of iterated a few times; v is the mean of G² instead of its sum, so that a rate is a step of single entries.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

STEP_CAP = 0.5  # q
TINY = 1e-8  # of a norm, so that a gradient of zero does not divide by zero


class CayleySGD:
    """Moves matrices [..., n, n], float64, in place."""

    def __init__(self, matrices: Sequence[Tensor], momentum: float, keeps_ones: Sequence[bool]) -> None:
        """keeps_ones: of each matrix, whether its product with the vector of ones stays."""
        self._matrices = list(matrices)
        self._momentum = momentum
        self._keeps_ones = list(keeps_ones)
        self._M = [torch.zeros_like(R) for R in self._matrices]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step down along gradients [..., n, n] of any floating dtype."""
        for place, (R, G) in enumerate(zip(self._matrices, gradients, strict=True)):
            Y = skew_part(self._momentum * self._M[place] - G.to(R), R, self._keeps_ones[place])
            self._M[place] = Y @ R
            turn(R, Y, rate)


class CayleyAdam:
    """Moves matrices [..., n, n], float64, in place; each by the size of its own gradients."""

    def __init__(
        self, matrices: Sequence[Tensor], keeps_ones: Sequence[bool], betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        """keeps_ones: as of CayleySGD; betas: β₁ and β₂."""
        self._matrices = list(matrices)
        self._keeps_ones = list(keeps_ones)
        self._betas = betas
        self._M = [torch.zeros_like(R) for R in self._matrices]
        self._v = [R.new_zeros(*R.shape[:-2], 1, 1) for R in self._matrices]
        self._steps = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: float) -> None:
        """One step down along gradients [..., n, n] of any floating dtype."""
        first, second = self._betas
        self._steps += 1
        for place, (R, gradient) in enumerate(zip(self._matrices, gradients, strict=True)):
            G = gradient.to(R)
            v = self._v[place].mul_(second).add_((1 - second) * G.square().mean((-2, -1), keepdim=True))
            Y = skew_part(first * self._M[place] - (1 - first) * G, R, self._keeps_ones[place])
            self._M[place] = Y @ R
            size = (v / (1 - second**self._steps)).sqrt() * (1 - first**self._steps)
            turn(R, Y / size.clamp(min=torch.finfo(R.dtype).tiny), rate)


def turn(R: Tensor, Y: Tensor, rate: float) -> None:
    """R <- Cayley(a Y) R in place, a the rate, or less where Y [..., n, n] is large."""
    norm = Y.abs().sum(-2).amax(-1)[..., None, None]  # ‖Y‖₁, the largest sum of a column
    R.copy_(cayley(Y * (2 * STEP_CAP / (norm + TINY)).clamp(max=rate)) @ R)


def skew_part(M: Tensor, R: Tensor, keeps_ones: bool = False) -> Tensor:
    """Y [..., n, n], skew, with Y R the projection of M on the directions in which R stays orthogonal, and R 1 what it is."""
    Rt = R.transpose(-2, -1)
    M_hat = M @ Rt - 0.5 * R @ (Rt @ M @ Rt)
    Y = M_hat - M_hat.transpose(-2, -1)
    if keeps_ones:
        Y = Y - Y.mean(-1, keepdim=True) - Y.mean(-2, keepdim=True) + Y.mean((-2, -1), keepdim=True)
    return Y


def cayley(Y: Tensor) -> Tensor:
    """(I - Y/2)⁻¹ (I + Y/2) of a skew Y [..., n, n]: orthogonal, and I + Y to first order."""
    I = torch.eye(Y.shape[-1], dtype=Y.dtype, device=Y.device)  # noqa: E741
    found: Tensor = torch.linalg.solve(I - Y / 2, I + Y / 2)
    return found
