"""LearnedCodes: a quantized linear layer whose codes learn too, while the whole model trains.

    W^ = scale · level(x)      x [out, groups, group], in units of the scale; at first the codes' own levels
`level` is the nearest level of the grid and passes gradients straight through; beyond the last level nothing reaches x. A code
changes once its x has moved half a step between levels, so that gradients which agree from window to window count and noise
does not. Zero points stay as they are.
Source: Bengio et al. 2013, arXiv:1308.3432 (the straight-through estimator); Liu et al. 2023, arXiv:2305.17888 (LLM-QAT:
training by the original's own predictions). Differs: starts on the levels that another method found, not at the weights.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.tensor import from_groups, to_groups
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.layers.rounded_linear import codes_of, soft_levels


class LearnedCodes(nn.Module):
    """Stands where a QuantLinear stood while a model trains; `quantized` gives the QuantLinear that it has become."""

    def __init__(self, layer: QuantLinear) -> None:
        """layer: plain, with codes of one weight each."""
        super().__init__()
        self._qt = layer.qt
        self.activations, self.bias, self.scale = layer.activations, layer.bias, layer.scale
        self._inputs = layer.inputs
        levels = to_groups(self._qt.grid.levels(self._qt.codes), self._qt.scheme)  # [out, groups, group]
        zero = self._qt.params().zero
        self.places = nn.Parameter(levels if zero is None else levels - zero)

    def forward(self, x: Tensor) -> Tensor:
        params = replace(self._qt, scale=self.scale).params()
        W = soft_levels(self.places, self._qt.grid, params) * params.scale  # [out, groups, group]
        x = x if self.activations is None else snap_inputs(x, self.activations, self._inputs)
        return F.linear(x, from_groups(W, self._qt.scheme).to(x.dtype), self.bias)

    @torch.no_grad()
    def quantized(self) -> QuantLinear:
        """The layer with its codes and its scale as they are now."""
        codes = codes_of(self.places, self._qt.grid, self._qt.params())  # [out, groups, group]
        codes = from_groups(codes, self._qt.scheme).to(self._qt.codes.dtype)
        tensor = replace(self._qt, codes=codes, scale=self.scale.detach())
        return QuantLinear(tensor, self.bias, self.activations, inputs=self._inputs)
