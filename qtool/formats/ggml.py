"""ggml's tensor types: how llama.cpp keeps weights in blocks of bytes, as data, with packing and decoding.

    q4_0 q5_0 q8_0   32 weights   w^ = d q                        q signed
    q4_1 q5_1        32           w^ = d q + m                    q >= 0
    iq4_nl           32           w^ = d level[q]                 levels of its own, 16 whole numbers
    mxfp4            32           w^ = 2^(e - 127) level[q]       levels of E2M1
    q3_k q6_k        256          w^ = d s_j q                    s_j a whole number for each 16 weights
    q2_k q4_k q5_k   256          w^ = d s_j q - m t_j            s_j, t_j >= 0 for each 16 (q2_k) or 32 weights
    f32 f16 bf16     dense
    d, m float16, one a block    q codes    a matrix [out, in] is rows of blocks along `in`: bytes [out, row bytes]
A layout is a list of parts in the order of the bytes. Most are planes: some bits of every number, several numbers to a byte,
those that share one standing `width` apart.
Source: ggml, https://github.com/ggml-org/ggml, as its Python package gguf 0.19 states the layouts (quants.py, constants.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import LEVELS
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor

BLOCK = 32  # weights that the smallest blocks hold
CHUNK = 1 << 20  # weights that are decoded or rounded at once: the work holds a few float32 copies of them
E8M0_BIAS = 127


@dataclass(frozen=True)
class Plane:
    """`bits` bits, from bit `shift` on, of each of the numbers `of`; a byte holds `fields` numbers, `width` apart."""

    of: str
    bits: int
    fields: int
    width: int
    shift: int = 0

    def pack(self, numbers: Tensor) -> Tensor:
        """Bytes [blocks, n / fields] of unsigned numbers [blocks, n]."""
        part = (numbers >> self.shift) & ((1 << self.bits) - 1)
        shifts = self.bits * torch.arange(self.fields, dtype=torch.int32, device=numbers.device).unsqueeze(1)
        grouped = part.view(len(part), -1, self.fields, self.width) << shifts
        return grouped.sum(2, dtype=torch.int32).flatten(1).to(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        """This plane's share of the numbers [blocks, n] int32, of bytes [blocks, n / fields]."""
        shifts = self.bits * torch.arange(self.fields, dtype=torch.int32, device=data.device).unsqueeze(1)
        fields = data.int().view(len(data), -1, 1, self.width) >> shifts
        return (fields & ((1 << self.bits) - 1)).flatten(1) << self.shift

    def n_bytes(self, n_numbers: int) -> int:
        return n_numbers // self.fields


@dataclass(frozen=True)
class SixBits:
    """Sixteen numbers of six bits in twelve bytes; the upper bits of one half stand above the lower half's."""

    of: str = "scales"

    def pack(self, numbers: Tensor) -> Tensor:
        """Bytes [blocks, 12] of s [blocks, 8] and then t [blocks, 8], side by side."""
        s, t = numbers[:, :8], numbers[:, 8:]
        first, second = (n[:, :4] | (n[:, 4:] >> 4) << 6 for n in (s, t))
        return torch.cat([first, second, (s[:, 4:] & 15) | (t[:, 4:] & 15) << 4], 1).to(torch.uint8)

    def unpack(self, data: Tensor) -> Tensor:
        first, second, third = data.int().split(4, 1)
        s = torch.cat([first & 63, (third & 15) | first >> 6 << 4], 1)
        return torch.cat([s, torch.cat([second & 63, third >> 4 | second >> 6 << 4], 1)], 1)

    def n_bytes(self, n_numbers: int) -> int:
        return 12


Part = str | Plane | SixBits  # d and m: float16; e: a power of two in a byte
NIBBLES, NIBBLES_K = Plane("codes", 4, 2, 16), Plane("codes", 4, 2, 32)
HIGH_BIT = Plane("codes", 1, 8, 1, shift=4)
PAIRS_K = Plane("codes", 2, 4, 32)


@dataclass(frozen=True)
class GgmlType:
    """A tensor type; `number` is ggml's, `file_type` llama.cpp's of files that are mostly of it."""

    name: str
    number: int
    file_type: int
    block: int = 1  # weights
    layout: tuple[Part, ...] = ()
    sub: int = 0  # weights that share a scale
    bits: int = 0
    low: int = 0  # the least code; codes are stored as what they exceed it by
    scale_low: int = 0  # the same of scales
    is_complement: bool = False  # eight-bit numbers below zero are stored as two's complement
    table: str = ""  # the format of codebook.py whose levels the codes stand for; empty: the codes themselves
    dtype: torch.dtype | None = None  # of a dense type

    @property
    def has_minimum(self) -> bool:
        """Whether a block has an offset beside its scale."""
        return "m" in self.layout

    @property
    def n_scales(self) -> int:
        """Numbers that the scales of a block's parts are, minima among them."""
        return 0 if self.block <= BLOCK else self.block // self.sub * (1 + self.has_minimum)

    @property
    def n_bytes(self) -> int:
        """Of one block."""
        if self.dtype is not None:
            return self.dtype.itemsize
        return sum(self.bytes_of(part) for part in self.layout)

    def bytes_of(self, part: Part) -> int:
        if isinstance(part, str):
            return 1 if part == "e" else 2
        return part.n_bytes(self.block if part.of == "codes" else self.n_scales)

    def row_bytes(self, n_in: int) -> int:
        """Bytes of a row of n_in weights."""
        assert n_in % self.block == 0, f"{n_in} columns in blocks of {self.block}"
        return n_in // self.block * self.n_bytes


TYPES = {
    kind.name: kind
    for kind in (
        GgmlType("f32", 0, 0, dtype=torch.float32),
        GgmlType("f16", 1, 1, dtype=torch.float16),
        GgmlType("bf16", 30, 32, dtype=torch.bfloat16),
        GgmlType("q4_0", 2, 2, 32, ("d", NIBBLES), 32, 4, -8),
        GgmlType("q4_1", 3, 3, 32, ("d", "m", NIBBLES), 32, 4),
        GgmlType("q5_0", 6, 8, 32, ("d", HIGH_BIT, NIBBLES), 32, 5, -16),
        GgmlType("q5_1", 7, 9, 32, ("d", "m", HIGH_BIT, NIBBLES), 32, 5),
        GgmlType("q8_0", 8, 7, 32, ("d", Plane("codes", 8, 1, 32)), 32, 8, -128, is_complement=True),
        GgmlType("iq4_nl", 20, 25, 32, ("d", NIBBLES), 32, 4, table="iq4_nl"),
        GgmlType("mxfp4", 39, 38, 32, ("e", NIBBLES), 32, 4, table="e2m1"),
        GgmlType("q2_k", 10, 10, 256, (Plane("scales", 4, 2, 16), PAIRS_K, "d", "m"), 16, 2),
        GgmlType(
            "q3_k", 11, 12, 256,
            (Plane("codes", 1, 8, 32, 2), PAIRS_K, Plane("scales", 4, 2, 8), Plane("scales", 2, 4, 4, 4), "d"),
            16, 3, -4, -32,
        ),
        GgmlType("q4_k", 12, 15, 256, ("d", "m", SixBits(), NIBBLES_K), 32, 4),
        GgmlType("q5_k", 13, 17, 256, ("d", "m", SixBits(), Plane("codes", 1, 8, 32, 4), NIBBLES_K), 32, 5),
        GgmlType(
            "q6_k", 14, 18, 256,
            (Plane("codes", 4, 2, 64), Plane("codes", 2, 4, 32, 4), Plane("scales", 8, 1, 16), "d"),
            16, 6, -32, -128, is_complement=True,
        ),
    )
}  # fmt: skip
BY_NUMBER = {kind.number: kind for kind in TYPES.values()}


@dataclass(frozen=True)
class Blocks:
    """What blocks of one type say.

    codes [blocks, weights] int    d [blocks] float16, of mxfp4 e uint8    m [blocks] float16 or None
    scales [blocks, numbers] int: s_j and then t_j where the type has both; None of the small types
    """

    codes: Tensor
    d: Tensor
    m: Tensor | None = None
    scales: Tensor | None = None


def pack(blocks: Blocks, kind: GgmlType) -> Tensor:
    """Bytes [blocks, n_bytes] of blocks."""
    numbers = {"codes": _stored(blocks.codes, kind.low, kind.is_complement and kind.bits == 8)}
    if blocks.scales is not None:
        numbers["scales"] = _stored(blocks.scales, kind.scale_low, kind.is_complement)
    whole = {"d": blocks.d, "e": blocks.d, "m": blocks.m}
    parts = []
    for part in kind.layout:
        if isinstance(part, str):
            number = whole[part]
            assert number is not None and number.dtype == (torch.uint8 if part == "e" else torch.float16), part
            parts.append(number.contiguous().unsqueeze(1).view(torch.uint8))
        else:
            parts.append(part.pack(numbers[part.of]))
    return torch.cat(parts, 1)


def unpack(data: Tensor, kind: GgmlType) -> Blocks:
    """Blocks of bytes [blocks, n_bytes]."""
    found: dict[str, Tensor] = {}
    for part, piece in zip(kind.layout, data.split([kind.bytes_of(part) for part in kind.layout], 1), strict=True):
        if isinstance(part, str):
            found[part] = (piece if part == "e" else piece.contiguous().view(torch.float16)).squeeze(1)
        else:
            found[part.of] = found.get(part.of, torch.zeros((), dtype=torch.int32)) + part.unpack(piece)
    codes = _read(found["codes"], kind.low, kind.is_complement and kind.bits == 8)
    scales = _read(found["scales"], kind.scale_low, kind.is_complement) if "scales" in found else None
    return Blocks(codes, found["e" if "e" in found else "d"], found.get("m"), scales)


def values(blocks: Blocks, kind: GgmlType) -> Tensor:
    """Weights [blocks, weights] float32."""
    d = blocks.d.float().unsqueeze(1)  # [blocks, 1]
    if "e" in kind.layout:
        d = torch.ldexp(torch.ones_like(d), blocks.d.int().unsqueeze(1) - E8M0_BIAS)
    if kind.table:
        return d * torch.tensor(LEVELS[kind.table], device=d.device)[blocks.codes]
    q = blocks.codes.float()
    m = None if blocks.m is None else blocks.m.float().unsqueeze(1)
    if blocks.scales is None:
        return d * q if m is None else d * q + m
    s = blocks.scales[:, : kind.block // kind.sub].float()  # [blocks, parts]
    scaled = (d * s).unsqueeze(2) * q.view(len(q), -1, kind.sub)  # [blocks, parts, sub]
    if m is not None:
        scaled = scaled - (m * blocks.scales[:, s.shape[1] :].float()).unsqueeze(2)
    return scaled.flatten(1)


def decode(data: Tensor, kind: GgmlType) -> Tensor:
    """Weights [out, in] float32 of bytes [out, row bytes]."""
    if kind.dtype is not None:
        return data.contiguous().view(kind.dtype).float()
    return values(unpack(data.reshape(-1, kind.n_bytes), kind), kind).view(len(data), -1)


def decodes_to(data: Tensor, kind: GgmlType, W: Tensor) -> bool:
    """Whether bytes [out, row bytes] say exactly W [out, in], of any float dtype; a few rows in memory at a time."""
    n_rows = max(1, CHUNK // W.shape[1])
    pairs = zip(data.split(n_rows), W.split(n_rows), strict=True)
    return all(torch.equal(decode(part, kind), w.float()) for part, w in pairs)


def type_of(scheme: WeightScheme) -> GgmlType | None:
    """The type whose grid is the scheme's: the same levels, one scale for groups of whole blocks; None where there is none."""
    if scheme.group_along != "out_channel" or (scheme.group or BLOCK) % BLOCK:
        return None
    if scheme.format == "e2m1" and scheme.scale_dtype == "float8_e8m0fnu" and scheme.symmetric:
        return TYPES["mxfp4"]
    if scheme.format == "iq4_nl" and scheme.symmetric and not scheme.double_quant:
        return TYPES["iq4_nl"]
    if scheme.format != "int":
        return None
    names = {4: "q4_0", 5: "q5_0", 8: "q8_0"} if scheme.symmetric else {4: "q4_1", 5: "q5_1"}
    return TYPES[names[scheme.bits]] if scheme.bits in names else None


def takes_codes(kind: GgmlType, scheme: WeightScheme) -> bool:
    """Whether the type holds the scheme's codes as they are: its own, or whole numbers of fewer bits."""
    if kind.block != BLOCK:
        return False
    if type_of(scheme) == kind:
        return True
    is_small = scheme.format == "int" and scheme.bits <= kind.bits and not kind.table
    is_grouped = scheme.group_along == "out_channel" and (scheme.group or BLOCK) % BLOCK == 0
    return is_small and is_grouped and scheme.symmetric != kind.has_minimum


def from_codes(tensor: QuantizedTensor, kind: GgmlType) -> Tensor:
    """Bytes [out, row bytes] of a tensor whose scheme the type takes; scales and offsets are rounded to float16.

    Raises QtoolError where a scale is beyond float16.
    """
    assert takes_codes(kind, tensor.scheme), f"{tensor.scheme} in {kind.name}"
    params = tensor.params()
    n_out, n_in = tensor.shape
    n_blocks = n_in // BLOCK

    def of_blocks(numbers: Tensor) -> Tensor:  # [out, groups, 1] to [out blocks]
        return numbers.squeeze(-1).repeat_interleave(n_blocks // numbers.shape[1], 1).flatten()

    codes = tensor.codes.int().view(-1, BLOCK)  # [out blocks, 32]
    if kind.name == "mxfp4":
        exponent = torch.frexp(of_blocks(params.scale)).exponent + E8M0_BIAS - 1
        return pack(Blocks(codes, exponent.to(torch.uint8)), kind).view(n_out, -1)
    d = of_blocks(params.scale).to(torch.float16)
    m = None if params.zero is None else of_blocks(-params.scale * params.zero).to(torch.float16)
    if not (torch.isfinite(d).all() and (m is None or torch.isfinite(m).all())):
        raise QtoolError(f"its scales are beyond float16, up to {float(params.scale.abs().amax()):.1e}; {kind.name} holds that")
    return pack(Blocks(codes, d, m), kind).view(n_out, -1)


def _stored(numbers: Tensor, low: int, is_complement: bool) -> Tensor:
    above = numbers.int() - low
    return above ^ 128 if is_complement else above


def _read(stored: Tensor, low: int, is_complement: bool) -> Tensor:
    return (stored ^ 128 if is_complement else stored) + low
