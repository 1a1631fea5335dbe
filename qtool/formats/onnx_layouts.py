"""ONNX's two layouts of one quantized linear, written and read: MatMulNBits, and DequantizeLinear before a MatMul.

    w^[o, i] = scale[o, g] (code[o, i] - zero[o, g]),  g = i // group        codes and zero points of b bits
matmul_nbits, an operator of onnxruntime (domain com.microsoft); codes from 0, b is 2, 4 or 8.
    qweight [out, groups, group b / 8] uint8    scales [out, groups] float32    zero_points [out, ceil(groups b / 8)] uint8
    Code i of a group stands at bits i b .. i b + b - 1 of its bytes, lowest first; so do the zero points of a row. Without them
    each is 2^(b-1), to which symmetric codes are shifted.
qdq, ONNX's own operators: DequantizeLinear with axis 0 and block_size, whose output [in, out] a MatMul multiplies by.
    qweight [in, out] INTb or UINTb             scales [groups, out] float32    zero_points [groups, out] UINTb
    Symmetric codes keep their sign and have no zero points. INT4 and INT2 are packed as above, through the whole tensor.
A scale for a whole row is that of qdq with axis 1: scales and zero_points are [out].
Scales in float32 hold those of every dtype.
Source: onnxruntime 1.31, docs/ContribOperators.md, com.microsoft.MatMulNBits; ONNX 1.23, DequantizeLinear of opset 21, and of
opset 25, which adds INT2.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor

Layout = Literal["matmul_nbits", "qdq"]

ONNX_BITS = (2, 4, 8)
ONNX_GROUPS = (16, 32, 64, 128, 256)  # what onnxruntime's kernels take
CODES, SCALES, ZEROS = "qweight", "scales", "zero_points"


@dataclass(frozen=True)
class Part:
    """A tensor as a file holds it: ONNX's name of its type, its shape, and its bytes in a tensor of any dtype."""

    kind: str
    shape: tuple[int, ...]
    data: Tensor


@dataclass(frozen=True)
class Form:
    """How a file holds the weights [out, in] of one linear; group None: a whole row, which is qdq in any layout."""

    layout: Layout
    bits: int
    group: int | None
    symmetric: bool
    shape: tuple[int, int]

    @property
    def is_nbits(self) -> bool:
        return self.layout == "matmul_nbits" and self.group is not None

    @property
    def n_groups(self) -> int:
        return self.shape[1] // (self.group or self.shape[1])

    def kinds(self) -> dict[str, str]:
        """ONNX's type of each part."""
        kind = "UINT8" if self.is_nbits else f"{'INT' if self.symmetric else 'UINT'}{self.bits}"
        return {CODES: kind, SCALES: "FLOAT", ZEROS: kind}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each part."""
        (n_out, n_in), groups = self.shape, self.n_groups
        if self.is_nbits:
            n_bytes = (self.group or 0) * self.bits // 8
            found = {CODES: (n_out, groups, n_bytes), SCALES: (n_out, groups), ZEROS: (n_out, -(-groups * self.bits // 8))}
        else:
            params = (n_out,) if self.group is None else (groups, n_out)
            found = {CODES: (n_in, n_out), SCALES: params, ZEROS: params}
        return {name: shape for name, shape in found.items() if name != ZEROS or not self.symmetric}


def form_of(scheme: WeightScheme, shape: tuple[int, int], layout: Layout) -> Form:
    """How weights [out, in] of a scheme are held."""
    return Form(layout, scheme.bits, scheme.group, scheme.symmetric, shape)


def pack(quantized: QuantizedTensor, layout: Layout) -> dict[str, Part]:
    """The parts of a linear by their names."""
    assert quantized.is_plain, "what stands beside codes, scales and zero points does not go into this layout"
    form = form_of(quantized.scheme, quantized.shape, layout)
    scale, low = quantized.params().scale.squeeze(-1), quantized.grid.low  # [out, groups], float32
    codes, zero = quantized.codes, quantized.zero
    if form.is_nbits:
        parts = {CODES: _pack_bits(codes.int() - low, form.bits), SCALES: scale}
        if zero is not None:
            parts[ZEROS] = _pack_bits(zero.int(), form.bits)
    else:
        parts = {CODES: _pack_whole(codes.T, form.bits), SCALES: scale.T}
        if zero is not None:
            parts[ZEROS] = _pack_whole(zero.T, form.bits)
    return {name: Part(form.kinds()[name], shape, parts[name].contiguous()) for name, shape in form.shapes().items()}


def unpack(parts: dict[str, Part], form: Form, scheme: WeightScheme) -> QuantizedTensor:
    """What `pack` was given, its scales in float32; raises QtoolError where the parts are not those of the form."""
    for name, shape in form.shapes().items():
        kind = form.kinds()[name]
        if name not in parts or (parts[name].kind, parts[name].shape) != (kind, shape):
            found = f"{parts[name].kind} {list(parts[name].shape)}" if name in parts else "missing"
            raise QtoolError(f"{name} is {found}, must be {kind} {list(shape)} for {scheme}; export it again")
    (n_out, n_in), groups, zero = form.shape, form.n_groups, None
    if form.is_nbits:
        codes = _unpack_bits(parts[CODES].data.reshape(n_out, -1), form.bits) + scheme.grid.low  # [out, in]
        scale = _float32(parts[SCALES]).view(n_out, groups)
        if not form.symmetric:
            zero = _unpack_bits(parts[ZEROS].data.reshape(n_out, -1), form.bits)[:, :groups]  # [out, groups]
    else:
        codes = _unpack_whole(parts[CODES].data, form.bits, n_in * n_out).view(n_in, n_out).T  # [out, in]
        if form.symmetric:
            codes = (codes - scheme.grid.low) % scheme.grid.n_levels + scheme.grid.low  # the sign of b bits
        else:
            zero = _unpack_whole(parts[ZEROS].data, form.bits, groups * n_out).view(groups, n_out).T  # [out, groups]
        scale = _float32(parts[SCALES]).view(groups, n_out).T
    dtype = torch.int8 if form.symmetric else torch.uint8
    zero = None if zero is None else zero.to(torch.uint8).contiguous()
    return QuantizedTensor(codes.to(dtype).contiguous(), scale.contiguous(), zero, scheme)


def _float32(part: Part) -> Tensor:
    return part.data.reshape(-1).view(torch.float32)


def _pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Bytes [rows, ceil(columns b / 8)] of codes [rows, columns], the lowest b bits of each."""
    n_codes = 8 // bits
    padded = torch.nn.functional.pad(codes.int() & ((1 << bits) - 1), (0, -codes.shape[1] % n_codes))
    found = padded[:, ::n_codes].clone()
    for place in range(1, n_codes):
        found |= padded[:, place::n_codes] << (place * bits)
    return found.to(torch.uint8)


def _unpack_bits(data: Tensor, bits: int) -> Tensor:
    """Codes from 0, [rows, columns] int32, of bytes [rows, columns b / 8]."""
    places = torch.arange(0, 8, bits, dtype=torch.int32)
    return ((data.int().unsqueeze(-1) >> places) & ((1 << bits) - 1)).flatten(1)


def _pack_whole(codes: Tensor, bits: int) -> Tensor:
    """Bytes of codes in their order, one row for another."""
    return _pack_bits(codes.reshape(1, -1), bits).view(-1)


def _unpack_whole(data: Tensor, bits: int, n_codes: int) -> Tensor:
    """Codes from 0, [n_codes] int32, of bytes."""
    return _unpack_bits(data.reshape(1, -1), bits).view(-1)[:n_codes]
