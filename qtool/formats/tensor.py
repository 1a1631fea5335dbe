"""QuantizedTensor: the one currency for weights, from method to layer to exporter.

codes [out, in] int8 or uint8    scale [out, groups] float    zero [out, groups] uint8, float16 or None
w^[o, i] = scale[o, g] (codes[o, i] - zero[o, g]),  g = i // group;  for formats of a table level[codes[o, i]] - zero[o, g]
With group_along in_channel scale and zero are [in, groups], g = o // group. Where scales are stored in float8_e4m3fn,
of_tensor multiplies all of them; a power grid's table has the tensor's own exponent. A lattice's codes are [out, in / 8]
int32, each the levels of eight columns.
What few methods add: second [1 + blocks], the mean and steps of scales that are quantized themselves; column_scale [in],
which multiplies whole columns; salient, columns in a scheme of their own, that the codes leave out; outliers, single
weights that are added at the end.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import PowerGrid
from qtool.formats.integer import Params
from qtool.formats.outliers import Outliers
from qtool.formats.packing import n_words, n_words_of, pack_codes
from qtool.formats.scales import SCALE_DTYPES, double_quantize, scale_codes, single_scale, store_scale
from qtool.formats.scheme import Grid, WeightScheme


@dataclass(frozen=True)
class Salient:
    """Columns of a matrix [out, in] that have a scheme of their own: which, rising, and their weights [out, columns]."""

    columns: Tensor
    tensor: "QuantizedTensor"


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes with what decodes them; made by `quantize` or by a method's own loop."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    scheme: WeightScheme
    of_tensor: float = 1.0
    exponent: float = 1.0
    second: Tensor | None = None
    column_scale: Tensor | None = None
    salient: Salient | None = None
    outliers: Outliers | None = None

    @property
    def shape(self) -> tuple[int, int]:
        left_out = 0 if self.salient is None else len(self.salient.columns)
        return self.codes.shape[0], self.codes.shape[1] * self.scheme.grid.width + left_out

    @property
    def is_plain(self) -> bool:
        """Whether codes, scales and zero points along `in` are all there is, as the formats of other tools have it."""
        extras = (self.second, self.column_scale, self.salient, self.outliers)
        return all(extra is None for extra in extras) and self.scheme.group_along == "out_channel"

    @property
    def grid(self) -> Grid:
        """The scheme's grid with what is this tensor's own."""
        grid = replace(self.scheme.grid, of_tensor=self.of_tensor)
        return grid.with_exponent(self.exponent) if isinstance(grid, PowerGrid) else grid

    def params(self) -> Params:
        """Params shaped [out, groups, 1] for codes seen as [out, groups, group]; [in, groups, 1] along in_channel."""
        zero = None if self.zero is None else self.zero.float().unsqueeze(-1)
        return Params(self.scale.float().unsqueeze(-1) * self.of_tensor, zero, self.second)

    def dequantize(self) -> Tensor:
        """Weights [out, in], float32; gradients reach the scale."""
        params = self.params()
        levels = to_groups(self.grid.levels(self.codes), self.scheme)  # [out, groups, group]
        W = from_groups((levels if params.zero is None else levels - params.zero) * params.scale, self.scheme)
        if self.salient is not None:
            rest = torch.ones(self.shape[1], dtype=torch.bool, device=W.device)
            rest[self.salient.columns.long()] = False
            whole = W.new_empty(self.shape)
            whole[:, rest] = W
            whole[:, ~rest] = self.salient.tensor.dequantize()
            W = whole
        if self.column_scale is not None:
            W = W * self.column_scale.float()
        return W if self.outliers is None else self.outliers.add_to(W)

    def packed(self) -> Tensor:
        """Codes as unsigned numbers packed into int32 words [out, words]."""
        return pack_codes(self.codes.int() - self.scheme.grid.low, self.scheme.grid.n_levels)

    @property
    def stored_bytes(self) -> int:
        """Bytes of packed codes, of scales and zero points as they are stored, and of everything that is added."""
        rows, columns = self.codes.shape
        words = rows * n_words_of(columns, self.scheme.grid.n_levels)
        of_tensor = (self.scheme.scale_dtype == "float8_e4m3fn") + (self.scheme.format == "power")
        extras = (self.second, self.column_scale)
        return (
            4 * (words + of_tensor)
            + self.scale.numel() * (1 if self.scheme.double_quant else SCALE_DTYPES[self.scheme.scale_dtype].itemsize)
            + self._bytes_of_zeros()
            + sum(extra.nbytes for extra in extras if extra is not None)
            + (0 if self.salient is None else -(-self.shape[1] // 8) + self.salient.tensor.stored_bytes)  # a bit a column
            + (0 if self.outliers is None else self.outliers.stored_bytes)
        )

    def _bytes_of_zeros(self) -> int:
        if self.zero is None:
            return 0
        if self.scheme.zero_dtype != "int":
            return self.zero.numel() * self.zero.itemsize
        return 4 * n_words(self.zero.shape[0], self.scheme.bits) * self.zero.shape[1]

    @property
    def bits_per_weight(self) -> float:
        """Counted in stored bytes: codes, scales, zero points and everything that is added."""
        rows, columns = self.shape
        return 8 * self.stored_bytes / (rows * columns)

    def rows(self, start: int, stop: int) -> "QuantizedTensor":
        """Output channels start .. stop - 1 alone."""
        assert self.scheme.is_rowwise, "output channels share scales"
        salient = self.salient
        return replace(
            self,
            codes=self.codes[start:stop],
            scale=self.scale[start:stop],
            zero=None if self.zero is None else self.zero[start:stop],
            salient=None if salient is None else Salient(salient.columns, salient.tensor.rows(start, stop)),
            outliers=None if self.outliers is None else self.outliers.rows(start, stop),
        )

    def parts(self) -> dict[str, Tensor]:
        """Every tensor by the name that `from_parts` knows it by."""
        named = {
            "codes": self.codes,
            "scale": self.scale,
            "zero": self.zero,
            "second": self.second,
            "column_scale": self.column_scale,
        }
        if self.salient is not None:
            named["salient_columns"] = self.salient.columns
            named |= {f"salient_{name}": part for name, part in self.salient.tensor.parts().items()}
        if self.outliers is not None:
            named |= {f"outlier_{name}": part for name, part in self.outliers.parts().items()}
        return {name: part for name, part in named.items() if part is not None}

    def facts(self) -> dict[str, Any]:
        """What is no tensor, as `from_parts` takes it: numbers, and schemes."""
        facts: dict[str, Any] = {"scheme": self.scheme, "of_tensor": self.of_tensor, "exponent": self.exponent}
        return facts | ({} if self.salient is None else {"salient": self.salient.tensor.facts()})

    @classmethod
    def from_parts(cls, parts: dict[str, Tensor], facts: dict[str, Any]) -> "QuantizedTensor":
        """The tensor that `parts` and `facts` came from."""
        salient, outliers = None, None
        if "salient" in facts:
            inner = {name.removeprefix("salient_"): part for name, part in parts.items() if name.startswith("salient_")}
            salient = Salient(inner.pop("columns"), cls.from_parts(inner, facts["salient"]))
        single = {name.removeprefix("outlier_"): part for name, part in parts.items() if name.startswith("outlier_")}
        if single:
            outliers = Outliers(**single)
        return cls(
            parts["codes"],
            parts["scale"],
            parts.get("zero"),
            WeightScheme.model_validate(facts["scheme"]),
            facts["of_tensor"],
            facts["exponent"],
            parts.get("second"),
            parts.get("column_scale"),
            salient,
            outliers,
        )

    def settled(self) -> "QuantizedTensor":
        """The same with scales as they are stored; training may have moved those that are quantized themselves."""
        if self.second is None or torch.equal(single_scale(scale_codes(self.scale, self.second), self.second), self.scale):
            return self
        scale, second = double_quantize(self.scale)
        return replace(self, scale=scale, second=second)


def to_groups(w: Tensor, scheme: WeightScheme) -> Tensor:
    """w [out, in] seen as [out, groups, group], or as [in, groups, group] along in_channel.

    Raises QtoolError where the columns (along in_channel the rows) do not divide.
    """
    w = w if scheme.group_along == "out_channel" else w.T.contiguous()
    rows, columns = w.shape
    width = scheme.grid.width
    if columns % width:
        raise QtoolError(f"{columns} columns do not divide into codes of {width}, which {scheme.format} has; add it to ignore")
    if scheme.group is None:
        return w.unsqueeze(1)
    if columns % scheme.group:
        fitting = [size for size in (32, 64, 128, 256) if columns % size == 0]
        advice = f"use {', '.join(map(str, fitting))}" if fitting else "use one group per row (leave g away)"
        what = "columns" if scheme.group_along == "out_channel" else "rows"
        raise QtoolError(f"{columns} {what} do not divide into groups of {scheme.group}; {advice}")
    return w.view(rows, columns // scheme.group, scheme.group)


def from_groups(grouped: Tensor, scheme: WeightScheme) -> Tensor:
    """The matrix [out, in] whose `to_groups` is `grouped`."""
    w = grouped.flatten(1)
    return w if scheme.group_along == "out_channel" else w.T


def quantize(w: Tensor, scheme: WeightScheme, params: Params | None = None) -> QuantizedTensor:
    """Round w [out, in] to the nearest grid points; params [out, groups, 1], the full range where None."""
    grouped = to_groups(w, scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(grouped)
    params = settle(grid.fit(grouped) if params is None else params, scheme)
    codes = from_groups(grid.encode(grouped, params), scheme)
    return assemble(codes, params, scheme, grid)


def with_common_scale(tensors: list[QuantizedTensor]) -> list[QuantizedTensor] | None:
    """The same weights with the largest of their `of_tensor` for all; None where a scale cannot be told exactly so."""
    of_all = max(tensor.of_tensor for tensor in tensors)
    found = []
    for tensor in tensors:
        scale = store_scale(tensor.scale.float() * tensor.of_tensor, tensor.scheme.scale_dtype, of_all)
        if not torch.equal(scale.float() * of_all, tensor.scale.float() * tensor.of_tensor):
            return None
        found.append(replace(tensor, scale=scale, of_tensor=of_all))
    return found


def settle(params: Params, scheme: WeightScheme) -> Params:
    """Params [out, groups, 1] of a whole tensor as they are stored where scales are quantized themselves."""
    if not scheme.double_quant or params.second is not None:
        return params
    scale, second = double_quantize(params.scale)
    return Params(scale, params.zero, second)


def assemble(codes: Tensor, params: Params, scheme: WeightScheme, grid: Grid) -> QuantizedTensor:
    """A QuantizedTensor of float codes [out, in] and settled params [out, groups, 1], both of this grid."""
    assert not scheme.double_quant or params.second is not None, "params of scales that are quantized come from settle()"
    zero = None if params.zero is None else params.zero.squeeze(-1).to(zero_dtype(scheme))
    scale = store_scale(params.scale.squeeze(-1), scheme.scale_dtype, grid.of_tensor)
    whole = codes.to(code_dtype(scheme))
    return QuantizedTensor(whole, scale, zero, scheme, grid.of_tensor, grid.exponent, params.second)


def code_dtype(scheme: WeightScheme) -> torch.dtype:
    """What codes are kept in while they are not packed."""
    return torch.int8 if scheme.grid.low < 0 else torch.uint8 if scheme.grid.high < 256 else torch.int32


def zero_dtype(scheme: WeightScheme) -> torch.dtype:
    """What zero points are kept in while they are not packed."""
    return torch.uint8 if scheme.zero_dtype == "int" else torch.float16
