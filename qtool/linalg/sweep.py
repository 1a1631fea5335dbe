"""The walk that GPTQ and SparseGPT share: settle column after column, let the later ones make up for each error.

    q_c = settle(w_c)      e_c = (w_c - q_c) / U_cc      w_j += P_cj w_c - U_cj e_c  for every later column j
    w_c, q_c, e_c [out]    U [in, in] upper triangular, see hessian.py    P [in, in] strictly upper, or none
`sweep_both` also lets the later rows of a column make up for each error of the earlier ones, as YAQA does:
    q_rc = settle(w_rc - U_cc sum over rows k before r of V_kr f_kc)      f_rc = (what was settled - q_rc) / (U_cc V_rr)
    V [out, out] upper triangular, the same of the outputs' curvature; e_c and what it does to later columns stay as they are
Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Differs: instead of lazy blocks of one size the columns are
halved until a leaf remains, and the first half's errors reach the second in one matrix product. It is the same sum,
with the weights read log(in / leaf) times instead of in / 128 times, so that small leaves cost little.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Begin = Callable[[int, int], None]
WAVE = 128  # columns whose rows are settled side by side: enough to fill vectors, few enough to stay in a CPU's cache


@dataclass
class Matrix:
    """One matrix on its way through the turns."""

    columns: Tensor  # [in, out], one weight column a row; replaced by what they were settled to
    U: Tensor  # [in, in]
    P: Tensor | None
    E: Tensor  # [in, out], the errors e_c
    taken: Tensor | None  # [in, out], each column as it came to its turn, where there is a P


def sweep(
    columns: Tensor,
    U: Tensor,
    leaf: int,
    begin: Begin,
    settle: Callable[[int, Tensor], Tensor],
    P: Tensor | None = None,
) -> None:
    """Replace `columns` [in, out], one weight column a row, by what `settle` made of them.

    begin(start, stop) runs when columns start .. stop - 1, a leaf, hold every earlier error and none is settled yet;
    settle(c, w) gives the final values [out] of column c from its current ones w [out].
    """
    matrix = prepare(columns, U, P)

    def settle_leaf(start: int, stop: int) -> None:
        begin(start, stop)
        _column_by_column(start, stop, matrix, settle)

    _walk(0, len(columns), matrix, leaf, settle_leaf)


def sweep_both(
    columns: Tensor,
    U: Tensor,
    V: Tensor,
    rows: Tensor,
    leaf: int,
    begin: Begin,
    settle: Callable[[slice, Tensor, Tensor], Tensor],
    P: Tensor | None = None,
) -> None:
    """The same where rows have turns too: rows [out] in turn, V [out, out] in turn.

    settle(turns, rows, w) gives the final values [n] of n single weights, one in each of these columns and rows.
    """
    matrix = prepare(columns, U, P)
    last_first, later = rows.flip(0), V.triu(1).flip(0, 1)  # [out], [out, out]: row r holds V_rk of the rows k after r
    pivots = V.diagonal().flip(0)  # [out]

    def settle_leaf(start: int, stop: int) -> None:
        begin(start, stop)
        _wave_by_wave(start, stop, matrix, last_first, later, pivots, settle)

    _walk(0, len(columns), matrix, leaf, settle_leaf)


def prepare(columns: Tensor, U: Tensor, P: Tensor | None) -> Matrix:
    return Matrix(columns, U, P, torch.empty_like(columns), None if P is None else torch.empty_like(columns))


def _walk(start: int, stop: int, matrix: Matrix, leaf: int, settle_leaf: Begin) -> None:
    """Settle columns start .. stop - 1, which hold what all columns before pass on."""
    n_leaves = -(-(stop - start) // leaf)
    if n_leaves <= 1:
        settle_leaf(start, stop)
        return
    middle = start + (n_leaves + 1) // 2 * leaf
    _walk(start, middle, matrix, leaf, settle_leaf)
    later = matrix.columns[middle:stop]  # [in left, out]
    later.addmm_(matrix.U[start:middle, middle:stop].T, matrix.E[start:middle], alpha=-1)
    if matrix.P is not None and matrix.taken is not None:
        later.addmm_(matrix.P[start:middle, middle:stop].T, matrix.taken[start:middle])
    _walk(middle, stop, matrix, leaf, settle_leaf)


def _column_by_column(start: int, stop: int, matrix: Matrix, settle: Callable[[int, Tensor], Tensor]) -> None:
    """Settle a leaf whose rows do not influence each other."""
    columns, E, P, taken = matrix.columns, matrix.E, matrix.P, matrix.taken
    earlier = matrix.U[start:stop, start:stop].T.contiguous()  # [leaf, leaf], row i holds U_ji of the columns j before i
    pivots = earlier.diagonal().tolist()
    for i, c in enumerate(range(start, stop)):
        w = torch.addmv(columns[c], E[start:c].T, earlier[i, :i], alpha=-1)  # [out]
        if P is not None and taken is not None:
            w = torch.addmv(w, taken[start:c].T, P[start:c, c])
            taken[c] = w
        columns[c] = settle(c, w)
        torch.sub(w, columns[c], out=E[c]).div_(pivots[i])


def _wave_by_wave(
    start: int,
    stop: int,
    matrix: Matrix,
    rows: Tensor,
    later: Tensor,
    pivots: Tensor,
    settle: Callable[[slice, Tensor, Tensor], Tensor],
) -> None:
    """Settle a leaf whose rows have turns; rows [out], later [out, out] and pivots [out] from the last turn to the first.

    A weight waits for the columns before it in its row and for the rows before it in its column. So those whose turns add
    up to the same are settled together: with the last row first they are a diagonal, and the waves go from the rightmost one
    to the leftmost.
    """
    n, n_out = stop - start, matrix.columns.shape[1]
    U = matrix.U[start:stop, start:stop]  # [leaf, leaf]
    widths, between = U.diagonal(), U.triu(1)
    P = None if matrix.P is None else matrix.P[start:stop, start:stop]
    arrived = matrix.columns[start:stop, rows]  # [leaf, out], each weight as it comes to its turn
    of_rows = torch.zeros_like(arrived)  # sum over rows before of V_kr f_kc
    settled, E = torch.empty_like(arrived), torch.empty_like(arrived)
    for offset in range(n_out - 1, -n, -1):
        w = arrived.diagonal(offset).clone()  # [wave]
        c, r = slice(max(0, -offset), max(0, -offset) + len(w)), slice(max(0, offset), max(0, offset) + len(w))
        moved = w - widths[c] * of_rows.diagonal(offset)
        q = settle(slice(start + c.start, start + c.stop), rows[r], moved)
        e = (w - q) / widths[c]
        settled.diagonal(offset).copy_(q)
        E.diagonal(offset).copy_(e)
        of_rows[c].addcmul_(later[r], ((moved - q) / (widths[c] * pivots[r])).unsqueeze(1))
        arrived[:, r].addcmul_(between[c].T, e, value=-1)
        if P is not None:
            arrived[:, r].addcmul_(P[c].T, w)
    matrix.columns[start:stop, rows] = settled
    matrix.E[start:stop, rows] = E
    if matrix.taken is not None:
        matrix.taken[start:stop, rows] = arrived
