"""LoRC: two thin matrices, run beside a quantized linear, that give back most of what quantization took from it.

    Minimize tr((E - A B) M (E - A B)ᵀ),  E = W - W^,  A [out, rank],  B [rank, in];  the layer computes  W^ x + A (B x)
    U S Vᵀ = E M^½,  U_r the first `rank` columns of U:    A = U_r s^½,    B = s^-½ U_rᵀ E,    s = norms of the rows of U_rᵀ E
    M [in, in]    plain: I    activation: diag(mean x²)    hessian: mean of x xᵀ    W, W^, E [out, in]
With M = I the rows of U_rᵀ E are S_r V_rᵀ and s = S_r, so this is the truncated SVD, its singular values shared in halves.
Source: Yao et al. 2023, arXiv:2303.08302 (ZeroQuant-V2), section 5; weighting: Zhang et al. 2024, arXiv:2410.06040 (QERA).
Why U_rᵀ E and not (S_r V_rᵀ) M^-½, which equals it: an input channel that calibration never saw has no inverse.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank, LowRankSelection
from qtool.options import Needs, Sequential
from qtool.registry import Method


class LorcOptions(LowRankSelection, Sequential):
    """Options of LoRC."""

    weighting: Literal["plain", "activation", "hessian"] = Field(
        "hessian",
        description="which error is made least: plain, that of the weights; activation, the same with each input channel "
        "counted by its mean square; hessian, that of the outputs",
    )


def lorc(E: Tensor, stats: LayerStats | None, options: LorcOptions, note: Callable[[str], None]) -> LowRank:
    """Factors of E [out, in] float32; raises QtoolError where E has not so many ranks."""
    if options.rank > min(E.shape):
        raise QtoolError(f"rank {options.rank} is more than a matrix of {tuple(E.shape)} has; use {min(E.shape)} or less")
    weighted = weigh(E, stats, options, note)  # [out, in]
    U = torch.linalg.svd(weighted, full_matrices=False).U[:, : options.rank]  # [out, rank]
    B = U.T @ E  # [rank, in]
    half = B.norm(dim=1, keepdim=True).sqrt()  # [rank, 1]
    return LowRank(U * half.T, B / half.clamp_min(torch.finfo(half.dtype).tiny))


def weigh(E: Tensor, stats: LayerStats | None, options: LorcOptions, note: Callable[[str], None]) -> Tensor:
    """E M^½ [out, in]."""
    if options.weighting == "plain":
        return E
    assert stats is not None, "a weighting by inputs runs on statistics"
    if stats.n_tokens == 0:
        note("no calibration token reached it; its error is made least without weighting")
        return E
    H = stats.hessian()  # [in, in]
    if options.weighting == "activation":
        return E * H.diagonal().sqrt()
    powers, directions = torch.linalg.eigh(H)  # [in], [in, in]
    weighted: Tensor = E @ directions * powers.clamp_min(0).sqrt()
    return weighted


def needs(options: LorcOptions) -> Needs:
    """A Hessian where inputs count."""
    return () if options.weighting == "plain" else ("hessian",)


METHOD = Method(run=lorc, options=LorcOptions, scope="linear", needs=needs)
