"""CacheScales: what a block's keys and values are kept as, the currency of methods that quantize the cache.

    k^ = s_k nearest(k / s_k)    v^ likewise       k, v [batch, kv heads, tokens, head_dim], keys after their rotation
One scale each, found before and the same at all times (static), so that a token's entry is rounded once, when it comes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.formats.integer import Params
from qtool.formats.scheme import KvScheme


@dataclass(frozen=True)
class CacheScales:
    """The scales [1] of keys and values, floats above zero, and the format that they belong to."""

    scheme: KvScheme
    k_scale: Tensor
    v_scale: Tensor

    def to(self, device: torch.device) -> "CacheScales":
        """The same on a device."""
        return CacheScales(self.scheme, self.k_scale.to(device), self.v_scale.to(device))

    def round_keys(self, k: Tensor) -> Tensor:
        """k of any shape as the cache gives it back, in k's dtype; gradients pass as if nothing were rounded."""
        return rounded(k, self.k_scale, self.scheme)

    def round_values(self, v: Tensor) -> Tensor:
        """The same of values."""
        return rounded(v, self.v_scale, self.scheme)


def rounded(x: Tensor, scale: Tensor, scheme: KvScheme) -> Tensor:
    """x of any shape on the grid of the scheme with one scale [1], computed in float32; returns x's dtype."""
    snapped = scheme.grid.snap(x.detach().float().contiguous(), Params(scale.float(), None)).to(x.dtype)
    return x + (snapped - x).detach() if x.requires_grad else snapped
