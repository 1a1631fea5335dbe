"""The factor of a damped inverse Hessian that column-by-column methods walk along.

    UᵀU = (H + damp·mean(diag H)·I)⁻¹      H [in, in] mean of x xᵀ      U [in, in] upper triangular
    U_cc² = [(H_{c:, c:})⁻¹]_cc, the inverse curvature of column c once all columns before it are fixed
Source: Frantar et al. 2022, arXiv:2210.17323, section 3.3. Differs: one Cholesky factorization of H, from its last
column to its first, H = R Rᵀ with R upper, gives U = R⁻¹, so the inverse of H itself is never formed.
Why no special case for dead columns (H_cc = 0): damping alone is their curvature, so they are rounded where they stand,
disturb no other column, hardly count in a range search, and their weights survive for inputs that calibration missed.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qtool.errors import QtoolError


def inverse_factor(H: Tensor, damp: float, note: Callable[[str], None], order: Tensor | None = None) -> Tensor:
    """U [in, in] of H [in, in], its columns taken in `order` [in]; the identity where H is zero, as nothing is known then.

    Damping that is too little is multiplied by ten, up to 1, and noted. Raises QtoolError where H is not finite.
    H is only read; beside it at most two matrices of its size are in memory at once.
    """
    mean = float(H.diagonal().mean())
    if not math.isfinite(mean) or not torch.isfinite(H).all():
        raise QtoolError("the Hessian holds NaN or infinity; check the model's weights and load it with dtype: float32")
    if mean == 0:
        return torch.eye(len(H), device=H.device)
    turns = torch.arange(len(H), device=H.device) if order is None else order
    level = damp
    while True:
        R = H[turns.flip(0)][:, turns.flip(0)]  # [in, in], last turn first
        R.diagonal().add_(level * mean)
        info = torch.linalg.cholesky_ex(R, out=(R, torch.empty((), dtype=torch.int32, device=H.device))).info
        if info == 0:
            break
        if level >= 1:
            raise QtoolError("the Hessian is not positive definite even with damp 1; calibrate with more text")
        level = min(10 * level, 1.0)
    if level > damp:
        note(f"damping raised to {level:g}")
    inverse = torch.eye(len(H), device=H.device)  # [in, in]
    torch.linalg.solve_triangular(R, inverse, upper=False, out=inverse)
    del R
    return inverse.flip(0, 1)
