"""Hadamard matrices, constructed for every order that the constructions here reach, and fast products with them.

    H Hᵀ = n I,   H_ij = ±1,   H [n, n]
    Sylvester   H_2n = [[H, H], [H, -H]]
    Paley I     n = q + 1,   q = 3 mod 4 a prime power:   H = I + S,   S = [[0, 1], [-1, X]]
    Paley II    n = 2 (q + 1),   q = 1 mod 4 a prime power:   H = S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]],
                                                             S = [[0, 1], [1, X]]
    Kronecker   H_mn = H_m ⊗ H_n
    X_ab = χ(a - b)    a, b in GF(q)    χ = 1 at squares, 0 at zero, else -1
x H / √n takes n (log2 n - log2 m + m) operations where n = m 2^k. Orders below 400 that are multiples of four and that none of
these reach: 92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292, 324, 356, 372, 376. Most have a double or quadruple that
they do reach, such as 312 and 344. Elsewhere `hadamard_block` says how much of n one matrix can take.
Source: Sylvester 1867; Paley 1933, On Orthogonal Matrices, J. Math. Phys. 12, 311.
"""

import functools
import itertools
import math

import torch
from torch import Tensor

LARGEST_DEGREE = 3  # of a field over its prime: a polynomial of two or three without roots does not factor


def hadamard_matrix(n: int) -> Tensor | None:
    """H [n, n] of ±1, float64; None where no construction here reaches n."""
    split = small_factor(n)
    if split is None:
        return None
    core = _core(split)
    assert core is not None, f"small_factor gives an order that is reached, not {split}"
    H = core
    while len(H) < n:
        H = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    return H


@functools.cache
def small_factor(n: int) -> int | None:
    """The smallest m with n = m 2^k whose Hadamard matrix is known without doubling; None where there is none."""
    orders = [n]
    while orders[-1] % 2 == 0:
        orders.append(orders[-1] // 2)
    return next((m for m in reversed(orders) if _is_core(m)), None)


def hadamard_block(n: int) -> int:
    """The largest divisor of n that is the order of a Hadamard matrix: n itself, or the size of blocks along a diagonal."""
    return next(size for size in range(n, 0, -1) if n % size == 0 and small_factor(size) is not None)


def hadamard_product(x: Tensor) -> Tensor:
    """x [..., n] times H / √n, block by block where n has no matrix of its own; in x's dtype, from float32 at least."""
    n = x.shape[-1]
    size = hadamard_block(n)
    m = small_factor(size)
    assert m is not None, "hadamard_block gives an order that is reached"
    wide = x if x.dtype == torch.float64 else x.float()
    y = wide.reshape(-1, m, size // m)  # [vectors · blocks, m, 2^k]
    if m > 1:
        core = _core(m)
        assert core is not None, "small_factor gives an order that is reached"
        y = core.T.to(y) @ y  # H = core ⊗ Sylvester: xᵀ H mixes the first index by core, the second by Sylvester's
    width = 1
    while width < size // m:
        a, b = y.reshape(-1, 2, width).unbind(1)  # [pairs, width]
        y = torch.stack([a + b, a - b], 1)
        width *= 2
    product: Tensor = y.reshape(x.shape) / math.sqrt(size)
    return product.to(x.dtype)


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A matrix [n, n] drawn evenly from all orthogonal ones, float64."""
    Q, R = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    rotation: Tensor = Q * R.diagonal().sign()
    return rotation


def random_signs(n: int, generator: torch.Generator) -> Tensor:
    """±1 [n], float64."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def hadamard_rotation(n: int, signs: Tensor | None = None) -> Tensor | None:
    """Q = D H / √n [n, n], float64, D the diagonal of `signs` [n]; None where n has no Hadamard matrix here."""
    H = hadamard_matrix(n)
    if H is None:
        return None
    return (H if signs is None else signs[:, None] * H) / math.sqrt(n)


def spreading_rotation(n: int, keeps_mean: bool, generator: torch.Generator) -> Tensor:
    """A random rotation [n, n] that spreads every channel over all: by a Hadamard matrix, where there is one."""
    if keeps_mean:
        return mean_keeping_rotation(n, generator)
    Q = hadamard_rotation(n, random_signs(n, generator))
    return random_orthogonal(n, generator) if Q is None else Q


def mean_keeping_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal Q [n, n] with Q 1 = 1, float64, random and with all its entries of like size.

    Q = H D Hᵀ / n, where the first column of H is 1 and D has random signs but D_11 = 1: then Q 1 = H D e_1 = 1, so that
    the mean of x Q is that of x, and LayerNorm without gain and bias commutes with it.
    """
    H = ones_first(n, generator)
    D = random_signs(n, generator)
    D[0] = 1
    return (H * D) @ H.T / n


def levelling_rotation(Sigma: Tensor, keeps_mean: bool, generator: torch.Generator) -> Tensor:
    """An orthogonal Q [n, n], float64, after which every channel of a covariance Sigma [n, n] has the same variance.

    Q = V Hᵀ / √n, V the eigenvectors of Sigma: QᵀΣQ = H Λ Hᵀ / n has tr Σ / n all along its diagonal. With `keeps_mean`
    V has 1 / √n in its first column and then the eigenvectors of Sigma across it, so that Q 1 = √n V e_1 = 1; levels are then
    the same up to what Sigma has along 1.
    """
    n = len(Sigma)
    if not keeps_mean:
        V = torch.linalg.eigh(Sigma.double())[1]
    else:
        one = torch.full((n, 1), 1 / math.sqrt(n), dtype=torch.float64)
        across = torch.linalg.qr(torch.cat([one, torch.eye(n, dtype=torch.float64)[:, 1:]], 1))[0][:, 1:]  # [n, n - 1]
        V = torch.cat([one, across @ torch.linalg.eigh(across.T @ Sigma.double() @ across)[1]], 1)
    rotation: Tensor = V @ ones_first(n, generator).T / math.sqrt(n)
    return rotation


def ones_first(n: int, generator: torch.Generator) -> Tensor:
    """H [n, n], float64, with H Hᵀ = n I and a first column of ones: a Hadamard matrix, or a random one where there is none."""
    H = hadamard_matrix(n)
    if H is None:
        columns = torch.randn(n, n, dtype=torch.float64, generator=generator)
        columns[:, 0] = 1
        Q, R = torch.linalg.qr(columns)
        H = Q * R.diagonal().sign() * math.sqrt(n)
    return H[:, :1] * H  # rows times ±1: the first column becomes 1; of the random one it is 1 already


def _is_core(m: int) -> bool:
    """Whether `_core` reaches m, without building it."""
    if m in (1, 2):
        return True
    if m % 4:
        return False
    return _paley_field(m) is not None or _kronecker(m) is not None


def _paley_field(m: int) -> tuple[int, int] | None:
    """(p, degree) of the field that Paley I or II takes for order m."""
    for q, residue in ((m - 1, 3), (m // 2 - 1, 1)):
        field = prime_power(q)
        if q % 4 == residue and field is not None and field[1] <= LARGEST_DEGREE:
            return field
    return None


def _kronecker(m: int) -> tuple[int, int] | None:
    """Two orders of Paley's whose product is m."""
    pairs = ((a, m // a) for a in range(4, math.isqrt(m) + 1, 4) if m % a == 0)
    return next(((a, b) for a, b in pairs if b % 4 == 0 and _is_core(a) and _is_core(b)), None)


@functools.cache
def _core(m: int) -> Tensor | None:
    """H [m, m] by Paley, by Kronecker's product, or of order 1 or 2; float64."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if m == 2:
        return torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    if m % 4:
        return None
    if (field := _paley_field(m)) is not None:
        return _paley(*field)
    if (pair := _kronecker(m)) is not None:
        first, second = (_core(order) for order in pair)
        assert first is not None and second is not None, "_kronecker gives orders that are reached"
        return torch.kron(first, second)
    return None


def _paley(p: int, degree: int) -> Tensor:
    """Paley's matrix over GF(p^degree): the first kind where p^degree = 3 mod 4, else the second."""
    X = jacobsthal(p, degree)  # [q, q]
    q = len(X)
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[1:, 1:], S[0, 1:] = X, 1
    S[1:, 0] = -1 if q % 4 == 3 else 1
    I = torch.eye(q + 1, dtype=torch.float64)  # noqa: E741
    if q % 4 == 3:
        return I + S
    plus, minus = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
    return torch.kron(S, plus) + torch.kron(I, minus)


def jacobsthal(p: int, degree: int) -> Tensor:
    """χ(a - b) of all a, b in GF(p^degree) [q, q], float64; element number a has the digits of a in base p."""
    q = p**degree
    digits = torch.stack([torch.arange(q) // p**place % p for place in range(degree)], 1)  # [q, degree]
    squares = polynomial_squares(digits, irreducible(p, degree), p)
    weights = p ** torch.arange(degree)
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[(squares * weights).sum(1)] = 1
    chi[0] = 0
    number = torch.zeros(q, q, dtype=torch.int64)
    for place in range(degree):
        number += ((digits[:, None, place] - digits[None, :, place]) % p) * weights[place]
    return chi[number]


def polynomial_squares(digits: Tensor, modulus: tuple[int, ...], p: int) -> Tensor:
    """Squares of polynomials [q, degree], lowest power first, modulo the monic x^degree + modulus and p."""
    degree = digits.shape[1]
    product = torch.zeros(len(digits), 2 * degree - 1, dtype=torch.int64)
    for i, j in itertools.product(range(degree), repeat=2):
        product[:, i + j] += digits[:, i] * digits[:, j]
    for power in range(2 * degree - 2, degree - 1, -1):  # x^power = -modulus x^(power - degree)
        for place, coefficient in enumerate(modulus):
            product[:, power - degree + place] -= product[:, power] % p * coefficient
    return product[:, :degree] % p


def irreducible(p: int, degree: int) -> tuple[int, ...]:
    """Coefficients below the leading 1 of the first monic polynomial of this degree that does not factor, lowest first."""
    if degree == 1:
        return (0,)
    for modulus in itertools.product(range(p), repeat=degree):
        values = [(x**degree + sum(c * x**place for place, c in enumerate(modulus))) % p for x in range(p)]
        if 0 not in values:
            return modulus
    raise AssertionError("over every prime there are irreducible polynomials of every degree")


def prime_power(q: int) -> tuple[int, int] | None:
    """(p, degree) with q = p^degree, p prime; None where q is no power of a prime."""
    if q < 2:
        return None
    p = next((divisor for divisor in range(2, math.isqrt(q) + 1) if q % divisor == 0), q)
    degree = 0
    while q % p == 0:
        q, degree = q // p, degree + 1
    return (p, degree) if q == 1 else None
