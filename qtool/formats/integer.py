"""Integer grids: evenly spaced levels, symmetric around zero or shifted by a zero point.

    symmetric    q = clip(round(w / scale), -2^(b-1), 2^(b-1) - 1)         w^ = scale q
    asymmetric   q = clip(round(w / scale) + zero, 0, 2^b - 1)             w^ = scale (q - zero)
    float zero   q = clip(round(w / scale + zero), 0, 2^b - 1)             w^ = scale (q - zero)
    w [..., group] floats    scale, zero [..., 1]    q [..., group] whole numbers
A whole zero point is a code, so that 0 is a level; a float one is stored in float16 and lies between codes, as HQQ's does.
The scale of a range leaves no value further than half a step from its level; where it may have either sign, no smaller does:
    symmetric    |scale| = max(far / (2^(b-1) + 1/2), near / (2^(b-1) - 1/2))      far, near: lengths of the range's two sides
                 scale = far / (2^(b-1) - 1/2)     where it must be positive
    asymmetric   scale = max(max / (2^b - 1/2 - zero), -min / (zero + 1/2)),   zero = round(-2^b min / (max - min) - 1/2)
    float zero   scale = (max - min) / 2^b,   zero = -min / scale - 1/2
Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1; the asymmetric range always holds 0, as GPTQ's does. Differs: the ends
of a range lie up to half a step beyond the last levels, where others put them onto the levels and take wider steps.
Why the scale may be negative where symmetric: levels reach one step further on one side, and the side of the largest value is
to have it. So do the scales of llama.cpp's Q4_0.
What the half steps bring on the demo model's validation text, KL of plain rounding to groups of 128: w4 0.079, 0.046; w3 0.46,
0.24; -asym w4 0.053, 0.047; w3 0.34, 0.24.
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
    shares = (0.4, 1.0)  # of the full range, between which each group's best range lies
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
        """Steps that a range on one side of zero has."""
        if not self.symmetric:
            return self.high + 0.5
        return (1 << (self.bits - 1)) + (0.5 if self.signed_scale else -0.5)

    def for_tensor(self, w: Tensor) -> "IntegerGrid":
        """The same for one tensor w, of which some scales hold a share of their own."""
        fewest = (1 << (self.bits - 1)) - 0.5  # steps on a side
        return replace(self, of_tensor=tensor_scale(w, fewest, self.scale_dtype))

    def fit(self, w: Tensor) -> Params:
        """Params of the full range of w over its last axis; w [..., group], float32."""
        return self.fit_range(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))

    def fit_range(self, minimum: Tensor, maximum: Tensor) -> Params:
        """Params of a stated range; minimum, maximum [..., 1]. An empty range gives scale 1."""
        zero = None if self.symmetric else self.round_zero(self.zero_of(minimum, maximum))
        scale = fit_scale(self.reach(minimum, maximum, zero), self.largest, self.scale_dtype, self.of_tensor)
        return Params(torch.where(maximum > -minimum, -scale, scale) if self.signed_scale else scale, zero)

    def zero_of(self, minimum: Tensor, maximum: Tensor) -> Tensor:
        """The zero point [..., 1] of a range, not rounded."""
        low, span = minimum.clamp(max=0), maximum.clamp(min=0) - minimum.clamp(max=0)  # [..., 1]
        share = -low / torch.where(span > 0, span, 1.0)  # of the range that lies below zero
        return torch.where(span > 0, share * self.n_levels - 0.5, 0.0)

    def reach(self, minimum: Tensor, maximum: Tensor, zero: Tensor | None) -> Tensor:
        """The length [..., 1] of the range on one side of zero that has the same scale as this one."""
        if zero is None:
            far, near = torch.maximum(-minimum, maximum), torch.minimum(-minimum, maximum)
            return torch.maximum(far, near * (self.largest / (self.largest - 1))) if self.signed_scale else far
        minimum, maximum = minimum.clamp(max=0), maximum.clamp(min=0)
        if self.zero_dtype != "int":
            return (maximum - minimum) * (self.largest / self.n_levels)
        return torch.maximum(maximum / (self.high - zero + 0.5), -minimum / (zero + 0.5)) * self.largest

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
