"""Differentiable quantization: few points for each matrix, which learn while the weights' places between them stay.

    v = (w - min) / a,  a = max - min of a bucket of `bucket` weights;    Q(v) = the nearest of p_1 < ... < p_s,  s = 2^bits
    w^ = a Q(v) + min        dL/dp_j = sum over i with Q(v_i) = p_j of a_i dL/dw^_i
    w [out, in]    p [s] of each matrix, at first the quantiles of v
Source: Polino et al. 2018, arXiv:1802.05668. Differs: one number of bits for all matrices. The result
is a dense checkpoint of these values, as no runtime's format has points of its own for each matrix; what Huffman codes of the
indices would take stands in the results (entropy, bits for each weight).
For: seeing what learned points are worth beside fixed grids, at the same bits.
Costs: training of s numbers for each matrix: the original and the model in float32, one search of each matrix in a forward.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.model.course import Course, Trainee
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class DifferentiableQuantizationOptions(Selection, TrainingOptions):
    """How many points there are."""

    bits: int = Field(4, ge=1, le=8, description="2^bits points for each matrix")
    bucket: int = Field(256, ge=1, description="weights, in order, that share a scale")


class Points(nn.Module):
    """w^ [out, in] of the points p [s]."""

    def __init__(self, W: Tensor, options: DifferentiableQuantizationOptions) -> None:
        super().__init__()
        flat, self.shape = W.flatten(), W.shape
        rows = nn.functional.pad(flat, (0, -len(flat) % options.bucket), value=float(flat[-1])).view(-1, options.bucket)
        least, a = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True) - rows.amin(1, keepdim=True)  # [buckets, 1]
        v = (rows - least) / a.clamp_min(torch.finfo(a.dtype).tiny)  # [buckets, bucket]
        self.register_buffer("v", v)
        self.register_buffer("least", least)
        self.register_buffer("a", a)
        s = 2**options.bits
        order = v.flatten()[: len(flat)].sort().values
        middles = ((torch.arange(s, device=W.device) + 0.5) / s * len(order)).long()  # of s parts of equal count
        self.p = nn.Parameter(order[middles].clone())  # [s]

    def indices(self) -> tuple[Tensor, Tensor]:
        """The points in rising order [s], and the index of the nearest for each v [buckets, bucket]."""
        p = self.p.sort().values
        return p, torch.bucketize(self.get_buffer("v"), (p[1:] + p[:-1]).detach() / 2)

    def forward(self) -> Tensor:
        p, places = self.indices()
        rows = self.get_buffer("a") * p[places] + self.get_buffer("least")
        return rows.flatten()[: self.shape.numel()].view(self.shape)

    @torch.no_grad()
    def entropy(self) -> float:
        """Bits for each weight that its index carries."""
        counts = self.indices()[1].flatten()[: self.shape.numel()].bincount(minlength=len(self.p)).double()
        share = counts[counts > 0] / counts.sum()
        return float(-(share * share.log2()).sum())


def differentiable_quantization(trainee: Trainee, options: DifferentiableQuantizationOptions) -> Course:
    """Points in every chosen linear; nothing else trains."""
    named = trainee.replace(lambda W: Points(W, options))
    forms = {name: form for name, form in named.items() if isinstance(form, Points)}
    return Course(
        trained=tuple(form.p for form in forms.values()),
        finish=lambda: {name: f"{options.bits} bits, entropy {form.entropy():.2f}" for name, form in forms.items()},
    )


METHOD = Method(run=differentiable_quantization, options=DifferentiableQuantizationOptions, scope="course")
