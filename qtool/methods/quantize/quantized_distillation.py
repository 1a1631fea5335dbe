"""Quantized distillation: weights train in full precision, and every forward sees them rounded.

    each step:  w^ = Q(w),  gradient of  labels CE + (1 - labels) T² KL(p ‖ q)  taken at w^ moves w;  at the end Q(w) is kept
    Q rounds to nearest within each group's range, found anew in each step    w [out, in]    p, q as in distill/logits
Source: Polino et al. 2018, arXiv:1802.05668, section 3, Algorithm 1. Differs: groups and grids of the scheme, of which
w4a16g256-asym is the paper's own with buckets of 256; deterministic rounding.
For: plain schemes where training can be afforded and no second-order step was taken; after quantize/yaqa, distill/logits with
code_lr begins nearer to the end.
Costs: training: 16 bytes a parameter and the original beside it, and one rounding of each matrix in every forward.
"""

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rounded_linear import straight_through
from qtool.layers.trained_linear import TrainedLinear
from qtool.model.course import Course, Trainee, put
from qtool.model.linear import weight_of
from qtool.options import TrainingOptions
from qtool.registry import Method


class QuantizedDistillationOptions(SchemeSelection, TrainingOptions):
    """What the linears become, and how they train."""


class Master(nn.Module):
    """Q(w) [out, in] of the full weights w, whose gradient is that of Q(w)."""

    def __init__(self, W: Tensor, scheme: Scheme) -> None:
        super().__init__()
        self.w = nn.Parameter(W)  # [out, in]
        self.scheme = scheme

    def forward(self) -> Tensor:
        return straight_through(self.w, quantize(self.w.detach(), self.scheme.weights).dequantize())


def quantized_distillation(trainee: Trainee, options: QuantizedDistillationOptions) -> Course:
    """Rounded weights in every chosen linear; all of the model trains."""
    forms: dict[str, Master] = {}
    for name in trainee.linears:
        scheme, layer = options.scheme_of(name), trainee.student.get_submodule(name)
        assert scheme is not None, f"{name} is chosen, so that it has a scheme"
        if scheme.activations is not None:
            raise QtoolError(f"quantize/quantized_distillation: {name}: {scheme}: inputs stay as they are; leave a... away")
        forms[name] = Master(weight_of(layer), scheme)
        layer.get_parameter("weight").data = torch.empty(0)
        put(trainee.student, name, TrainedLinear(getattr(layer, "bias", None), forms[name]))

    @torch.no_grad()
    def finish() -> dict[str, str]:
        for name, form in forms.items():
            bias = getattr(trainee.student.get_submodule(name), "bias", None)
            put(trainee.student, name, QuantLinear(quantize(form.w.detach(), form.scheme.weights), bias))
        return {name: str(form.scheme) for name, form in forms.items()}

    return Course(finish=finish, schemes={name: form.scheme for name, form in forms.items()})


METHOD = Method(run=quantized_distillation, options=QuantizedDistillationOptions, scope="course")
