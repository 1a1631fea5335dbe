"""Low rank: the best product of two thin matrices in a metric of inputs, and how many ranks each of several matrices gets.

    minimize tr((W - A B) M (W - A B)ᵀ):    A = U_r,  B = U_rᵀ W,    error = sum over i > r of e_i
    U, e eigenvectors and eigenvalues of W M Wᵀ, strongest first    W [out, in], M [in, in]
e_i is the square of a singular value of W S, for any S with S Sᵀ = M, and U_r U_rᵀ W S the truncated SVD of W S.
Why no S: M may be singular, and neither its root nor its inverse is formed. With W = Q R the eigenvectors are Q times those
of R M Rᵀ, which is never larger than the smaller side of W.
"""

import torch
from torch import Tensor

from qtool.errors import QtoolError

HALVINGS = 64  # of the price of a number, which lies below 2


def directions(W: Tensor, M: Tensor | None) -> tuple[Tensor, Tensor]:
    """U [out, least] and e [least] of W [out, in]; M [in, in], [in] of a diagonal, None for the identity.

    Raises QtoolError where something is not finite.
    """
    Q, R = torch.linalg.qr(W)  # [out, least], [least, in], least = min(out, in)
    weighted = R if M is None else R * M if M.ndim == 1 else R @ M  # [least, in]
    G = weighted @ R.T  # [least, least]
    if not torch.isfinite(G).all():
        raise QtoolError("weights or inputs hold NaN or infinity; check the model's weights and load it with dtype: float32")
    e, V = torch.linalg.eigh(G)
    return Q @ V.flip(1), e.flip(0).clamp_min(0)


def factors(W: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """A [out, rank] and B [rank, in] of A B = U Uᵀ W, the two of each rank of equal length; U [out, rank]."""
    B = U.T @ W  # [rank, in]
    half = B.norm(dim=1, keepdim=True).sqrt()  # [rank, 1]
    return U * half.T, B / half.clamp_min(torch.finfo(half.dtype).tiny)


def ranks_within(energies: list[Tensor], shapes: list[tuple[int, int]], keep: float) -> list[int | None]:
    """The rank of each matrix [out, in], None where it stays whole, so that all hold at most the share `keep` of their numbers.

    energies: e of `directions`, of each. Of all choices that hold no more numbers, the one of least summed relative error: at a
    price of a number each matrix takes what costs it least, error and numbers together (Everett 1963, Oper. Res. 11, 399). The
    price is halved in on until the budget is met; a part of it that no price meets stays unused.
    Raises QtoolError where not one rank for each is left.
    """
    choices = [_choices(e, shape) for e, shape in zip(energies, shapes, strict=True)]
    total = sum(out * columns for out, columns in shapes)
    budget = keep * total

    def at(price: float) -> list[int]:
        return [int((errors + price * numbers).argmin()) for errors, numbers in choices]  # of equal ones the fewest numbers

    def held(places: list[int]) -> float:
        return sum(float(numbers[place]) for (_, numbers), place in zip(choices, places, strict=True))

    low, high = 0.0, 2.0  # at 2 a single number costs more than all error
    if held(at(high)) > budget:
        raise QtoolError(f"keep {keep} leaves less than one rank for each linear; use {held(at(high)) / total:.2g} or more")
    if held(at(low)) <= budget:
        high = low
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if held(at(middle)) <= budget else (middle, high)
    return [None if place == len(errors) - 1 else place + 1 for (errors, _), place in zip(choices, at(high), strict=True)]


def _choices(e: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Relative error and numbers of each rank that saves numbers, from 1 on, and last of the whole matrix."""
    out, columns = shape
    most = max(0, (out * columns - 1) // (out + columns))
    left = e.double().cpu().flip(0).cumsum(0).flip(0)  # [least], error of keeping the ranks before
    errors = torch.cat([left[1:], left.new_zeros(1)])[:most] / left[0].clamp_min(torch.finfo(left.dtype).tiny)
    numbers = torch.arange(1, most + 1, dtype=torch.float64) * (out + columns)
    return torch.cat([errors, errors.new_zeros(1)]), torch.cat([numbers, numbers.new_full((1,), out * columns)])
