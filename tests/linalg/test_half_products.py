"""Products of 16-bit matrices by float32 units: the exact product rounded once, through every way torch multiplies."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from qtool.linalg import half_products

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def whole(*shape: int) -> Tensor:
    """Whole numbers, whose products and sums float32 holds exactly."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(sum(shape))).double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "m"), [(5, 300, 7), (1, 1, 1), (0, 4, 3), (4, 0, 3)])
def test_a_product_is_the_exact_one_rounded_once(dtype: torch.dtype, n: int, k: int, m: int) -> None:
    a, b, c = whole(2, n, k), whole(2, k, m), whole(m)
    A, B, C = a.to(dtype), b.to(dtype), c.to(dtype)
    assert torch.equal(half_products.bmm(A, B), (a @ b).to(dtype))
    assert torch.equal(half_products.baddbmm(C, A, B, beta=2, alpha=0.5), (2 * c + (a @ b) / 2).to(dtype))
    assert torch.equal(half_products.mm(A[0], B[0]), (a[0] @ b[0]).to(dtype))
    assert torch.equal(half_products.mm(A[0], whole(m, k).to(dtype).T), (a[0] @ whole(m, k).T).to(dtype))
    assert torch.equal(half_products.addmm(C, A[0], B[0], beta=0.5, alpha=2), (c / 2 + 2 * (a[0] @ b[0])).to(dtype))


def test_torch_multiplies_by_them_once_they_are_registered_gradients_too() -> None:
    # In a process of its own: what is registered stays. Too large for bfloat16 if any sum were rounded before its end.
    code = """
import torch
import torch.nn.functional as F
from qtool.linalg import half_products
half_products.register()
half_products.register()
x = (torch.arange(2 * 3 * 64).view(2, 3, 64) % 17 - 8.0)
w, b = (torch.arange(5 * 64).view(5, 64) % 13 - 6.0), torch.arange(5.0)
def gradients(dtype):
    leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
    y = F.linear(*leaves)
    z = y @ F.linear(leaves[0], leaves[1]).transpose(1, 2)
    (y.sum() + F.linear(leaves[0], leaves[1]).sum()).backward()
    return [y, z, *(leaf.grad for leaf in leaves)]
half, exact = gradients(torch.bfloat16), gradients(torch.float64)
for got, want in zip(half, exact):
    assert got.dtype == torch.bfloat16
    assert torch.allclose(got.double(), want, rtol=2**-7, atol=0), (got, want)
print(torch._C._dispatch_dump("aten::mm").count("half_products"))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0


@pytest.mark.parametrize("has_units", [True, False])
def test_training_takes_bfloat16_where_units_are_and_the_weights_own_elsewhere(
    has_units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half_products, "has_units", lambda: has_units)
    with half_products.mixed_precision(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if has_units else torch.float32)
