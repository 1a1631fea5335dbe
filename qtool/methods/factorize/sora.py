"""SoRA: a low-rank change of each matrix whose ranks have gates, which a proximal step lets go to zero one by one.

    W^ = W + (alpha / r) B diag(g) A,    g <- sign(g) max(|g| - xi, 0) after every step    W [out, in] stays as it is
    A [r, in], B [out, r], g [r];    B = 0 and g ~ N(0, 1) at first;    xi rises from 0 to its end in `stages`
Ranks whose gate is zero change nothing, and are counted as gone; those that are left are merged into W.
Source: Ding et al. 2023, arXiv:2311.11696. Differs: the threshold is the soft one of the paper's
equation, where the released code also zeroes what is left between xi and 2 xi; the loss is the distance to the original's
predictions, where `labels` does not ask for the text's.
For: bringing a compressed model back where few weights may learn; the data say how many ranks each matrix takes.
Costs: training: the model in float32, moments of r (in + out) numbers a matrix.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.model.course import Course, Trainee
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class SoraOptions(Selection, TrainingOptions):
    """How many ranks at most, and how strongly gates are drawn to zero."""

    rank: int = Field(8, ge=1, description="ranks of each matrix at first, r")
    alpha: float = Field(16.0, gt=0, description="scale of the change, divided by r")
    xi: float = Field(3e-4, ge=0, description="what every step takes off each gate in the last stage; more of it, fewer ranks")
    stages: int = Field(1, ge=1, description="stages in which xi rises to its end; 1: it is there from the first step")


class GatedRanks(nn.Module):
    """W^ [out, in] of A, B and the gates g."""

    def __init__(self, W: Tensor, options: SoraOptions, random: torch.Generator) -> None:
        super().__init__()
        out, columns = W.shape
        bound = columns**-0.5  # Kaiming's uniform draw with a = sqrt(5), as LoRA's A
        A = (torch.rand(options.rank, columns, generator=random) * 2 - 1) * bound
        self.register_buffer("W", W)
        self.A = nn.Parameter(A.to(W.device))  # [rank, in]
        self.B = nn.Parameter(W.new_zeros(out, options.rank))  # [out, rank]
        self.g = nn.Parameter(torch.randn(options.rank, generator=random).to(W.device))  # [rank]
        self._scale = options.alpha / options.rank

    def forward(self) -> Tensor:
        return self.get_buffer("W") + self._scale * ((self.B * self.g) @ self.A)


def shrink(g: Tensor, xi: float) -> Tensor:
    """The proximal step of xi |g|: the soft threshold."""
    return g.sign() * (g.abs() - xi).clamp_min(0)


def sora(trainee: Trainee, options: SoraOptions) -> Course:
    """A gated change of every chosen linear; nothing else trains."""
    random = torch.Generator().manual_seed(trainee.seed)
    forms = trainee.replace(lambda W: GatedRanks(W, options, random))
    gates = [form.get_parameter("g") for form in forms.values()]

    @torch.no_grad()
    def after_step(step: int) -> None:
        stage = step * options.stages // trainee.steps  # 0 .. stages - 1
        xi = options.xi * (stage + 1 if options.stages == 1 else stage) / max(1, options.stages - 1)
        for g in gates:
            g.copy_(shrink(g, xi))

    return Course(
        after_step=after_step,
        trained=tuple(p for form in forms.values() for p in form.parameters()),
        finish=lambda: {name: f"rank {int((form.get_parameter('g') != 0).sum())} added" for name, form in forms.items()},
    )


METHOD = Method(run=sora, options=SoraOptions, scope="course")
