"""Rounding of a linear's inputs: the params that each group of channels is rounded by, found at run time or static.

    x^ = s (q - z),  q = nearest(x / s + z)      x [..., in]    s, z of each token, or of each group of a token's channels
    static:  s, z [1], found before and the same for all tokens
    nvfp4:   s = s_t s_g,  s_g of each group of 16 in E4M3, found at run time;  s_t of each token, or static [1]
    with a threshold:  channels that reach it in any token of the call stay as they are;  s of each token is
             max |x| / (2^(b-1) - 1) over the other channels
InputScales is the currency of methods that find static scales.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import IntegerGrid, Params
from qtool.formats.scales import fit_scale, token_scale
from qtool.formats.scheme import ActivationScheme


@dataclass(frozen=True)
class InputScales:
    """scale [1], a float above zero, zero [1], a code in uint8 where the scheme has one, and the scheme, a static one."""

    scheme: ActivationScheme
    scale: Tensor
    zero: Tensor | None = None

    def to(self, device: torch.device) -> "InputScales":
        """The same on a device."""
        return InputScales(self.scheme, self.scale.to(device), None if self.zero is None else self.zero.to(device))

    def parts(self) -> dict[str, Tensor]:
        """Both tensors by their names, as far as there are two."""
        return {"scale": self.scale} | ({} if self.zero is None else {"zero": self.zero})


def grouped_inputs(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """x [..., in], of no token too, as [..., groups, group]; one group where the scheme has none. Raises QtoolError."""
    n, group = x.shape[-1], scheme.group or x.shape[-1]
    if n % group:
        raise QtoolError(f"{n} inputs do not divide into the groups of {group} that {scheme} has; use another group")
    return x.reshape(*x.shape[:-1], n // group, group)


def outlying(x: Tensor, scheme: ActivationScheme) -> Tensor | None:
    """Channels [in] of x [..., in] that stay as they are; None where the scheme keeps none."""
    if scheme.threshold is None:
        return None
    return (x.detach().abs() >= scheme.threshold).reshape(-1, x.shape[-1]).any(0)


def fit_inputs(wide: Tensor, scheme: ActivationScheme, static: InputScales | None = None) -> Params:
    """Params [..., groups, 1], or [1] where static, by which wide [..., groups, group], float32, is rounded."""
    grid = scheme.grid
    if scheme.scale_dtype == "float8_e4m3fn":
        s_t = token_scale(wide.flatten(-2), grid.largest).unsqueeze(-1) if static is None else static.scale  # [..., 1, 1]
        return Params(fit_scale(wide.abs().amax(-1, keepdim=True), grid.largest, scheme.scale_dtype, s_t), None)
    if scheme.threshold is not None:
        assert isinstance(grid, IntegerGrid), f"{scheme} has whole numbers"
        return Params(fit_scale(wide.abs().amax(-1, keepdim=True), float(grid.high), "float32", 1.0), None)
    if static is None:
        return grid.fit(wide)
    return Params(static.scale.float(), None if static.zero is None else static.zero.float())
