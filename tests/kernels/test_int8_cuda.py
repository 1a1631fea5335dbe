"""The kernels of int8.py on the simulator, against their references, to the bit; and their mutants."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.kernels import int8
from qtool.kernels.int8 import matmul_int8, partial_sums, product_launch, quantize_launch, quantize_tokens, splits_of
from qtool.kernels.launch import Launch
from tests.kernels.conftest import KernelFault, Schedule, Simulator, poison

SCHEDULES = (Schedule("late", False, 1), Schedule("late", True, 2), Schedule("eager", True, 3), Schedule("mixed", True, 4))
# tokens, outputs, inputs, splits
SHAPES = ((1, 128, 128, 1), (16, 130, 400, 2), (3, 1, 16, 1), (17, 60, 1040, 3), (65, 129, 528, 1), (140, 40, 272, 2))
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def parts(tokens: int, out: int, n_in: int, symmetric: bool, dtype: torch.dtype) -> Parts:
    generator = torch.Generator().manual_seed(tokens)
    xq = torch.randint(-128, 128, (tokens, n_in), generator=generator, dtype=torch.int8)
    wq = torch.randint(-128, 128, (out, n_in), generator=generator, dtype=torch.int8)
    x_scale = torch.logspace(-3, 1, tokens)
    w_scale = torch.rand(out, generator=generator) / 100 + 0.01
    if symmetric:
        return xq, wq, x_scale, w_scale, None, None, None
    zero = torch.randint(-128, 128, (tokens,), generator=generator, dtype=torch.int32)
    return xq, wq, x_scale, w_scale, torch.randn(out, generator=generator).to(dtype), zero, wq.sum(1, dtype=torch.int32)


def launch_of(given: Parts, splits: int, dtype: torch.dtype) -> tuple[Launch, Tensor, Tensor]:
    """The launch, its output and its counters."""
    tokens, out = len(given[0]), len(given[1])
    y = poison((tokens, out), dtype)
    partial = poison((partial_sums(tokens, out, splits),), torch.int32)
    counters = torch.zeros(64, dtype=torch.int32)
    return product_launch(*given, y, splits, partial, counters), y, counters


def run(simulator: Simulator, given: Parts, splits: int, dtype: torch.dtype, schedule: Schedule) -> Tensor:
    launch, y, counters = launch_of(given, splits, dtype)
    simulator.run(launch, schedule)
    assert not counters.any(), "counters are not back at zero"
    return y


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_product_is_the_references_to_the_bit(compiled: Path, symmetric: bool, dtype: torch.dtype) -> None:
    made = [(parts(tokens, out, n_in, symmetric, dtype), splits) for tokens, out, n_in, splits in SHAPES]
    simulator = Simulator(compiled, "int8.cu", sorted({launch_of(given, 1, dtype)[0].expression for given, _ in made}))
    for given, splits in made:
        expected = matmul_int8(*given, dtype=dtype)
        for schedule in SCHEDULES:
            y = run(simulator, given, splits, dtype, schedule)
            assert torch.equal(y, expected), f"{given[0].shape} {given[1].shape} in {splits}, {schedule}"


def test_inputs_are_split_over_no_more_blocks_than_there_is_work() -> None:
    assert splits_of(1, 64, 512, 132) == 1 and splits_of(1, 4096, 4096, 132) == 8 and splits_of(4096, 4096, 4096, 132) == 1


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_in", [8, 64, 2056])
def test_tokens_are_rounded_as_the_reference_rounds_them(
    compiled: Path, symmetric: bool, dtype: torch.dtype, n_in: int
) -> None:
    x = torch.randn(6, n_in, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 6).unsqueeze(1)
    x[2] += 3 * x[2].abs().max()
    x[3] = -x[3].abs()
    x[4] = 0
    x[5, 0] *= 50
    codes, scales, zeros = rounded(compiled, x.to(dtype), symmetric, None)
    expected = quantize_tokens(x.to(dtype), symmetric)
    assert torch.equal(scales, expected[1]) and torch.equal(zeros, expected[2]) and torch.equal(codes, expected[0])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_norm_goes_before_the_rounding(compiled: Path, symmetric: bool) -> None:
    x = 3 * torch.randn(3, 520, generator=torch.Generator().manual_seed(1)).half()
    gain = torch.linspace(-1, 2, 520).half()
    codes, scales, zeros = rounded(compiled, x, symmetric, gain)
    expected = quantize_tokens(x, symmetric, gain, 1e-5)
    torch.testing.assert_close(scales, expected[1], rtol=2**-10, atol=0)  # squares are summed in another order: a rounding of
    assert (codes.int() - expected[0]).abs().max() <= 1 and (zeros - expected[2]).abs().max() <= 1  # float16 may tip over
    assert (codes != expected[0]).float().mean() < 0.01


def rounded(compiled: Path, x: Tensor, symmetric: bool, gain: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    found = []
    for schedule in SCHEDULES[:2]:
        out = (poison(tuple(x.shape), torch.int8), poison((len(x),), torch.float32), poison((len(x),), torch.int32))
        launch = quantize_launch(x, symmetric, gain, 1e-5, out)
        Simulator(compiled, "int8.cu", [launch.expression]).run(launch, schedule)
        found.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)), "the order in which warps run shows"
    return found[0]


@pytest.mark.parametrize("tokens", [0, 3, 20])
def test_the_operators_do_on_a_gpu_what_they_do_here(compiled: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """What the operators do on a GPU, their launches run by the simulator."""

    def simulate(launch: Launch, _: torch.device) -> None:
        Simulator(compiled, launch.file, [launch.expression]).run(launch, SCHEDULES[1])

    monkeypatch.setattr(int8, "run", simulate)
    monkeypatch.setattr(int8, "n_processors", lambda _: 132)
    monkeypatch.setattr(int8, "counters", lambda _, n: torch.zeros(n, dtype=torch.int32))
    x = torch.randn(tokens, 1536, generator=torch.Generator().manual_seed(0)).half()
    rounded = int8._quantize_on_gpu(x, False, None, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(rounded, quantize_tokens(x, False), strict=True))
    _, wq, _, w_scale, bias, _, sums = parts(1, 70, 1536, False, torch.float16)
    given = (rounded[0], wq, rounded[1], w_scale, bias, rounded[2], sums)
    assert torch.equal(int8._matmul_on_gpu(*given, torch.float16), matmul_int8(*given, dtype=torch.float16))


def test_what_the_operators_cannot_do_on_a_gpu_is_said() -> None:
    codes, scale = torch.ones(1, 24, dtype=torch.int8), torch.ones(1)
    with pytest.raises(QtoolError, match="multiple of 16"):
        int8._matmul_on_gpu(codes, codes, scale, scale, None, None, None, torch.float16)
    with pytest.raises(QtoolError, match="outputs in torch.float32"):
        int8._matmul_on_gpu(codes[:, :16], codes[:, :16], scale, scale, None, None, None, torch.float32)
    with pytest.raises(QtoolError, match="inputs in torch.float32"):
        int8._quantize_on_gpu(torch.ones(1, 8), True, None, 0.0)
    with pytest.raises(QtoolError, match="multiple of 8"):
        int8._quantize_on_gpu(torch.ones(1, 12).half(), True, None, 0.0)


MUTANTS = {
    "no barrier before a place is written again": ("__syncthreads();  // this block is there", "// this block is there"),
    "no barrier before sums": ("__syncthreads();  // the ring becomes sums", ""),
    "no wait": ("ptx::wait<STAGES - 2>();", ""),
    "a wait too few": ("ptx::wait<STAGES - 2>();", "ptx::wait<STAGES - 1>();"),
    "scales of weights and tokens are swapped": ("(x_scale[token] * w_scale[n])", "(x_scale[n] * w_scale[token])"),
    "no zero points": ("if (x_zero) sum -=", "if (false) sum -="),
    "no end of the inputs": ("valid = k < n_in && (is_weight", "valid = (is_weight"),
    "no end of the outputs": ("n < n_out : token < n_tokens", "true : token < n_tokens"),
    "rows g and g + 8 are swapped": ("{upper.x, lower.x, upper.y, lower.y}", "{lower.x, upper.x, lower.y, upper.y}"),
    "a tile off by one": ("int row = 16 * (warp % 2 * NT + n) + g;", "int row = 16 * (warp % 2 * NT + (n + 1) % NT) + g;"),
    "a counter is left": ("if (*flag) counters[place] = 0;", ""),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_these_tests_catch(compiled: Path, name: str) -> None:
    dtype = torch.float16
    given = parts(20, 140, 16 * 50, False, dtype)
    expected = matmul_int8(*given, dtype=dtype)
    expression = launch_of(given, 1, dtype)[0].expression

    def passes(simulator: Simulator) -> bool:
        try:
            return all(
                torch.equal(run(simulator, given, 1 + s % 2, dtype, schedule), expected) for s, schedule in enumerate(SCHEDULES)
            )
        except (KernelFault, AssertionError):
            return False

    assert passes(Simulator(compiled, "int8.cu", [expression]))
    assert not passes(Simulator(compiled, "int8.cu", [expression], (MUTANTS[name],)))
