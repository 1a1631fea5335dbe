"""Products of eight bits by eight on a GPU, exact in their sums, and the rounding of tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.kernels import int8

Inputs = Callable[..., Tensor]
Near = Callable[[Tensor, Tensor, float], None]


def codes(n: int, n_in: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, (n, n_in), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 31, 64, 65, 128, 129, 257, 1000])
@pytest.mark.parametrize("shape", [(64, 128), (1024, 4096), (4096, 1024), (1000, 1040)])
def test_edge_shapes(tokens: int, shape: tuple[int, int], seed: int, gpu: torch.device, near: Near) -> None:
    xq, wq = codes(tokens, shape[1], seed), codes(shape[0], shape[1], seed + 1)
    random = torch.Generator().manual_seed(seed)
    sx, sw = torch.rand(tokens, generator=random) + 0.1, torch.rand(shape[0], generator=random) + 0.1
    zero = torch.randint(-128, 128, (tokens,), generator=random, dtype=torch.int32)
    bias = torch.randn(shape[0], generator=random).to(torch.bfloat16)
    product = xq.double() @ wq.double().T  # whole numbers below 2^53
    scales = (sx[:, None] * sw).double()
    on_gpu = [part.to(gpu) for part in (xq, wq, sx, sw)]
    near(int8.matmul_int8(*on_gpu), (product * scales).to(gpu), 2**-8)
    sums = wq.sum(-1, dtype=torch.int32)
    shifted = (product - zero.double()[:, None] * sums.double()) * scales + bias.double()
    near(int8.matmul_int8(*on_gpu, bias.to(gpu), zero.to(gpu), sums.to(gpu)), shifted.to(gpu), 2**-8)


def test_sums_are_exact_to_the_bit(seed: int, gpu: torch.device) -> None:
    xq, wq = codes(33, 64, seed).clamp(-4, 4), codes(128, 64, seed + 1).clamp(-4, 4)  # sums that float16 holds
    ones = torch.ones(33, device=gpu), torch.ones(128, device=gpu)
    y = int8.matmul_int8(xq.to(gpu), wq.to(gpu), *ones, dtype=torch.float16)
    assert torch.equal(y.double().cpu(), xq.double() @ wq.double().T)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("n_in", [128, 1032, 4096, 14336])
def test_tokens_are_rounded_as_on_the_cpu(symmetric: bool, with_norm: bool, n_in: int, inputs: Inputs) -> None:
    x = inputs(17, n_in, torch.bfloat16)
    gain = (torch.rand(n_in, device=x.device) + 0.5).to(torch.bfloat16) if with_norm else None
    found = int8.quantize_tokens(x, symmetric, gain)
    expected = int8.quantize_tokens(x.cpu(), symmetric, None if gain is None else gain.cpu())
    # Sums of squares in another order move a value across a border between codes now and then, and a scale in its last digits.
    assert float((found[0].cpu().int() - expected[0].int()).abs().max()) <= (2 if with_norm else 1)
    assert float((found[0].cpu() != expected[0]).float().mean()) < (0.05 if with_norm else 1e-3)
    torch.testing.assert_close(found[1].cpu(), expected[1], rtol=2**-7 if with_norm else 1e-6, atol=0)
    assert int((found[2].cpu() - expected[2]).abs().max()) <= 1
