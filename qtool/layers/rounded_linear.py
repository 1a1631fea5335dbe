"""RoundedLinear: a linear layer with rounded weights whose rounding, ranges and weights gradients can reach.

    W^ = scale · level(W / scale + V)      scale, zero: of the range [beta min W, alpha max W] of each group
    W [out, in]    V [out, groups, group] in [-1/2, 1/2], in units of the scale    alpha, beta [out, groups, 1] in [0, 1]
`level` is the nearest level of the grid. It and the rounding of scales and zero points pass gradients straight through;
beyond the last level nothing reaches V. Without V, alpha and beta it is rounding to nearest in the full range. Inputs are
rounded in the same way, where the scheme says so, so that gradients also shrink the range that one token's outlier widens.
Source: Cheng et al. 2023, arXiv:2309.05516, equations 3 and 4. Differs: serves every grid, not whole numbers alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.inputs import fit_inputs, grouped_inputs, outlying
from qtool.formats.integer import Params
from qtool.formats.scheme import ActivationScheme, Grid, Scheme
from qtool.formats.tensor import QuantizedTensor, assemble, from_groups, settle, to_groups


class RoundedLinear(nn.Module):
    """Stands where a linear stood while its block is tuned; `quantized` tells what it has come to."""

    def __init__(
        self,
        W: Tensor,
        bias: Tensor | None,
        scheme: Scheme,
        alpha: Tensor | float = 1.0,
        beta: Tensor | float = 1.0,
        V: Tensor | float = 0.0,
    ) -> None:
        """W [out, in], float32; whoever tunes owns what learns and may change it in place."""
        super().__init__()
        self.bias = bias
        self._scheme = scheme
        self._w = to_groups(W, scheme.weights)  # [out, groups, group]
        self._grid = scheme.weights.grid.for_tensor(self._w.detach())
        self._minimum, self._maximum = self._w.amin(-1, keepdim=True), self._w.amax(-1, keepdim=True)  # [out, groups, 1]
        self._alpha, self._beta, self._V = alpha, beta, V

    def weight_values(self) -> Tensor:
        """W^ [out, in], float32; gradients reach W, alpha, beta and V."""
        return from_groups(soft_snap(self._w, self._grid, self._params(), self._V), self._scheme.weights)

    def forward(self, x: Tensor) -> Tensor:
        if self._scheme.activations is not None:
            x = soft_snap_inputs(x, self._scheme.activations)
        return F.linear(x, self.weight_values().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def quantized(self) -> QuantizedTensor:
        """The weights as they are rounded now."""
        params = self._params()
        codes = codes_of(self._w / params.scale + self._V, self._grid, params)
        return assemble(from_groups(codes, self._scheme.weights), params, self._scheme.weights, self._grid)

    def _params(self) -> Params:
        low, high = self._beta * self._minimum, self._alpha * self._maximum  # [out, groups, 1]
        with torch.no_grad():
            stored = settle(self._grid.fit_range(low, high), self._scheme.weights)
        return soft_params(self._grid, low, high, stored)


def soft_params(grid: Grid, low: Tensor, high: Tensor, stored: Params) -> Params:
    """The params as they are stored for the range from low to high [..., 1], with gradients that reach both ends."""
    scale = straight_through(grid.reach(low, high, stored.zero) / grid.largest * stored.scale.sign(), stored.scale)
    zero = None if stored.zero is None else straight_through(grid.zero_of(low, high), stored.zero)
    return Params(scale, zero, stored.second)


def soft_snap(w: Tensor, grid: Grid, params: Params, V: Tensor | float = 0.0) -> Tensor:
    """w [..., group] moved to the levels nearest to w / scale + V; gradients reach w, params and V."""
    return soft_levels(w / params.scale + V, grid, params) * params.scale


def soft_levels(x: Tensor, grid: Grid, params: Params) -> Tensor:
    """The levels nearest to x [..., group], both in units of the scale; gradients reach x and zero points."""
    levels = grid.levels(codes_of(x, grid, params))
    low, high = grid.ends
    if params.zero is None:
        inside = x.clamp(low, high)
    else:
        levels = levels - params.zero.detach()
        inside = x.clamp(low - params.zero, high - params.zero)
    return straight_through(inside, levels)


def soft_snap_inputs(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """`snap_inputs` of x [..., in], through whose rounding gradients reach x and each range; in x's dtype."""
    grid, kept = scheme.grid, outlying(x, scheme)
    wide = grouped_inputs(x.float() if kept is None else x.float().masked_fill(kept, 0), scheme)  # [..., groups, group]
    low, high = wide.amin(-1, keepdim=True), wide.amax(-1, keepdim=True)  # [..., groups, 1]
    with torch.no_grad():
        stored = fit_inputs(wide, scheme)
    snapped = soft_snap(wide, grid, soft_params(grid, low, high, stored)).view(x.shape).to(x.dtype)
    return snapped if kept is None else torch.where(kept, x, snapped)


def codes_of(x: Tensor, grid: Grid, params: Params) -> Tensor:
    """Codes of x [..., group], which counts in units of the scale."""
    zero = None if params.zero is None else params.zero.detach()
    return grid.encode(x.detach(), Params(torch.ones_like(params.scale), zero))


def straight_through(soft: Tensor, hard: Tensor) -> Tensor:
    """The values of `hard` with the gradient of `soft`."""
    return soft + (hard - soft).detach()


def group_values(W: Tensor, scheme: Scheme, value: float) -> Tensor:
    """One value for each group of W [out, in], [out, groups, 1], such as alpha or beta."""
    return torch.full_like(to_groups(W, scheme.weights)[..., :1], value)
