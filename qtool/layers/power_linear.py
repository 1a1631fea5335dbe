"""PowerLinear: a linear layer on a power grid whose codes, over their whole range, and whose exponent learn.

    W^ = scale · level(round(v)),   level(k) = sign(k) (|k| / m)^(1/a),  k = -m .. m,  m = 2^(bits-1) - 1
    v [out, in]: each weight's place among the codes    a: one exponent of the layer    scale [out, groups]: largest |W|
At first v is where W lies between the two levels around it, so that round(v) is the nearest level, and a the exponent of least
squared error. v receives its gradient as if levels were joined by straight lines, which at 0 have a slope, as the power itself
has not; a receives that of the levels in use.
Source: Yvinec et al. 2023, arXiv:2308.05600 (NUPES).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.codebook import EXPONENTS, PowerGrid
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, assemble, from_groups, settle, to_groups
from qtool.layers.quant_linear import snap_inputs


class PowerLinear(nn.Module):
    """Stands where a linear stood while its block is tuned; `quantized` tells what it has come to."""

    def __init__(self, W: Tensor, bias: Tensor | None, scheme: Scheme) -> None:
        """W [out, in], float32."""
        super().__init__()
        self.bias = bias
        self._scheme = scheme
        w = to_groups(W, scheme.weights)  # [out, groups, group]
        grid = scheme.weights.grid.for_tensor(w)
        assert isinstance(grid, PowerGrid), f"{scheme} is no power grid"
        self._grid, self._m = grid, (1 << (scheme.weights.bits - 1)) - 1
        self._params = settle(grid.fit(w), scheme.weights)
        below, above = grid.neighbours(w, self._params)
        low, high = grid.decode(below, self._params), grid.decode(above, self._params)
        share = ((w - low) / (high - low).clamp(min=torch.finfo(torch.float32).tiny)).clamp(0, 1)
        self.v = nn.Parameter((below - self._m + share * (high > low)).clamp(-self._m, self._m))
        self.a = nn.Parameter(torch.tensor(grid.exponent, device=W.device))

    def clamp(self) -> None:
        """Bring every parameter back to where it may be."""
        with torch.no_grad():
            self.v.clamp_(-self._m, self._m)
            self.a.clamp_(*EXPONENTS)

    def weight_values(self) -> Tensor:
        """W^ [out, in], float32; gradients reach v and a."""
        below = self.v.detach().floor().clamp(max=self._m - 1)  # [out, groups, group]
        with torch.no_grad():
            slope = self._level(below + 1) - self._level(below)
        levels = self._level(self.v.detach().round()) + slope * (self.v - self.v.detach())
        return from_groups(levels * self._params.scale, self._scheme.weights)

    def forward(self, x: Tensor) -> Tensor:
        if self._scheme.activations is not None:
            x = x + (snap_inputs(x, self._scheme.activations) - x).detach()
        return F.linear(x, self.weight_values().to(x.dtype), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The weights as they are rounded now."""
        codes = from_groups(self.v.round() + self._m, self._scheme.weights)
        return assemble(codes, self._params, self._scheme.weights, self._grid.with_exponent(float(self.a)))

    def _level(self, k: Tensor) -> Tensor:
        """Levels of whole k [...]; gradients reach a."""
        size = ((k.abs().clamp(min=1).log() - math.log(self._m)) / self.a).exp()
        return k.sign() * size
