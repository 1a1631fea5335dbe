"""The eight-bit product and the rounding of tokens on the CPU, against formats/inputs.py and sums in float64."""

import pytest
import torch

from qtool.kernels.int8 import ASYMMETRIC, SYMMETRIC, matmul_int8, quantize_tokens
from qtool.layers.quant_linear import snap_inputs


@pytest.mark.parametrize("symmetric", [True, False])
def test_tokens_are_rounded_as_the_layers_round_them(symmetric: bool) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-4, 1, 1, 50, 0]).unsqueeze(1)
    x[2] += 3
    q, scale, zero = quantize_tokens(x, symmetric)
    values = (q.float() - zero[:, None]) * scale[:, None]
    assert torch.equal(values, snap_inputs(x, SYMMETRIC if symmetric else ASYMMETRIC))


def test_a_norm_goes_before_the_rounding() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    gain = torch.linspace(0.5, 2, 64).bfloat16()
    norm = torch.nn.RMSNorm(64, eps=1e-5, dtype=torch.bfloat16)
    norm.weight.data = gain
    q, scale, _ = quantize_tokens(x, gain=gain, eps=1e-5)
    # RMSNorm of torch multiplies by the gain before it rounds to bfloat16, transformers after: two roundings of 2^-9.
    torch.testing.assert_close(q.float() * scale[:, None], norm(x).float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_product_is_that_of_the_values(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(7, 96, generator=generator) + (0 if symmetric else 2)
    wq = torch.randint(-128, 128, (24, 96), generator=generator, dtype=torch.int8)
    w_scale, bias = torch.rand(24, generator=generator), torch.randn(24, generator=generator)
    q, scale, zero = quantize_tokens(x, symmetric)
    sums = None if symmetric else wq.sum(1, dtype=torch.int32)
    y = matmul_int8(q, wq, scale, w_scale, bias, None if symmetric else zero, sums, torch.float32)
    values = (q.double() - zero[:, None]) * scale[:, None].double()
    expected = values @ (wq.double() * w_scale[:, None].double()).T + bias
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-3)  # one float32 rounding of each factor


def test_no_token_is_no_fault() -> None:
    q, scale, zero = quantize_tokens(torch.empty(0, 64))
    assert matmul_int8(q, torch.zeros(8, 64, dtype=torch.int8), scale, torch.ones(8)).shape == (0, 8) and len(zero) == 0


def test_torch_checks_the_operators() -> None:
    x = torch.randn(3, 64)
    torch.library.opcheck(torch.ops.qtool.quantize_tokens, (x, False, None, 1e-6))
    q, scale, zero = quantize_tokens(x, False)
    w = torch.ones(8, 64, dtype=torch.int8)
    torch.library.opcheck(torch.ops.qtool.int8_matmul, (q, w, scale, torch.ones(8), None, zero, w.sum(1).int(), torch.bfloat16))
