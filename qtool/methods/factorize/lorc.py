"""LoRC: two thin matrices, run beside a quantized linear, that give back part of what quantization took from it.

    Minimize tr((E - A B) M (E - A B)ᵀ),  E = W - W^,  A [out, rank],  B [rank, in];  the layer computes  W^ x + A (B x)
    A = U_r s^½,  B = s^-½ U_rᵀ E,  U_r the `rank` leading eigenvectors of E M Eᵀ,  s = norms of the rows of U_rᵀ E
    M [in, in]    plain: I    activation: diag(mean x²)    hessian: mean of x xᵀ    W, W^, E [out, in]
With M = I the columns of U_r are E's left singular vectors and s its singular values, so this is the paper's truncated SVD,
each value shared in halves. In general they are those of E M^½, whose best approximation U_r U_rᵀ E M^½ needs no M^-½.
Source: Yao et al. 2023, arXiv:2303.08302 (ZeroQuant-V2); weighting: Zhang et al. 2024, arXiv:2410.06040 (QERA).
How they are found, without M's root or its inverse: linalg/low_rank.py.
For: what is left of the loss after quantizing, where the runtime runs a low-rank part beside the codes.
Costs: one decomposition for each linear; 0.03 bits per weight at rank 8 in int8 of a 4096 matrix, two thin products at run
time.
"""

from collections.abc import Callable
from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank, LowRankSelection
from qtool.linalg.low_rank import directions, factors
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
    """Factors of E [out, in] float32; raises QtoolError where E has not so many ranks, or something is not finite."""
    if options.rank > min(E.shape):
        raise QtoolError(f"rank {options.rank} is more than a matrix of {tuple(E.shape)} has; use {min(E.shape)} or less")
    U, _ = directions(E, metric(stats, options, note))  # [out, least]
    return LowRank(*factors(E, U[:, : options.rank]))


def metric(stats: LayerStats | None, options: LorcOptions, note: Callable[[str], None]) -> Tensor | None:
    """M [in, in], its diagonal [in], or None for the identity."""
    if options.weighting == "plain":
        return None
    assert stats is not None, "a weighting by inputs runs on statistics"
    if stats.n_tokens == 0:
        note("no calibration token reached it; its error is made least without weighting")
        return None
    H = stats.hessian()  # [in, in]
    return H.diagonal() if options.weighting == "activation" else H


def needs(options: LorcOptions) -> Needs:
    """A Hessian where inputs count."""
    return () if options.weighting == "plain" else ("hessian",)


def added_bytes(options: LorcOptions, out: int, columns: int) -> int:
    """Of the factors of a matrix [out, columns]."""
    is_int8 = options.dtype == "int8"
    return options.rank * ((out + columns) * (1 if is_int8 else 2) + (4 if is_int8 else 0))


METHOD = Method(
    run=lorc, options=LorcOptions, scope="linear", needs=needs, adds="low-rank factors", added_bytes=added_bytes
)
