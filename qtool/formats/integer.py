"""Integer grids: evenly spaced levels, symmetric around zero or shifted by a zero point.

    symmetric    q = clip(round(w / scale), -2^(b-1), 2^(b-1) - 1)         w^ = scale q
    asymmetric   q = clip(round(w / scale) + zero, 0, 2^b - 1)             w^ = scale (q - zero)
    float zero   q = clip(round(w / scale + zero), 0, 2^b - 1)             w^ = scale (q - zero)
    w [..., group] floats    scale, zero [..., 1]    q [..., group] whole numbers
A whole zero point is a code, so that 0 is a level; a float one is stored in float16 and lies between codes, as HQQ's does.
Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; the asymmetric range always holds 0, as GPTQ's does.
Why |scale| = amax / (2^(b-1) - 1/2) where symmetric: the largest value then lies half a step from the last level, so no value
is further than scale/2 from its level, and the levels use the negative half to its end.
Why the scale may be negative where symmetric: levels reach one step further on one side, and the side of the largest value is
to have it; then ranges shrink with less clipped. Of normal weights in groups of 128 the squared error, in the best range each,
falls by 9 % at three and four bits and by 7 % at two. So do the scales of llama.cpp's Q4_0.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtool.formats.scales import fit_scale, tensor_scale


@dataclass(frozen=True)
class Params:
    """scale and zero [..., 1], already rounded to the dtypes they are stored in; zero None where symmetric."""

    scale: Tensor
    zero: Tensor | None
    second: Tensor | None = None  # [1 + blocks], of scales that are quantized themselves, see scales.py


@dataclass(frozen=True)
class IntegerGrid:
    """`bits` per code; `scale_dtype` is what scales are stored in, so that codes fit the stored scale exactly."""

    bits: int
    symmetric: bool
    scale_dtype: str = "bfloat16"
    of_tensor: float = 1.0  # the part of the scales that all groups of a tensor share, see scales.py
    zero_dtype: str = "int"  # or float16
    signed_scale: bool = False  # whether a symmetric grid's scale may be negative

    width = 1  # weights in one code
    smallest = 0.4  # of the full range: below it no group's best range lies
    exponent = 1.0

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    @property
    def n_levels(self) -> int:
        return 1 << self.bits

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest level, before any zero point and scale."""
        return float(self.low), float(self.high)

    @property
    def largest(self) -> float:
        return (1 << (self.bits - 1)) - 0.5 if self.symmetric else float(self.high)

    def for_tensor(self, w: Tensor) -> "IntegerGrid":
        """The same for one tensor w, of which some scales hold a share of their own."""
        return replace(self, of_tensor=tensor_scale(w, self.largest, self.scale_dtype))

    def fit(self, w: Tensor) -> Params:
        """Params of the full range of w over its last axis; w [..., group], float32."""
        return self.fit_range(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))

    def fit_range(self, minimum: Tensor, maximum: Tensor) -> Params:
        """Params of a stated range; minimum, maximum [..., 1]. An empty range gives scale 1."""
        if self.symmetric:
            scale = self._scale(torch.maximum(-minimum, maximum))
            return Params(torch.where(maximum > -minimum, -scale, scale) if self.signed_scale else scale, None)
        minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
        scale = self._scale(maximum - minimum)
        return Params(scale, self.round_zero(-minimum / scale))

    def round_zero(self, zero: Tensor) -> Tensor:
        """zero [..., 1] as it is stored: one of the codes, or the nearest float16."""
        return zero.round().clamp(0, self.high) if self.zero_dtype == "int" else zero.to(torch.float16).float()

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes of w [..., group], as float whole numbers of the same shape."""
        q = w / p.scale
        if p.zero is None:
            q = q.round()
        else:
            q = q.round() + p.zero if self.zero_dtype == "int" else (q + p.zero).round()
        return q.clamp(self.low, self.high)

    def neighbours(self, w: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Codes next below (or at) and next above w [..., group], float whole numbers; beyond the ends the end's, twice."""
        x = w / p.scale if p.zero is None else w / p.scale + p.zero
        is_rising = p.scale > 0  # whether higher codes are higher values
        below = torch.where(is_rising, x.floor(), x.ceil())
        above = torch.where(is_rising, below + 1, below - 1)
        return below.clamp(self.low, self.high), above.clamp(self.low, self.high)

    def levels(self, q: Tensor) -> Tensor:
        """Values of codes q [..., group] before any zero point and scale, float32."""
        return q.float()

    def decode(self, q: Tensor, p: Params) -> Tensor:
        """Values of codes q [..., group], float32."""
        return (q if p.zero is None else q - p.zero) * p.scale

    def snap(self, w: Tensor, p: Params) -> Tensor:
        """w [..., group] moved to the nearest grid points."""
        return self.decode(self.encode(w, p), p)

    def _scale(self, span: Tensor) -> Tensor:
        return fit_scale(span, self.largest, self.scale_dtype, self.of_tensor)
