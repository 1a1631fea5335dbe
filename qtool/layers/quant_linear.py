"""QuantLinear: a linear layer that keeps its weights as codes and decodes them when it is called.

    y = Q_a(x) W^ᵀ + bias      W^ [out, in] = decode(codes)      Q_a: per-token rounding of x, where the scheme has one
With a low-rank part, A [out, rank] and B [rank, in]: y = Q_a(x) W^ᵀ + (Q_a(x) Bᵀ) Aᵀ + bias.
Why the scale is a parameter: training may tune it while the codes stay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.integer import IntegerGrid
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import ActivationScheme
from qtool.formats.tensor import QuantizedTensor, to_groups, zero_dtype


def snap_per_token(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """x [..., in] rounded to the integer grid, one dynamic scale per token, in float32; returns x's dtype."""
    grid = IntegerGrid(scheme.bits, scheme.symmetric, "float32")
    wide = x.float()
    return grid.snap(wide, grid.fit(wide)).to(x.dtype)


class QuantLinear(nn.Module):
    """Stands where an nn.Linear (or a Conv1D) with in and out features stood."""

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None,
        activations: ActivationScheme | None = None,
        low_rank: LowRank | None = None,
    ) -> None:
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
        self.left: Tensor | None
        self.right: Tensor | None
        self.scale_of_rank: Tensor | None
        self.register_buffer("left", None if low_rank is None else low_rank.left)
        self.register_buffer("right", None if low_rank is None else low_rank.right)
        self.register_buffer("scale_of_rank", None if low_rank is None else low_rank.scale)

    @property
    def qt(self) -> QuantizedTensor:
        zero = None if self.zero is None else self.zero.to(zero_dtype(self.scheme))  # training widens float zero points
        return QuantizedTensor(self.codes, self.scale.detach(), zero, self.scheme, self.of_tensor)

    @property
    def low_rank(self) -> LowRank | None:
        if self.left is None or self.right is None:
            return None
        return LowRank(self.left, self.right, self.scale_of_rank)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Weights [out, in] that the layer amounts to, the low-rank part among them; gradients reach the scale."""
        W, low_rank = self._decoded(), self.low_rank
        return (W if low_rank is None else W + low_rank.multiply()).to(dtype)

    def _decoded(self) -> Tensor:
        """W^ [out, in], float32."""
        grouped = to_groups(self.scheme.grid.levels(self.codes), self.scheme.group)  # [out, groups, group]
        if self.zero is not None:
            grouped = grouped - self.zero.unsqueeze(-1)
        return (grouped * (self.scale.float() * self.of_tensor).unsqueeze(-1)).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = snap_per_token(x, self.activations)
        y = F.linear(x, self._decoded().to(x.dtype), self.bias)
        if (low_rank := self.low_rank) is not None:
            A, B = low_rank.factors()
            y = y + F.linear(F.linear(x, B.to(x.dtype)), A.to(x.dtype))
        return y
