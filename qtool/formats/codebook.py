"""Codebooks: number formats whose levels stand in a table, scaled by group.

    q = the level nearest to w / scale, ties to the even code      w^ = scale · level[q]      scale = amax / largest level
    with a zero point, a float16:  nearest to w / scale + zero     w^ = scale · (level[q] - zero)
    w [..., group] floats    scale, zero [..., 1]    q [..., group] codes, in the order of the format's own bits
Of binary and ternary weights the scale is the mean |w|, as few levels clip most weights.
Power grids (format power) have levels sign(k) (|k| / m)^(1/a), k = -m .. m, m = 2^(bits-1) - 1, with an exponent a of each
tensor's own: that of least squared error over all of it, found by golden-section search.
Source: OCP Microscaling Formats 1.0, section 5.3 (E2M1, E2M3, E3M2, E4M3, E5M2); Dettmers et al. 2023, arXiv:2305.14314,
appendix E (NF4); bitsandbytes (its FP4); ggml (IQ4_NL). E3M0 and E1M2 are
the same construction with another split; E1M2 is evenly spaced. Zhou et al. 2024,
arXiv:2408.08554 (ABQ-LLM), section 3.3 (w2star, five levels); Ma et al. 2024, arXiv:2402.17764 (ternary by mean |w|);
Yvinec et al. 2023, arXiv:2301.09858 (PowerQuant); arXiv:2506.00486 (RF8: a number's first two binary digits; its layout is
not published, this one is ours). Differs: a power grid's codes are those of the nearest level, not of the
nearest power, and each tensor has an exponent of its own.
Why ties to even codes: neighbours differ in their lowest bit, which for floating formats is the mantissa's.
"""

import math
import re
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


def exponent_bits(format: str) -> int:
    """Of a float by its name, such as e2m1."""
    return int(format[1])


def splits(format: str) -> tuple[str, ...]:
    """Floats by exponent and mantissa bits that have as many bits as `format`, itself among them; none where it is no such."""
    named = [name for name in LEVELS if re.fullmatch(r"e\dm\d", name)]
    return tuple(name for name in named if len(LEVELS[name]) == len(LEVELS[format])) if format in named else ()


def two_powers() -> tuple[float, ...]:
    """Values by code of RF8: a sign, 4 bits of e, 3 of d;  2^e + 2^(e - d) for d = 1 .. 4, else 2^e; 0 where e = d = 0."""
    values = [2.0**e + (2.0 ** (e - d) if 1 <= d <= 4 else 0) for e in range(16) for d in range(8)]
    positive = (0.0, *values[1:])
    return (*positive, *(-value for value in positive))


NF4 = (
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334)
    + (-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224)
    + (0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
)  # fmt: skip
BNB_FP4 = tuple(value / 12 for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
IQ4_NL = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)

# Format: its values by code. Codes above a float's largest number, its infinities and NaNs, repeat that number; encoding
# never gives them.
LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": NF4,
    "fp4_bnb": (*BNB_FP4, *(-value for value in BNB_FP4)),
    "e2m1": floating(2, 1, bias=1),
    "e3m0": floating(3, 0, bias=3),
    "e1m2": floating(1, 2, bias=1),
    "e2m3": floating(2, 3, bias=1),
    "e3m2": floating(3, 2, bias=3),
    "e4m3": floating(4, 3, bias=7, n_finite=127),
    "e5m2": floating(5, 2, bias=15, n_finite=124),
    "binary": (-1.0, 1.0),
    "ternary": (-1.0, 0.0, 1.0),
    "w2star": (-2.0, -1.0, 0.0, 1.0, 2.0),
    "rf8": two_powers(),
    "iq4_nl": IQ4_NL,
}
BY_MEAN = ("binary", "ternary")
EXPONENTS = (0.3, 1.2)  # where power grids search theirs
NEARLY_ZERO = 2.0**-14  # scale of a group of zeros where no level is 0, float16's least normal number
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class CodebookGrid:
    """A format of `LEVELS`; `of_tensor` is the part of its scales that all groups of a tensor share."""

    format: str
    scale_dtype: str
    of_tensor: float = 1.0
    zero_dtype: str | None = None  # or float16

    width = 1  # weights in one code
    low = 0
    exponent = 1.0

    @property
    def table(self) -> tuple[float, ...]:
        """Values by code."""
        return LEVELS[self.format]

    @property
    def high(self) -> int:
        return len(self.table) - 1

    @property
    def n_levels(self) -> int:
        return len(self.table)

    @property
    def shares(self) -> tuple[float, float]:
        """The shares of the full range between which each group's best range lies.

        Above 1 the largest weight moves down towards the level next to the last, about which levels lie closer: in e2m1 from
        6 towards 4. Scales that are powers of two double or halve.
        """
        if self.scale_dtype == "float8_e8m0fnu":
            return 0.5, 2.0
        low = 0.4 if len(self.table) > 8 else 0.2
        magnitudes = sorted({abs(level) for level in self.table} - {0.0})
        return low, magnitudes[-1] / magnitudes[-2] if len(magnitudes) > 1 else 1.0

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest level, before any scale."""
        return min(self.table), max(self.table)

    @property
    def largest(self) -> float:
        return max(map(abs, self.table))

    def for_tensor(self, w: Tensor) -> "CodebookGrid":
        """The same for one tensor w, of which some scales hold a share of their own."""
        return replace(self, of_tensor=tensor_scale(w, self.largest, self.scale_dtype))

    def fit(self, w: Tensor) -> Params:
        """Params of the full range of w over its last axis, or of its mean magnitude; w [..., group], float32."""
        if self.format in BY_MEAN:
            mean = w.abs().mean(-1, keepdim=True)
            return self.fit_range(-mean, mean)
        return self.fit_range(w.amin(-1, keepdim=True), w.amax(-1, keepdim=True))

    def fit_range(self, minimum: Tensor, maximum: Tensor) -> Params:
        """Params of a stated range; minimum, maximum [..., 1]."""
        if self.zero_dtype is None:
            amax = self.reach(minimum, maximum, None)
            scale = fit_scale(amax, self.largest, self.scale_dtype, self.of_tensor)
            return Params(scale if 0.0 in self.table else torch.where(amax > 0, scale, NEARLY_ZERO), None)
        low, high = self.ends
        scale = fit_scale(maximum - minimum, high - low, self.scale_dtype, self.of_tensor)
        return Params(scale, self.round_zero(low - minimum / scale))

    def zero_of(self, minimum: Tensor, maximum: Tensor) -> Tensor:
        """The zero point [..., 1] of a range, not rounded."""
        low, high = self.ends
        scale = (maximum - minimum) / (high - low)  # [..., 1]
        return low - minimum / torch.where(scale > 0, scale, 1.0)

    def reach(self, minimum: Tensor, maximum: Tensor, zero: Tensor | None) -> Tensor:
        """The length [..., 1] of the range on one side of zero that has the same scale as this one."""
        if zero is None:
            return torch.maximum(-minimum, maximum)
        low, high = self.ends
        return (maximum - minimum) * (self.largest / (high - low))

    def round_zero(self, zero: Tensor) -> Tensor:
        """zero [..., 1] as it is stored."""
        return zero.to(torch.float16).float()

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Nearest codes of w [..., group], as float whole numbers of the same shape."""
        borders, codes = _table(self.table, w.device)
        return _looked_up(codes, torch.bucketize(self._in_units(w, p), borders, out_int32=True))

    def neighbours(self, w: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Codes next below (or at) and next above w [..., group], as float whole numbers; beyond the ends the end's, twice."""
        codes = _table(self.table, w.device)[1]  # by rising level
        above = torch.bucketize(self._in_units(w, p), self.levels(codes), right=True)
        return codes[(above - 1).clamp(min=0)], codes[above.clamp(max=len(codes) - 1)]

    def _in_units(self, w: Tensor, p: Params) -> Tensor:
        return w / p.scale if p.zero is None else w / p.scale + p.zero

    def levels(self, q: Tensor) -> Tensor:
        """The table's values of codes q [..., group], before any zero point and scale, float32."""
        return _looked_up(_values(self.table, q.device), q.int())

    def decode(self, q: Tensor, p: Params) -> Tensor:
        """Values of codes q [..., group], float32."""
        levels = self.levels(q)
        return (levels if p.zero is None else levels - p.zero) * p.scale

    def snap(self, w: Tensor, p: Params) -> Tensor:
        """w [..., group] moved to the nearest grid points."""
        if p.zero is None and re.fullmatch(r"e\dm\d", self.format):
            return nearest_float(w / p.scale, int(self.format[3]), self.least_power, self.largest) * p.scale
        return self.decode(self.encode(w, p), p)

    @property
    def least_power(self) -> int:
        """Of a float: the exponent of two of its least normal number, above whose mantissas numbers lie ever wider."""
        magnitudes = sorted({abs(level) for level in self.table})
        return round(math.log2(magnitudes[1])) + int(self.format[3])


@dataclass(frozen=True)
class PowerGrid(CodebookGrid):
    """A power grid of `bits`; `exponent` is the tensor's own."""

    bits: int = 4
    exponent: float = 1.0

    @property
    def table(self) -> tuple[float, ...]:
        return power_levels(self.bits, self.exponent)

    def for_tensor(self, w: Tensor) -> "PowerGrid":
        """The same with the exponent of least squared error over w [rows, groups, group], each group in its full range."""
        first, last = EXPONENTS
        inner = [last - GOLDEN * (last - first), first + GOLDEN * (last - first)]
        costs = [self._cost(w, a) for a in inner]
        for _ in range(12):  # the interval shrinks to 0.9 / 320
            if costs[0] <= costs[1]:
                last = inner[1]
                inner = [last - GOLDEN * (last - first), inner[0]]
                costs = [self._cost(w, inner[0]), costs[0]]
            else:
                first = inner[0]
                inner = [inner[1], first + GOLDEN * (last - first)]
                costs = [costs[1], self._cost(w, inner[1])]
        cost, exponent = min(zip([*costs, self._cost(w, 1.0)], [*inner, 1.0], strict=True))
        return self.with_exponent(exponent)

    def with_exponent(self, exponent: float) -> "PowerGrid":
        """The same with a stated exponent, kept to the five digits that its table is made from."""
        return replace(self, exponent=round(exponent, 5))

    def _cost(self, w: Tensor, exponent: float) -> float:
        grid = self.with_exponent(exponent)
        return float((grid.snap(w, grid.fit(w)) - w).square().sum())


@cache
def power_levels(bits: int, exponent: float) -> tuple[float, ...]:
    """Values by code, of k = -m .. m in rising order; the one code left over repeats the last."""
    m = (1 << (bits - 1)) - 1
    positive = [(k / m) ** (1 / exponent) for k in range(1, m + 1)]
    return (*(-value for value in reversed(positive)), 0.0, *positive, 1.0)


def nearest_float(x: Tensor, mantissa: int, least_power: int, largest: float) -> Tensor:
    """The floats of `mantissa` bits nearest to x [...], float32, ties to even; below 2^least_power evenly spaced.

    Why not by the table: inputs are rounded whenever a linear is called, and a search takes five times as long.
    """
    x, dropped = x.detach(), 23 - mantissa
    bits = x.view(torch.int32)
    bits = (bits + ((bits >> dropped) & 1) + ((1 << (dropped - 1)) - 1)) & -(1 << dropped)  # rounds the magnitude
    at_unit = 1.5 * 2.0 ** (23 + least_power - mantissa)  # where a float32's last bit is the spacing
    return torch.where(x.abs() < 2.0**least_power, (x + at_unit) - at_unit, bits.view(torch.float32)).clamp(-largest, largest)


def _looked_up(values: Tensor, index: Tensor) -> Tensor:
    """values[index] for index [...] int32: plain indexing would widen a whole matrix of indices to eight bytes each."""
    return values.index_select(0, index.flatten()).view(index.shape)


@cache
def _values(table: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(table, device=device)


@cache
def _table(table: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Borders between neighbouring levels, float32, a value on a border belonging below; the code of each interval."""
    first: dict[float, int] = {}
    for code, value in enumerate(table):
        first.setdefault(value, code)  # -0.0 equals 0.0, and a repeated level is the first one's
    levels = sorted(first)
    borders = torch.tensor([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)])
    is_even_above = torch.tensor([first[value] % 2 == 0 for value in levels[1:]])
    borders = torch.where(is_even_above, borders.nextafter(torch.tensor(-torch.inf)), borders)
    return borders.to(device), torch.tensor([float(first[value]) for value in levels], device=device)
