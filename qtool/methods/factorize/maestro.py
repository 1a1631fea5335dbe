"""Maestro: factors whose ranks train in an order of worth, so that the last ones can be cut off without a search.

    W^ = U Vᵀ;  at each step one linear, drawn evenly, takes U[:, :b] V[:, :b]ᵀ with b drawn evenly from 1 .. its rank
    loss + lam sum_i sum_b (‖U_i[:, b:]‖ + ‖V_i[:, b:]‖),    b = 0 .. r_i - 1    U [out, rank], V [in, rank], by SVD at first
    progressive shrinking: ranks from b on go once ‖U[:, b:]‖ ‖V[:, b:]‖ <= 1e-7
After `cut` of the steps ranks are cut by budget: the last rank of the linear goes whose ‖u_b‖² ‖v_b‖² for each number it
holds is least, until the share `keep` of numbers is left; the steps after that train what is left.
Source: Horvath et al. 2023, arXiv:2308.14929. Differs: the budget's cut comes before the end, so
that training makes up for it; with keep: 1 nothing is cut but what shrinking takes.
For: ranks that fit each matrix, found while training, where low rank is what the model is to have.
Costs: one SVD of each matrix; training: 16 bytes for each number of the factors, one dense matrix at a time.
"""

import heapq

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.model.course import Course, Trainee, random_of
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method

SHRUNK = 1e-7  # the paper's epsilon of progressive shrinking


class MaestroOptions(Selection, TrainingOptions):
    """How hard later ranks are pressed, and how many numbers are left."""

    lam: float = Field(1e-5, ge=0, description="weight of the hierarchical group lasso; tried from large on, halved")
    keep: float = Field(
        0.5, gt=0, le=1, description="share of the chosen linears' numbers that is left; 1: what shrinking leaves"
    )
    cut: float = Field(0.5, ge=0, le=1, description="share of the steps after which ranks are cut to keep")


class OrderedRanks(nn.Module):
    """W^ [out, in] of U and V; `rank` of their columns are left, and `shown` of those count in this step."""

    def __init__(self, W: Tensor) -> None:
        super().__init__()
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)  # [out, least], [least], [least, in]
        self.U = nn.Parameter(U * S.sqrt())  # [out, rank]
        self.V = nn.Parameter(Vt.T * S.sqrt())  # [in, rank]
        self.register_buffer("rank", torch.tensor(len(S)))
        self.shown = len(S)

    def forward(self) -> Tensor:
        return self.U[:, : self.shown] @ self.V[:, : self.shown].T

    def n_ranks(self) -> int:
        return int(self.get_buffer("rank"))

    @torch.no_grad()
    def cut_to(self, rank: int) -> None:
        self.get_buffer("rank").fill_(rank)
        self.U[:, rank:] = 0
        self.V[:, rank:] = 0


def tails(U: Tensor) -> Tensor:
    """‖U[:, b:]‖ for b = 0 .. rank - 1 of U [out, rank]."""
    squares = U.square().sum(0).flip(0).cumsum(0).flip(0)  # [rank]
    return squares.clamp_min(torch.finfo(U.dtype).tiny).sqrt()  # its slope at zero is finite


@torch.no_grad()
def ranks_for(forms: list[OrderedRanks], keep: float) -> list[int]:
    """How many ranks each keeps, so that all together hold at most the share `keep` of the dense matrices' numbers."""
    sizes = [len(form.U) + len(form.V) for form in forms]  # numbers of one rank
    worth = [(form.U.square().sum(0) * form.V.square().sum(0) / size).tolist() for form, size in zip(forms, sizes, strict=True)]
    ranks = [form.n_ranks() for form in forms]
    left = sum(size * rank for size, rank in zip(sizes, ranks, strict=True))
    budget = keep * sum(len(form.U) * len(form.V) for form in forms)
    last = [(worth[i][rank - 1], i) for i, rank in enumerate(ranks) if rank > 1]
    heapq.heapify(last)
    while left > budget and last:
        _, i = heapq.heappop(last)
        ranks[i], left = ranks[i] - 1, left - sizes[i]
        if ranks[i] > 1:
            heapq.heappush(last, (worth[i][ranks[i] - 1], i))
    return ranks


def maestro(trainee: Trainee, options: MaestroOptions) -> Course:
    """Ordered factors of every chosen linear train, and all that is no chosen linear."""
    named = {name: form for name, form in trainee.replace(OrderedRanks).items() if isinstance(form, OrderedRanks)}
    forms, cut = list(named.values()), round(options.cut * trainee.steps)

    def before_step(step: int) -> None:
        if step == cut and options.keep < 1:
            for form, rank in zip(forms, ranks_for(forms, options.keep), strict=True):
                form.cut_to(rank)
        for form in forms:
            form.shown = form.n_ranks()
        if step < cut or options.keep == 1:
            random = random_of(trainee.seed, step)
            form = forms[int(torch.randint(len(forms), (1,), generator=random))]
            form.shown = 1 + int(torch.randint(form.n_ranks(), (1,), generator=random))

    def penalty() -> Tensor:
        return options.lam * torch.stack([tails(form.U).sum() + tails(form.V).sum() for form in forms]).sum()

    @torch.no_grad()
    def after_step(step: int) -> None:
        for form in forms:
            small = tails(form.U) * tails(form.V) <= SHRUNK  # [rank]
            form.cut_to(min(form.n_ranks(), max(1, int((~small).sum()))))

    def finish() -> dict[str, str]:
        if cut >= trainee.steps and options.keep < 1:
            for form, rank in zip(forms, ranks_for(forms, options.keep), strict=True):
                form.cut_to(rank)
        for form in forms:
            form.shown = form.n_ranks()
        return {name: f"rank {form.n_ranks()}" for name, form in named.items()}

    return Course(before_step=before_step, penalty=penalty, after_step=after_step, finish=finish)


METHOD = Method(run=maestro, options=MaestroOptions, scope="course")
