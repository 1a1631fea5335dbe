"""QuantLinear: a linear layer that keeps its weights as codes and decodes them when it is called.

    y = Q_a(x) W^ᵀ + bias      W^ [out, in] = decode(codes)      Q_a: per-token rounding of x, where the scheme has one
Why the scale is a parameter: training may tune it while the codes stay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.integer import IntegerGrid
from qtool.formats.scheme import ActivationScheme
from qtool.formats.tensor import QuantizedTensor, to_groups


def snap_per_token(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """x [..., in] rounded to the integer grid, one dynamic scale per token, in float32; returns x's dtype."""
    grid = IntegerGrid(scheme.bits, scheme.symmetric, "float32")
    wide = x.float()
    return grid.snap(wide, grid.fit(wide)).to(x.dtype)


class QuantLinear(nn.Module):
    """Stands where an nn.Linear (or a Conv1D) with in and out features stood."""

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None, activations: ActivationScheme | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = tensor.shape
        self.scheme = tensor.scheme
        self.of_tensor = tensor.of_tensor
        self.activations = activations
        self.scale = nn.Parameter(tensor.scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.codes: Tensor
        self.zero: Tensor | None
        self.register_buffer("codes", tensor.codes)
        self.register_buffer("zero", tensor.zero)

    @property
    def qt(self) -> QuantizedTensor:
        return QuantizedTensor(self.codes, self.scale.detach(), self.zero, self.scheme, self.of_tensor)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Weights [out, in] as the layer uses them; gradients reach the scale."""
        grouped = to_groups(self.scheme.grid.levels(self.codes), self.scheme.group)  # [out, groups, group]
        if self.zero is not None:
            grouped = grouped - self.zero.unsqueeze(-1)
        return (grouped * (self.scale.float() * self.of_tensor).unsqueeze(-1)).flatten(1).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = snap_per_token(x, self.activations)
        return F.linear(x, self.weight_values(x.dtype), self.bias)
