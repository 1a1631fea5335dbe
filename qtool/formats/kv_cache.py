"""CacheScales: what a block's keys and values are kept as, the currency of methods that quantize the cache.

    k^ = s_k nearest(clip(k / s_k))    v^ likewise       k, v [batch, kv heads, tokens, head_dim], keys after their rotation
One scale each, found before and the same at all times (static), so that a token's entry is rounded once, when it comes.
e4m3 has levels up to 448, whole numbers of b bits those from -2^(b-1) to 2^(b-1) - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.formats.scheme import KvScheme

E4M3_LARGEST = 448.0


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


def largest_level(scheme: KvScheme) -> float:
    """Steps of the scale that the range on one side of zero has; half a step beyond the last level for whole numbers."""
    return E4M3_LARGEST if scheme.format == "e4m3" else (1 << (scheme.bits - 1)) - 0.5


def rounded(x: Tensor, scale: Tensor, scheme: KvScheme) -> Tensor:
    """x of any shape on the grid of the scheme with one scale [1], computed in float32; returns x's dtype."""
    steps = x.detach().float() / scale.float()
    if scheme.format == "e4m3":
        levels = steps.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).float()
    else:
        half = 1 << (scheme.bits - 1)
        levels = steps.round().clamp(-half, half - 1)
    snapped = (levels * scale.float()).to(x.dtype)
    return x + (snapped - x).detach() if x.requires_grad else snapped
