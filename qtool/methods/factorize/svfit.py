"""SVFit: train the leading singular values of each matrix alone; its singular vectors and the rest stay as they are.

    W^ = W_rest + U_r diag(s) V_rᵀ,    W = U S Vᵀ,  W_rest = W - U_r S_r V_rᵀ,  s = S_r at first
    W [out, in]    r the fewest values that hold `energy` of sum S²    one trained number for each rank
Source: Sun et al. 2024, arXiv:2409.05926. Differs: the loss is the distance to the original's predictions, where
`labels` does not ask for the text's; r comes from the energy of each matrix, not one r for all.
For: bringing a pruned or reshaped model back with next to nothing to learn, and so nothing to learn by heart; a rate of 1e-3
to 1e-2.
Costs: one SVD of each matrix; training: the model in float32 twice (U and V beside W_rest), but moments of few numbers.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.model.course import Course, Trainee
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class SvfitOptions(Selection, TrainingOptions):
    """How many singular values train."""

    energy: float = Field(
        0.99, gt=0, le=1, description="share of the sum of squared singular values that those that train hold"
    )


class LeadingValues(nn.Module):
    """W^ [out, in] of s [rank]."""

    def __init__(self, W: Tensor, energy: float) -> None:
        super().__init__()
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)  # [out, least], [least], [least, in]
        held = S.square().cumsum(0) / S.square().sum().clamp_min(torch.finfo(S.dtype).tiny)
        rank = min(len(S), int((held < energy).sum()) + 1)
        leading = (U[:, :rank] * S[:rank]) @ Vt[:rank]  # [out, in]
        self.register_buffer("U", U[:, :rank].contiguous())  # [out, rank]
        self.register_buffer("Vt", Vt[:rank].contiguous())  # [rank, in]
        self.register_buffer("rest", W - leading)  # [out, in]
        self.s = nn.Parameter(S[:rank].clone())  # [rank]

    def forward(self) -> Tensor:
        return self.get_buffer("rest") + (self.get_buffer("U") * self.s) @ self.get_buffer("Vt")


def svfit(trainee: Trainee, options: SvfitOptions) -> Course:
    """A form of leading values for every chosen linear; nothing else trains."""
    forms = trainee.replace(lambda W: LeadingValues(W, options.energy))
    return Course(
        trained=tuple(form.get_parameter("s") for form in forms.values()),
        finish=lambda: {name: f"{len(form.get_parameter('s'))} singular values trained" for name, form in forms.items()},
    )


METHOD = Method(run=svfit, options=SvfitOptions, scope="course")
