"""The walk that GPTQ and SparseGPT share: settle column after column, let the later ones make up for each error.

    q_c = settle(w_c)      e_c = (w_c - q_c) / U_cc      w_j += P_cj w_c - U_cj e_c  for every later column j
    w_c, q_c, e_c [out]    U [in, in] upper triangular, see hessian.py    P [in, in] strictly upper, or none
Source: Frantar et al. 2022, arXiv:2210.17323, Algorithm 1. Differs: instead of lazy blocks of one size the columns are
halved until a leaf remains, and the first half's errors reach the second in one matrix product. It is the same sum,
with the weights read log(in / leaf) times instead of in / 128 times, so that small leaves cost little.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def sweep(
    columns: Tensor,
    U: Tensor,
    leaf: int,
    begin: Callable[[int, int], None],
    settle: Callable[[int, Tensor], Tensor],
    P: Tensor | None = None,
) -> None:
    """Replace `columns` [in, out], one weight column a row, by what `settle` made of them.

    begin(start, stop) runs when columns start .. stop - 1, a leaf, hold every earlier error and none is settled yet;
    settle(c, w) gives the final values [out] of column c from its current ones w [out].
    """
    taken = None if P is None else torch.empty_like(columns)  # each column as it came to its turn
    _walk(0, len(columns), columns, torch.empty_like(columns), taken, U, P, leaf, begin, settle)


def _walk(
    start: int,
    stop: int,
    columns: Tensor,
    E: Tensor,
    taken: Tensor | None,
    U: Tensor,
    P: Tensor | None,
    leaf: int,
    begin: Callable[[int, int], None],
    settle: Callable[[int, Tensor], Tensor],
) -> None:
    """`sweep` of columns start .. stop - 1, which hold what all columns before pass on; fills their rows of E and taken."""
    n_leaves = -(-(stop - start) // leaf)
    if n_leaves > 1:
        middle = start + (n_leaves + 1) // 2 * leaf
        _walk(start, middle, columns, E, taken, U, P, leaf, begin, settle)
        columns[middle:stop].addmm_(U[start:middle, middle:stop].T, E[start:middle], alpha=-1)  # [in left, out]
        if P is not None and taken is not None:
            columns[middle:stop].addmm_(P[start:middle, middle:stop].T, taken[start:middle])
        _walk(middle, stop, columns, E, taken, U, P, leaf, begin, settle)
        return
    begin(start, stop)
    earlier = U[start:stop, start:stop].T.contiguous()  # [leaf, leaf], row i holds U_ji of the columns j before i
    pivots = earlier.diagonal().tolist()
    for i, c in enumerate(range(start, stop)):
        w = torch.addmv(columns[c], E[start:c].T, earlier[i, :i], alpha=-1)  # [out]
        if P is not None and taken is not None:
            w = torch.addmv(w, taken[start:c].T, P[start:c, c])
            taken[c] = w
        columns[c] = settle(c, w)
        torch.sub(w, columns[c], out=E[c]).div_(pivots[i])
