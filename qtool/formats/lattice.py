"""Lattices: codes that stand for eight weights at once, points of a lattice instead of a table of single levels.

    e8p    level = s · row ± 1/4    row: one of 256 vectors of halves, s: eight signs, an even sum of s · row
           code = row · 2^8 + signs · 2 + shift,  16 bits: 8 for the row, 7 for the signs of all but the first entry, whose
           sign makes the sum even, 1 for +1/4 or -1/4
    w [..., group] floats    scale [..., 1]    q [..., group / 8] codes    w^ = scale · level[q]
The rows are all 227 of squared length 10 or less with entries 1/2, 3/2 and 5/2, and 29 of the 56 of length 12 that have five
entries 3/2. With their signs they are the points of D8 + 1/2 in a ball, and E8 = D8 with D8 + 1/2, so that every level is a
point of E8 + 1/4, the densest packing of eight dimensions.
Source: Tseng et al. 2024, arXiv:2402.04396 (QuIP#), section 4.2. Differs: the 29 rows are every other one in their order, so
that all entries get alike; the list in the authors' code names one row twice.
Why no table is stored, and no row compared with all others: of the rows up to length 10 the best one has its largest entries
where the weights are largest, so that seven kinds of rows and the 29 are looked at, not 65536 points.
"""

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import NEARLY_ZERO
from qtool.formats.integer import Params
from qtool.formats.scales import fit_scale, tensor_scale

LATTICES = {"e8p": 2}  # format: bits per weight
WIDTH = 8
RMS = 1.03  # of normal weights, in units of the scale, where the squared error is least
CHUNK = 1 << 14  # points searched at once, so that they stay in a core's cache


@dataclass(frozen=True)
class LatticeGrid:
    """The format e8p; `of_tensor` is the part of its scales that all groups of a tensor share."""

    format: str
    scale_dtype: str
    of_tensor: float = 1.0

    width = WIDTH  # weights in one code
    low = 0
    high = (1 << 16) - 1
    n_levels = 1 << 16
    zero_dtype = None
    exponent = 1.0
    shares = (0.2, 1.0)  # of the full range, between which each group's best range lies
    ends = (-2.75, 2.75)  # the least and the greatest entry of a level
    largest = 2.75

    def for_tensor(self, w: Tensor) -> "LatticeGrid":
        """The same for one tensor w, of which some scales hold a share of their own."""
        return replace(self, of_tensor=tensor_scale(w, self.largest, self.scale_dtype))

    def fit(self, w: Tensor) -> Params:
        """Params by the root of w's mean square over its last axis, w [..., group]: what normal weights want."""
        return self._params(w.square().mean(-1, keepdim=True).sqrt(), RMS)

    def fit_range(self, minimum: Tensor, maximum: Tensor) -> Params:
        """Params of a stated range; minimum, maximum [..., 1]."""
        return self._params(self.reach(minimum, maximum, None), self.largest)

    def reach(self, minimum: Tensor, maximum: Tensor, zero: Tensor | None) -> Tensor:
        """The length [..., 1] of the range on one side of zero that has the same scale as this one."""
        return torch.maximum(-minimum, maximum)

    def zero_of(self, minimum: Tensor, maximum: Tensor) -> Tensor:
        """Not for lattices: the format has no zero points."""
        raise AssertionError(f"{self.format} has no zero points")

    def _params(self, size: Tensor, of_level: float) -> Params:
        scale = fit_scale(size, of_level, self.scale_dtype, self.of_tensor)
        return Params(torch.where(size > 0, scale, NEARLY_ZERO), None)

    def round_zero(self, zero: Tensor) -> Tensor:
        """Not for lattices: the format has no zero points."""
        raise AssertionError(f"{self.format} has no zero points")

    def neighbours(self, w: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        """Raises QtoolError: a weight has no next level of its own."""
        raise QtoolError(f"a code of {self.format} holds {WIDTH} weights, of which none rounds alone; use quantize/lattice")

    def encode(self, w: Tensor, p: Params) -> Tensor:
        """Codes [..., group / 8] of the nearest points to w [..., group], as float whole numbers."""
        points = (w / p.scale).unflatten(-1, (-1, WIDTH))  # [..., group / 8, 8]
        codes = torch.cat([nearest_codes(part) for part in points.reshape(-1, WIDTH).split(CHUNK)])
        return codes.view(points.shape[:-1]).float()

    def levels(self, q: Tensor) -> Tensor:
        """The points of codes q [..., group / 8], one weight after the other [..., group], before any scale, float32."""
        return _points(q.device)[q.int()].flatten(-2)

    def decode(self, q: Tensor, p: Params) -> Tensor:
        """Values [..., group] of codes q [..., group / 8], float32."""
        return self.levels(q) * p.scale

    def snap(self, w: Tensor, p: Params) -> Tensor:
        """w [..., group] moved to the nearest points."""
        return self.decode(self.encode(w, p), p)


def nearest_codes(x: Tensor) -> Tensor:
    """Codes [points] of the nearest of all 65536 points to x [points, 8], in units of the scale."""
    plus, to_plus = _nearest_signed(x - 0.25)
    minus, to_minus = _nearest_signed(x + 0.25)
    return torch.where(to_plus <= to_minus, plus + 1, minus)


def _nearest_signed(y: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [points], without shift, of the nearest s · row to y [points, 8], and the squared distances [points]."""
    size = y.abs()
    falling, order = size.sort(dim=-1, descending=True)
    kinds, long = _kinds(y.device), rows(y.device)[-29:]  # [7, 8], [29, 8]
    is_odd = ((y < 0).sum(-1, keepdim=True) % 2).bool()  # [points, 1], of a product with the signs of y
    # <s · row, y> is the greatest where all signs are those of y; an odd sum asks for one other, where that costs least.
    flips = torch.cat([falling[:, -1:].expand(-1, 7), 2 * (size.unsqueeze(1) * long).amin(-1)], 1)  # [points, 36]
    products = torch.cat([falling @ kinds.T, size @ long.T], 1)  # [points, 36]
    candidates = torch.cat([kinds, long])  # [36, 8]
    has_odd_sum = candidates.sum(-1) % 2 == 1  # [36]
    far = candidates.square().sum(-1) - 2 * (products - torch.where(is_odd ^ has_odd_sum, flips, 0))  # [points, 36]
    nearest, best = far.min(-1)  # [points]
    row = candidates[best]  # [points, 8], a kind's largest entries first
    row = torch.where((best < 7).unsqueeze(-1), torch.empty_like(row).scatter_(1, order, row), row)
    signs = torch.where(y < 0, -1.0, 1.0)
    weakest = (size * row).argmin(-1, keepdim=True)  # [points, 1]
    is_wrong = (row * signs).sum(-1, keepdim=True) % 2 == 1
    signs.scatter_(1, weakest, torch.where(is_wrong, -1.0, 1.0) * signs.gather(1, weakest))
    powers = torch.tensor([0, 64, 32, 16, 8, 4, 2, 1], device=y.device)
    number = ((signs < 0) * powers).sum(-1)  # [points]
    return _place(y.device)[_key(row)] * 256 + number * 2, nearest + y.square().sum(-1)


@cache
def rows(device: torch.device) -> Tensor:
    """The 256 vectors [256, 8] of positive halves, those of length 12 last."""
    halves = torch.cartesian_prod(*[torch.tensor([0.5, 1.5, 2.5], device=device)] * WIDTH)  # [6561, 8]
    short = halves[halves.square().sum(-1) <= 10]
    long = torch.full((56, WIDTH), 0.5, device=device)
    for i, threes in enumerate(combinations(range(WIDTH), 5)):
        long[i, list(threes)] = 1.5
    return torch.cat([short, long[[i * 56 // 29 for i in range(29)]]])


@cache
def _kinds(device: torch.device) -> Tensor:
    """The rows [7, 8] of length 10 or less whose entries fall; all others are these in another order."""
    short = rows(device)[:-29]
    return short[(short.diff(dim=-1) <= 0).all(-1)]


@cache
def _place(device: torch.device) -> Tensor:
    """Which of `rows` has a key, [3^8]."""
    place = torch.zeros(3**WIDTH, dtype=torch.int64, device=device)
    place[_key(rows(device))] = torch.arange(256, device=device)
    return place


def _key(row: Tensor) -> Tensor:
    """Rows [points, 8] read as numbers [points] of eight digits 0, 1 and 2."""
    return ((row - 0.5) @ torch.tensor([3.0**i for i in range(WIDTH)], device=row.device)).long()


@cache
def _points(device: torch.device) -> Tensor:
    """The point of each code, [65536, 8]."""
    codes = torch.arange(1 << 16, device=device)
    row = rows(device)[codes >> 8]  # [codes, 8]
    is_negative = (codes.unsqueeze(-1) >> torch.arange(7, 0, -1, device=device)) & 1  # [codes, 7]
    point = torch.cat([row[:, :1], row[:, 1:] * (1 - 2 * is_negative)], 1)
    point[:, 0] *= 1 - 2 * (point.sum(-1) % 2)  # each entry is an odd number of halves: its sign decides the sum
    return point + ((codes & 1) - 0.5).unsqueeze(-1) / 2
