"""Weights as whole numbers: what products of integers need of a quantized tensor, whatever its format.

    W^[n, k] = scale[n, g] (code[n, k] + shift[n, g]),  g = k // group
    code [out, in] whole numbers from `low` to `low` + 2^bits - 1    scale [out, groups] float32    shift as scale, or None
Whole numbers with any zero point have this form, and tables whose levels are multiples of one: binary, ternary, e1m2, ...
Codes are shifted so that zero points are near 0: products with both rounded would lose what cancels between them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.formats.scheme import Grid
from qtool.formats.tensor import QuantizedTensor


@dataclass(frozen=True)
class WholeLevels:
    """See the module's docstring; code is int8."""

    code: Tensor
    scale: Tensor
    shift: Tensor | None


def whole_levels(tensor: QuantizedTensor, bits: int) -> WholeLevels | str:
    """The tensor in codes of `bits`, from -2^(bits - 1), as int8's; else why it has no such form."""
    extras = {
        "scales of columns": tensor.column_scale,
        "salient columns": tensor.salient,
        "outliers": tensor.outliers,
    }
    if found := [name for name, part in extras.items() if part is not None]:
        return f"{' and '.join(found)} beside the codes"
    if tensor.scheme.group_along != "out_channel":
        return "groups along `out`"
    params = tensor.params()
    fitting = _unit_and_offsets(tensor.grid, bits)
    if fitting is None:
        return f"levels of {tensor.scheme.format} are no {1 << bits} neighbouring whole numbers"
    unit, offsets = fitting
    zero = None if params.zero is None else params.zero.squeeze(-1) / unit  # [out, groups]
    nearest = 0 if zero is None else round(float(zero.mean()))
    offset = min(max(nearest, offsets[0]), offsets[-1])
    scale = params.scale.squeeze(-1) * unit  # [out, groups]
    code = (tensor.grid.levels(tensor.codes) / unit).round() - offset  # [out, in]
    shift = None if zero is None and offset == 0 else torch.full_like(scale, offset)
    if shift is not None and zero is not None:
        shift = shift - zero
    return WholeLevels(code.to(torch.int8), scale, shift)


def _unit_and_offsets(grid: Grid, bits: int) -> tuple[float, range] | None:
    """What levels are whole multiples of, and what may be taken off those so that they fit; None where they do not."""
    if grid.width != 1:
        return None
    levels = grid.levels(torch.arange(grid.low, grid.high + 1)).double()
    unit = float(levels.abs()[levels != 0].min())
    whole = levels / unit  # [levels]
    half = 1 << (bits - 1)
    offsets = range(int(whole.max()) - half + 1, int(whole.min()) + half + 1)
    return (unit, offsets) if offsets and torch.equal(whole, whole.round()) else None
