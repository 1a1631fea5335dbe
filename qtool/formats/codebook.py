"""Codebooks: number formats whose levels stand in a table, scaled by group.

    q = the level nearest to w / scale, ties to the even code      w^ = scale · level[q]      scale = amax / largest level
    w [..., group] floats    scale [..., 1]    q [..., group] codes 0 .. 2^bits - 1, in the order of the format's own bits
Source: OCP Microscaling Formats 1.0, section 5.3 (E2M1, E2M3, E3M2, E4M3, E5M2); Dettmers et al. 2023, arXiv:2305.14314,
appendix E (NF4); bitsandbytes (its FP4). E3M0 is the same construction without mantissa bits.
Why ties to even codes: neighbours differ in their lowest bit, which for floating formats is the mantissa's.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from qtool.formats.integer import Params
from qtool.formats.scales import fit_scale, tensor_scale


def floating(exponent: int, mantissa: int, bias: int, n_finite: int | None = None) -> tuple[float, ...]:
    """Values by code of a format with a sign bit above `exponent` and `mantissa` bits; n_finite codes of a sign are numbers."""
    n_codes = 1 << (exponent + mantissa)
    magnitudes = []
    for code in range(n_codes):
        power, fraction = divmod(code, 1 << mantissa)
        significand = fraction / (1 << mantissa) + (power > 0)
        magnitudes.append(significand * 2.0 ** (max(power, 1) - bias))
    finite = magnitudes[:n_finite] + [magnitudes[(n_finite or n_codes) - 1]] * (n_codes - (n_finite or n_codes))
    return (*finite, *(-value for value in finite))


NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)  # fmt: skip
BNB_FP4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))

# Format: its values by code. Codes above a float's largest number, its infinities and NaNs, repeat that number; encoding
# never gives them.
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4_bnb": (*BNB_FP4, *(-value for value in BNB_FP4)),
    "e2m1": floating(2, 1, bias=1),
    "e3m0": floating(3, 0, bias=3),
    "e2m3": floating(2, 3, bias=1),
    "e3m2": floating(3, 2, bias=3),
    "e4m3": floating(4, 3, bias=7, n_finite=127),
    "e5m2": floating(5, 2, bias=15, n_finite=124),
}


@dataclass(frozen=True)
class CodebookGrid:
    """A format of `LEVELS`; `of_tensor` is the part of its scales that all groups of a tensor share."""

    format: str
    scale_dtype: str
    of_tensor: float = 1.0

    low = 0

    @property
    def high(self) -> int:
        return len(LEVELS[self.format]) - 1

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest level, before any scale."""
        return min(LEVELS[self.format]), max(LEVELS[self.format])

    @property
    def largest(self) -> float:
        return max(map(abs, LEVELS[self.format]))

    def for_tensor(self, w: Tensor) -> "CodebookGrid":
        """The same for one tensor w, of which some scales hold a share of their own."""
        return replace(self, of_tensor=tensor_scale(w, self.largest, self.scale_dtype))

    def fit(self, w: Tensor) -> Params:
        """Params of the full range of w over its last axis; w [..., group], float32."""
        return self.fit_range(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))

    def fit_range(self, minimum: Tensor, maximum: Tensor) -> Params:
        """Params of a stated range; minimum, maximum [..., 1]."""
        amax = torch.maximum(-minimum, maximum)
        return Params(fit_scale(amax, self.largest, self.scale_dtype, self.of_tensor), None)

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes of w [..., group], as float whole numbers of the same shape."""
        borders, codes = _table(self.format, w.device)
        return codes[torch.bucketize(w / p.scale, borders)]

    def neighbours(self, w: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Codes next below (or at) and next above w [..., group], as float whole numbers; beyond the ends the end's, twice."""
        codes = _table(self.format, w.device)[1]  # by rising level
        above = torch.bucketize(w / p.scale, self.levels(codes), right=True)
        return codes[(above - 1).clamp(min=0)], codes[above.clamp(max=len(codes) - 1)]

    def levels(self, q: Tensor) -> Tensor:
        """The table's values of codes q [..., group], before any scale, float32."""
        return _values(self.format, q.device)[q.int()]

    def decode(self, q: Tensor, p: Params) -> Tensor:
        """Values of codes q [..., group], float32."""
        return self.levels(q) * p.scale

    def snap(self, w: Tensor, p: Params) -> Tensor:
        """w [..., group] moved to the nearest grid points."""
        return self.decode(self.encode(w, p), p)


@cache
def _values(format: str, device: torch.device) -> Tensor:
    return torch.tensor(LEVELS[format], device=device)


@cache
def _table(format: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Borders between neighbouring levels, float32, a value on a border belonging below; the code of each interval."""
    first: dict[float, int] = {}
    for code, value in enumerate(LEVELS[format]):
        first.setdefault(value, code)  # -0.0 equals 0.0, and a repeated level is the first one's
    levels = sorted(first)
    borders = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)])
    is_even_above = torch.tensor([first[value] % 2 == 0 for value in levels[1:]])
    borders = torch.where(is_even_above, borders.nextafter(torch.tensor(-torch.inf)), borders)
    return borders.to(device), torch.tensor([float(first[value]) for value in levels], device=device)
