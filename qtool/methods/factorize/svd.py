"""SVD: each linear as two thin matrices that lose least of its outputs, ranks shared out by one budget; then they train.

    Minimize tr((W - A B) M (W - A B)ᵀ) over A [out, r], B [r, in]:    U_r Σ_r V_rᵀ S⁻¹ of the truncated SVD of W S,  S Sᵀ = M
    M [in, in]    plain: I    activation: diag(mean x²)    hessian: mean of x xᵀ + damp · its mean diagonal · I
    r_l: least sum over linears of (lost / all energy of W S), with sum over linears of r (out + in) <= keep · sum of out · in
A linear that loses too much for what it would save stays whole. Inputs are those of the model before the step.
Source: SVD-LLM: Wang et al. 2024, arXiv:2403.07378; activation: ASVD, Yuan et al. 2023, arXiv:2312.05821. Differs: SVD-LLM's
root S is M's Cholesky factor, but any gives the same product, so none is formed; ASVD's diagonal is a power of mean |x|; ranks
by a budget over all linears in place of one share for each (see linalg/low_rank.py).
For: low rank at once, without training (steps: 0), or as the start of it; factorize/maestro finds ranks while training.
Costs: a pass over the text in float32, [in, in] numbers for each input, one decomposition of each matrix; training: 16 bytes
for each number that is left.
"""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.calibration.statistics import LayerStats, observe_inputs
from qtool.errors import QtoolError
from qtool.linalg.low_rank import directions, factors, ranks_within
from qtool.model.course import Course, Trainee
from qtool.model.linear import shape_of, weight_of
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class SvdOptions(Selection, TrainingOptions):
    """How many numbers are left, and which error is made least."""

    keep: float = Field(0.5, gt=0, le=1, description="share of the chosen linears' numbers that is left, all together")
    weighting: Literal["plain", "activation", "hessian"] = Field(
        "hessian",
        description="which error is made least: plain, that of the weights; activation, the same with each input channel "
        "counted by its mean square; hessian, that of the outputs",
    )
    damp: float = Field(0.01, ge=0, le=1, description="share of mean(diag H) added to it, for inputs that no text showed")


class TwoFactors(nn.Module):
    """W^ [out, in] of A [out, rank] and B [rank, in]."""

    def __init__(self, W: Tensor, U: Tensor) -> None:
        super().__init__()
        A, B = factors(W, U)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def forward(self) -> Tensor:
        return self.A @ self.B


def metric(stats: LayerStats, options: SvdOptions) -> Tensor | None:
    """M [in, in], its diagonal [in], or None for the identity, as where no token came."""
    if options.weighting == "plain" or stats.n_tokens == 0:
        return None
    H = stats.hessian()  # [in, in]
    if options.weighting == "activation":
        return H.diagonal()
    return H + options.damp * H.diagonal().mean() * torch.eye(len(H), device=H.device)


def svd(trainee: Trainee, options: SvdOptions) -> Course:
    """Factors in place of the linears that are cut; they train, and so does all the rest."""
    layers = {name: trainee.student.get_submodule(name) for name in trainee.linears}
    stats = {name: LayerStats(shape_of(layer)[1], ()) for name, layer in layers.items()}
    if options.weighting != "plain":
        stats = observe_inputs(trainee.student, trainee.linears, trainee.windows)
    found = {}
    for name, layer in layers.items():
        if options.weighting != "plain" and stats[name].n_tokens == 0:
            trainee.note(f"{name}: no calibration token reached it; the error of its weights is made least")
        try:
            found[name] = directions(weight_of(layer), metric(stats.pop(name), options))
        except QtoolError as error:
            raise QtoolError(f"factorize/svd: {name}: {error}") from error
    try:
        ranks = ranks_within([e for _, e in found.values()], [shape_of(layer) for layer in layers.values()], options.keep)
    except QtoolError as error:
        raise QtoolError(f"factorize/svd: {error}") from error
    cut = {name: rank for name, rank in zip(layers, ranks, strict=True) if rank is not None}
    leading = iter([found[name][0][:, :rank] for name, rank in cut.items()])
    replace(trainee, linears=tuple(cut)).replace(lambda W: TwoFactors(W, next(leading)))
    return Course(finish=lambda: {name: f"rank {cut[name]}" if name in cut else "dense" for name in layers})


METHOD = Method(run=svd, options=SvdOptions, scope="course")
