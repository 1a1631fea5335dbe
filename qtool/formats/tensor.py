"""QuantizedTensor: the one currency for weights, from method to layer to exporter.

codes [out, in] int8 or uint8    scale [out, groups] float    zero [out, groups] uint8, float16 or None
w^[o, i] = scale[o, g] (codes[o, i] - zero[o, g]),  g = i // group;  for formats of a table scale[o, g] level[codes[o, i]]
Where scales are stored in float8_e4m3fn, of_tensor multiplies all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.packing import n_words, pack_int32
from qtool.formats.scales import SCALE_DTYPES, store_scale
from qtool.formats.scheme import Grid, WeightScheme


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what decodes them; made by `quantize` or by a method's own loop."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: WeightScheme
    of_tensor: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    def params(self) -> Params:
        """Params shaped [out, groups, 1] for codes seen as [out, groups, group]."""
        zero = None if self.zero is None else self.zero.float().unsqueeze(-1)
        return Params(self.scale.float().unsqueeze(-1) * self.of_tensor, zero)

    def dequantize(self) -> Tensor:
        """Weights [out, in], float32."""
        grouped = to_groups(self.codes, self.scheme.group)
        return self.scheme.grid.decode(grouped, self.params()).flatten(1)

    def packed(self) -> Tensor:
        """Codes as unsigned numbers packed into int32 words [out, words]."""
        return pack_int32(self.codes.to(torch.int16) - self.scheme.grid.low, self.scheme.bits)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed codes, scales, zero points (packed where they are codes) and the tensor's own scale."""
        rows, columns = self.shape
        words = rows * n_words(columns, self.scheme.bits)
        scales = self.scale.numel() * SCALE_DTYPES[self.scheme.scale_dtype].itemsize
        return 4 * (words + (self.scheme.scale_dtype == "float8_e4m3fn")) + scales + self._bytes_of_zeros()

    def _bytes_of_zeros(self) -> int:
        if self.zero is None:
            return 0
        if self.scheme.zero_dtype != "int":
            return self.zero.numel() * self.zero.itemsize
        return 4 * n_words(self.shape[0], self.scheme.bits) * self.zero.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Counted in stored bytes: codes, scales and zero points."""
        return 8 * self.stored_bytes / self.codes.numel()

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Output channels start .. stop - 1 alone."""
        zero = None if self.zero is None else self.zero[start:stop]
        return QuantizedTensor(self.codes[start:stop], self.scale[start:stop], zero, self.scheme, self.of_tensor)


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
    grid, grouped = scheme.grid.for_tensor(w), to_groups(w, scheme.group)  # [out, groups, group]
    params = grid.fit(grouped) if params is None else params
    return assemble(grid.encode(grouped, params).flatten(1), params, scheme, grid)


def assemble(codes: Tensor, params: Params, scheme: WeightScheme, grid: Grid) -> QuantizedTensor:
    """A QuantizedTensor of float codes [out, in] and params [out, groups, 1], both of this grid."""
    zero = None if params.zero is None else params.zero.squeeze(-1).to(zero_dtype(scheme))
    scale = store_scale(params.scale.squeeze(-1), scheme.scale_dtype, grid.of_tensor)
    return QuantizedTensor(codes.to(code_dtype(scheme)), scale, zero, scheme, grid.of_tensor)


def code_dtype(scheme: WeightScheme) -> torch.dtype:
    """What codes are kept in while they are not packed."""
    return torch.int8 if scheme.grid.low < 0 else torch.uint8


def zero_dtype(scheme: WeightScheme) -> torch.dtype:
    """What zero points are kept in while they are not packed."""
    return torch.uint8 if scheme.zero_dtype == "int" else torch.float16
