"""SLTrain: each matrix as a low-rank one and single weights at fixed places, which train together.

    W^ = (alpha / r) B A + S    A [r, in], B [out, r];  S [out, in] zero but for round(density · out · in) places
    start: random   A uniform in ±1/sqrt(in), B zero, S uniform in ±1/sqrt(in), as the paper has it
    start: weights  (alpha / r) B A the best approximation of W of rank r, S what is left of W at its places
Parameters of a matrix: r (in + out) + density · in · out. The result is merged into ordinary dense weights.
Source: Han et al. 2024, arXiv:2406.02214. Differs: a start at given weights, with places where what is left is
largest as a choice; r follows from the share of parameters that `keep` leaves, where rank does not state it.
For: fewer weights to train from scratch (start: random, labels: 1), or a trained matrix with fewer numbers.
Costs: one SVD of each matrix; training: 16 bytes for each number that is kept, and one dense matrix at a time.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.model.course import Course, Trainee
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class SltrainOptions(Selection, TrainingOptions):
    """How many numbers a matrix has."""

    keep: float = Field(0.5, gt=0, le=1, description="share of each matrix's numbers that are left; without effect with rank")
    rank: int | None = Field(None, ge=1, description="r, the same for all matrices; null: what keep leaves after density")
    density: float = Field(0.03, ge=0, lt=1, description="share of places with a weight of its own")
    support: Literal["random", "largest"] = Field(
        "random", description="places: random, as in the paper; largest, where the low-rank part misses most at the start"
    )
    alpha: float = Field(32.0, gt=0, description="scale of the low-rank part, divided by r")


def rank_of(shape: tuple[int, int], options: SltrainOptions) -> int:
    """r of a matrix [out, in]; raises QtoolError where the budget leaves none."""
    out, columns = shape
    rank = options.rank or int((options.keep - options.density) * out * columns / (out + columns))
    if not 1 <= rank <= min(shape):
        raise QtoolError(f"a matrix of {shape} would have rank {rank}; use 1 to {min(shape)}, by keep, density or rank")
    return rank


class SparseAndLowRank(nn.Module):
    """W^ [out, in] of A, B and the values at fixed places."""

    def __init__(self, W: Tensor, options: SltrainOptions, random: torch.Generator) -> None:
        super().__init__()
        rank, n = rank_of((W.shape[0], W.shape[1]), options), round(options.density * W.numel())
        self._scale, bound = options.alpha / rank, W.shape[1] ** -0.5
        drawn = torch.randperm(W.numel(), generator=random)[:n]
        if options.start == "random":
            A = (torch.rand(rank, W.shape[1], generator=random) * 2 - 1) * bound
            B = torch.zeros(W.shape[0], rank)
            values = (torch.rand(n, generator=random) * 2 - 1) * bound
        else:
            U, S, Vt = torch.linalg.svd(W, full_matrices=False)  # [out, least], [least], [least, in]
            half = (S[:rank] / self._scale).sqrt()
            B, A = U[:, :rank] * half, half.unsqueeze(1) * Vt[:rank]
            left = (W - self._scale * (B @ A)).flatten()
            if options.support == "largest":
                drawn = left.abs().argsort(stable=True, descending=True)[:n]
            values = left[drawn.to(left.device)]
        places, order = drawn.to(W.device).sort()  # [n]
        self.shape = W.shape
        self.register_buffer("places", places)
        self.A, self.B = nn.Parameter(A.to(W)), nn.Parameter(B.to(W))  # [rank, in], [out, rank]
        self.values = nn.Parameter(values.to(W)[order])  # [n]

    def forward(self) -> Tensor:
        low_rank = self._scale * (self.B @ self.A)  # [out, in]
        return low_rank.flatten().index_add(0, self.get_buffer("places"), self.values).view(self.shape)


def sltrain(trainee: Trainee, options: SltrainOptions) -> Course:
    """Both parts of every chosen linear train, and all that is no chosen linear."""
    random = torch.Generator().manual_seed(trainee.seed)
    forms = trainee.replace(lambda W: SparseAndLowRank(W, options, random))

    def finish() -> dict[str, str]:
        ranks = {name: len(form.get_parameter("A")) for name, form in forms.items()}
        return {name: f"rank {rank} + {options.density:.0%} of single weights" for name, rank in ranks.items()}

    return Course(finish=finish)


METHOD = Method(run=sltrain, options=SltrainOptions, scope="course")
