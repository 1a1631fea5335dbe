"""QuantizedTensor: the one currency for weights, from method to layer to exporter.

codes [out, in] int8 or uint8    scale [out, groups] float    zero [out, groups] uint8 or None
w^[o, i] = scale[o, g] (codes[o, i] - zero[o, g]),  g = i // group
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import SCALE_DTYPES, Params
from qtool.formats.packing import n_words, pack_int32
from qtool.formats.scheme import WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what decodes them; made by `quantize` or by a method's own loop."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: WeightScheme

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def params(self) -> Params:
        """Params shaped [out, groups, 1] for codes seen as [out, groups, group]."""
        zero = None if self.zero is None else self.zero.float().unsqueeze(-1)
        return Params(self.scale.float().unsqueeze(-1), zero)

    def dequantize(self) -> Tensor:
        """Weights [out, in], float32."""
        grouped = to_groups(self.codes.float(), self.scheme.group)
        return self.scheme.grid.decode(grouped, self.params()).flatten(1)

    def packed(self) -> Tensor:
        """Codes as unsigned numbers packed into int32 words [out, words]."""
        return pack_int32(self.codes.to(torch.int16) - self.scheme.grid.low, self.scheme.bits)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed codes, scales and packed zero points."""
        rows, columns = self.shape
        words = rows * n_words(columns, self.scheme.bits)
        zeros = 0 if self.zero is None else n_words(rows, self.scheme.bits) * self.zero.shape[1]
        return 4 * (words + zeros) + self.scale.numel() * SCALE_DTYPES[self.scheme.scale_dtype].itemsize

    @property
    def bits_per_weight(self) -> float:
        """Counted in stored bytes: codes, scales and zero points."""
        return 8 * self.stored_bytes / self.codes.numel()

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Output channels start .. stop - 1 alone."""
        zero = None if self.zero is None else self.zero[start:stop]
        return QuantizedTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme)


def to_groups(w: Tensor, group: int | None) -> Tensor:
    """w [out, in] seen as [out, groups, group]; raises QtoolError where the columns do not divide."""
    rows, columns = w.shape
    if group is None:
        return w.unsqueeze(1)
    if columns % group:
        fitting = [size for size in (32, 64, 128, 256) if columns % size == 0]
        advice = f"use {', '.join(map(str, fitting))}" if fitting else "use one group per row (leave g away)"
        raise QtoolError(f"{columns} columns do not divide into groups of {group}; {advice}")
    return w.view(rows, columns // group, group)


def quantize(w: Tensor, scheme: WeightScheme, params: Params | None = None) -> QuantizedTensor:
    """Round w [out, in] to the nearest grid points; params [out, groups, 1], the full range where None."""
    grid, grouped = scheme.grid, to_groups(w, scheme.group)  # [out, groups, group]
    params = grid.fit(grouped) if params is None else params
    return assemble(grid.encode(grouped, params).flatten(1), params, scheme)


def assemble(codes: Tensor, params: Params, scheme: WeightScheme) -> QuantizedTensor:
    """A QuantizedTensor of float codes [out, in] and params [out, groups, 1]."""
    whole = torch.int8 if scheme.symmetric else torch.uint8
    zero = None if params.zero is None else params.zero.squeeze(-1).to(torch.uint8)
    scale = params.scale.squeeze(-1).to(SCALE_DTYPES[scheme.scale_dtype])
    return QuantizedTensor(codes.to(whole), scale, zero, scheme)
