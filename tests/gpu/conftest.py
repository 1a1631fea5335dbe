"""Tests that need a GPU: fresh inputs at each run, outputs in poisoned memory, and what they are compared with, in float64."""

import secrets
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.kernels import launch

REASON = launch.reason_not_to_run()
OUTLIER = 50.0


@pytest.fixture(autouse=True)
def gpu() -> Iterator[torch.device]:
    """The GPU, whose free memory holds NaN, so that what a kernel leaves unwritten shows; skips where there is none."""
    if REASON is not None:
        pytest.skip(f"kernels do not run here: {REASON}")
    device = torch.device("cuda", torch.cuda.current_device())
    poison = torch.full((64 << 20,), torch.nan, device=device)
    small = [torch.full((1 << power,), torch.nan, device=device) for power in range(6, 20)]
    del poison, small  # torch's allocator hands the same memory out again
    yield device
    torch.cuda.synchronize()  # a fault belongs to the test that made it


@pytest.fixture
def seed(record_property: Callable[[str, object], None]) -> int:
    """Another one at each run; pytest shows it where a test fails."""
    drawn = secrets.randbits(32)
    record_property("seed", drawn)
    print(f"seed {drawn}")
    return drawn


@pytest.fixture
def weights(gpu: torch.device, seed: int) -> Callable[..., QuantizedTensor]:
    """`weights("w4a16g128", 4096, 4096)`: random ones on the GPU, whose groups' magnitudes span four decades."""

    def make(scheme: str, n_out: int, n_in: int) -> QuantizedTensor:
        random = torch.Generator(gpu).manual_seed(seed)
        W = torch.randn(n_out, n_in, device=gpu, generator=random)
        spread = 10 ** (4 * torch.rand(n_out, n_in // 8, device=gpu, generator=random) - 2)
        spread = spread.repeat_interleave(8, 1) if n_in % 8 == 0 else 1.0
        return quantize(W * spread, Scheme.model_validate(scheme).weights)

    return make


@pytest.fixture
def inputs(gpu: torch.device, seed: int) -> Callable[..., Tensor]:
    """`inputs(tokens, n_in, dtype)`: normal, with one channel of outliers and one row that is zero but for a one."""

    def make(tokens: int, n_in: int, dtype: torch.dtype) -> Tensor:
        random = torch.Generator(gpu).manual_seed(seed + 1)
        x = torch.randn(tokens, n_in, device=gpu, generator=random)
        x[:, seed % n_in] *= OUTLIER
        if tokens > 2:
            x[tokens // 2] = 0
            x[tokens // 2, (seed // 7) % n_in] = 1
        return x.to(dtype)

    return make


@pytest.fixture
def near() -> Callable[[Tensor, Tensor, float], None]:
    """`near(y, expected, bound)`: by the norm of all, of the worst token and of the worst output; NaN fails."""

    def check(y: Tensor, expected: Tensor, bound: float) -> None:
        assert y.shape == expected.shape
        difference = y.double() - expected
        of_all = float(difference.norm() / expected.norm())
        # What is near zero by chance is held against the 100th of the typical.
        least = [float(expected.norm()) / expected.shape[side] ** 0.5 / 100 for side in (0, 1)]
        of_token = float((difference.norm(dim=1) / expected.norm(dim=1).clamp(min=least[0])).max())
        of_output = float((difference.norm(dim=0) / expected.norm(dim=0).clamp(min=least[1])).max())
        assert of_all <= bound and of_token <= 2 * bound and of_output <= 4 * bound, (of_all, of_token, of_output)

    return check
