"""Rounding column by column: the grid, the ranges and the codes of a matrix while its columns are settled in turn.

    q_c = decode(encode(w_c)) in the ranges of column c's groups, fitted to W beforehand or to what w is when their turn comes
    W [out, in]    columns [in, out] those of W in turn    order [in] which column has which turn    U [in, in], in turn
What sweep.py walks along for GPTQ, and for methods that are built on it.
Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1, and the orders of its code. Differs: ranges may be searched, with
the weights 1 / U_jj², the curvature of column j while later ones can still make up for it.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor, assemble, code_dtype, settle, to_groups
from qtool.linalg.ranges import chosen_range, plain_cost, search_range, weighted_cost
from qtool.options import Sequential

LEAF = 32  # columns settled between matrix products where no range is fitted on the way
Order = Literal["none", "static", "group"]


class ColumnOptions(Sequential):
    """Options of a method that rounds column by column."""

    damp: float = Field(0.01, gt=0, le=1, description="share of mean(diag H) added to it; raised where too little")
    act_order: Order = Field(
        "static",
        description="order of the columns: none, as they stand; static, by falling diag H, ranges fitted beforehand; "
        "group, group by group, by falling diag H among and within groups",
    )
    range: Literal["auto", "minmax", "mse", "hessian"] = Field(
        "auto",
        description="a group's range: minmax, all of it; mse, of least error; auto, mse for tables of at most 16 levels, "
        "minmax else; hessian, of least weighted error",
    )


class DriftOptions(ColumnOptions):
    """Options of one that also makes up for what rounding did to its inputs."""

    alpha: float = Field(0.0, ge=0, le=1, description="how far to make up for inputs that drifted from the original's: GPTAQ")

    @model_validator(mode="after")
    def _drift_is_seen_in_one_pass(self) -> "DriftOptions":
        if self.alpha > 0 and not self.true_sequential:
            raise ValueError("alpha needs true_sequential: true, which sees both models' inputs side by side")
        return self


class ColumnRounding:
    """One matrix on its way; `sweep` takes its columns, leaf, begin and settle, then `tensor` is the result."""

    def __init__(
        self,
        W: Tensor,
        scheme: WeightScheme,
        options: ColumnOptions,
        order: Tensor,
        U: Tensor,
        left_out: Tensor | None = None,
    ) -> None:
        """left_out [out, in]: weights that no range has to hold. Raises QtoolError where a scheme needs all columns at once."""
        grouped = to_groups(W, scheme)  # [out, groups, group], along in_channel [in, groups, group]
        n_rows, self._n_groups, self._group = grouped.shape
        self._scheme, self._options = scheme, options
        self._along_in = scheme.group_along == "in_channel"
        self.is_fitted = options.act_order == "static" or self._n_groups == 1 or self._along_in
        check(scheme, is_late=self._along_in or not self.is_fitted)
        self._grid = scheme.grid.for_tensor(grouped)
        self._order, self._turns = order, order.tolist()
        self._curvature = U.diagonal() ** -2  # [in], in turn
        self._left_out = None if left_out is None else left_out.T[order]  # [in, out], in turn
        self.columns = W.T[order]
        self._pruned = self.columns == 0  # [in, out]: exact zeros stay zero, so that a sparse layer keeps its pattern
        self._is_sparse = bool(self._pruned.any())
        self._codes = torch.empty_like(self.columns, dtype=code_dtype(scheme))  # [in, out], as W stands
        self._scale, self._zero = W.new_ones(self._n_groups, n_rows), W.new_zeros(self._n_groups, n_rows)
        self._second: Tensor | None = None
        self.leaf = LEAF if self.is_fitted else self._group
        if self.is_fitted and not self._along_in:
            weights = self._curvature[order.argsort()].view(self._n_groups, self._group)
            self._fit(slice(None), slice(None), grouped, weights, None if left_out is None else to_groups(left_out, scheme))
            settled = settle(Params(self._scale.T.unsqueeze(-1), None), scheme)
            self._scale, self._second = settled.scale.squeeze(-1).T, settled.second

    def begin(self, start: int, stop: int) -> None:
        """Fit the ranges of the group whose columns have the turns start .. stop - 1, where they wait for that."""
        if not self.is_fitted:
            g = self._turns[start] // self._group
            now = self.columns[start:stop].T.contiguous().unsqueeze(1)  # [out, 1, group]
            left_out = None if self._left_out is None else self._left_out[start:stop].T.contiguous().unsqueeze(1)
            self._fit(slice(g, g + 1), slice(None), now, self._curvature[None, start:stop], left_out)

    def drop(self, start: int, mask: Tensor) -> None:
        """Let weights of the columns whose turns begin at start become zero; mask [block, out]."""
        self._pruned[start : start + len(mask)] |= mask
        self._is_sparse = True

    def settle(self, c: int, w: Tensor) -> Tensor:
        """The values [out] of the nearest codes to the column w [out], whose turn is c."""
        w = w.masked_fill(self._pruned[c], 0) if self._is_sparse else w
        column = self._turns[c]
        if self._along_in:
            row = slice(column, column + 1)
            w = w.view(self._n_groups, self._group)
            left_out = None if self._left_out is None else self._left_out[c].view(1, *w.shape)
            self._fit(slice(None), row, w.unsqueeze(0), torch.ones_like(w), left_out)
            params = self._params(self._scale[:, row], self._zero[:, row])  # [groups, 1]
        else:
            g = column // self._group
            params = self._params(self._scale[g], self._zero[g])  # [out]
        q = self._grid.encode(w, params)
        self._codes[column] = q.flatten()
        return self._grid.decode(q, params).flatten()

    def settle_each(self, turns: slice, rows: Tensor, w: Tensor) -> Tensor:
        """The values [n] of the nearest codes to single weights w [n], one in each of these columns and rows [n]."""
        w = w.masked_fill(self._pruned[turns].gather(1, rows.unsqueeze(1)).squeeze(1), 0) if self._is_sparse else w
        columns = self._order[turns]  # [n]
        g = columns // self._group
        params = self._params(self._scale[g, rows], self._zero[g, rows])  # [n]
        q = self._grid.encode(w, params)
        self._codes[columns, rows] = q.to(self._codes.dtype)
        return self._grid.decode(q, params)

    def tensor(self) -> QuantizedTensor:
        """The matrix of all codes, once every column is settled."""
        params = self._params(self._scale.T.unsqueeze(-1), self._zero.T.unsqueeze(-1))  # [out, groups, 1]
        return assemble(self._codes.T.contiguous(), params, self._scheme, self._grid)

    def _params(self, scale: Tensor, zero: Tensor) -> Params:
        return Params(scale, None if self._scheme.symmetric else zero, self._second)

    def _fit(self, groups: slice, rows: slice, w: Tensor, weights: Tensor, left_out: Tensor | None) -> None:
        """Fill scale and zero [groups, rows] with the params of w [rows, groups, group]; weights [groups, group]."""
        w = w if left_out is None else without(w, left_out)
        choice = chosen_range(self._options.range, self._scheme)
        if choice == "minmax":
            params = self._grid.fit(w)
        else:
            params = search_range(w, self._grid, plain_cost if choice == "mse" else weighted_cost(weights))
        self._scale[groups, rows] = params.scale.squeeze(-1).T
        if params.zero is not None:
            self._zero[groups, rows] = params.zero.squeeze(-1).T


def check(scheme: WeightScheme, is_late: bool) -> None:
    """Raise QtoolError for schemes whose columns cannot be settled one by one; is_late: ranges are fitted on the way."""
    if scheme.grid.width > 1:
        raise QtoolError(f"codes of {scheme.format} hold {scheme.grid.width} columns; use quantize/lattice")
    if scheme.double_quant and is_late:
        raise QtoolError("scales that are quantized themselves must be known beforehand: use act_order: static, without -ic")


def order_columns(importance: Tensor, W: Tensor, scheme: WeightScheme, act_order: Order) -> Tensor:
    """The columns [in] of W [out, in] in the order of their turns; importance [in] is diag H.

    Raises QtoolError where columns do not divide into groups.
    """
    group = to_groups(W, scheme).shape[-1]
    if act_order == "none":
        return torch.arange(len(importance), device=importance.device)
    if act_order == "static" or scheme.group_along == "in_channel":
        return importance.argsort(descending=True, stable=True)
    within = importance.view(-1, group)  # [groups, group]
    groups = within.sum(1).argsort(descending=True, stable=True)  # [groups]
    inner = within[groups].argsort(dim=1, descending=True, stable=True)  # [groups, group]
    return (groups.unsqueeze(1) * group + inner).flatten()


def pull(D: Tensor | None, U: Tensor, order: Tensor, alpha: float) -> Tensor | None:
    """P [in, in], in turn: what each column passes on because its input drifted by D [in, in]; None where that is unknown."""
    return None if D is None else alpha * (D[order][:, order] @ U.T).triu(1) @ U


def without(w: Tensor, left_out: Tensor) -> Tensor:
    """w [rows, groups, group] with the mean of a group's others in place of those left out, which widens no range."""
    counts = (~left_out).sum(-1, keepdim=True).clamp(min=1)  # [rows, groups, 1]
    return torch.where(left_out, w.masked_fill(left_out, 0).sum(-1, keepdim=True) / counts, w)
