"""RoundedLinear: a linear layer whose rounding and ranges learn while its weights stay as they are.

    W^ = scale · level(W / scale + V)      scale, zero: of the range [beta min W, alpha max W] of each group
    W [out, in]    V [out, in] in [-1/2, 1/2], in units of the scale    alpha, beta [out, groups, 1] in [0, 1]
`level` is the nearest level of the grid. It and the rounding of scales and zero points pass gradients straight through;
beyond the last level nothing reaches V.
Source: Cheng et al. 2023, arXiv:2309.05516, equations 3 and 4. Differs: serves every grid, not whole numbers alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.integer import IntegerGrid, Params
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, assemble, from_groups, settle, to_groups
from qtool.layers.quant_linear import snap_per_token


class RoundedLinear(nn.Module):
    """Stands where a linear stood while its block is tuned; `quantized` tells what it has come to."""

    def __init__(self, W: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        """W [out, in], float32."""
        super().__init__()
        self.bias = bias
        self._scheme = scheme
        self._w = to_groups(W, scheme.weights)  # [out, groups, group]
        self._grid = scheme.weights.grid.for_tensor(self._w)
        self._minimum, self._maximum = self._w.amin(-1, keepdim=True), self._w.amax(-1, keepdim=True)  # [out, groups, 1]
        self.V = nn.Parameter(torch.zeros_like(self._w))
        self.alpha = nn.Parameter(torch.ones_like(self._maximum))
        self.beta = nn.Parameter(torch.ones_like(self._minimum))

    def clamp(self) -> None:
        """Bring every parameter back to where it may be."""
        with torch.no_grad():
            self.V.clamp_(-0.5, 0.5)
            self.alpha.clamp_(0, 1)
            self.beta.clamp_(0, 1)

    def weight_values(self) -> Tensor:
        """W^ [out, in], float32; gradients reach V, alpha and beta."""
        params = self._params()
        x = self._w / params.scale + self.V  # [out, groups, group]
        levels = self._grid.levels(self._codes(x, params))
        low, high = self._grid.ends
        if params.zero is None:
            inside = x.clamp(low, high)
        else:
            levels = levels - params.zero.detach()
            inside = x.clamp(low - params.zero, high - params.zero)
        return from_groups(straight_through(inside, levels) * params.scale, self._scheme.weights)

    def forward(self, x: Tensor) -> Tensor:
        if self._scheme.activations is not None:
            x = x + (snap_per_token(x, self._scheme.activations) - x).detach()
        return F.linear(x, self.weight_values().to(x.dtype), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The weights as they are rounded now."""
        params = self._params()
        codes = self._codes(self._w / params.scale + self.V, params)
        return assemble(from_groups(codes, self._scheme.weights), params, self._scheme.weights, self._grid)

    def _params(self) -> Params:
        low, high = self.beta * self._minimum, self.alpha * self._maximum  # [out, groups, 1]
        with torch.no_grad():
            stored = settle(self._grid.fit_range(low, high), self._scheme.weights)
        if stored.zero is None:
            scale = straight_through(torch.maximum(-low, high) / self._grid.largest, stored.scale)
            return Params(scale, None, stored.second)
        first, last = self._grid.ends
        if isinstance(self._grid, IntegerGrid):  # whose range holds 0
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = straight_through((high - low) / (last - first), stored.scale)
        return Params(scale, straight_through(first - low / scale, stored.zero), stored.second)

    def _codes(self, x: Tensor, params: Params) -> Tensor:
        """Codes of x [out, groups, group], which counts in units of the scale."""
        zero = None if params.zero is None else params.zero.detach()
        return self._grid.encode(x.detach(), Params(torch.ones_like(params.scale), zero))


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`."""
    return soft + (hard - soft).detach()
