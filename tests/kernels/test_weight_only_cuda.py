"""The kernels of weight_only.py on the simulator, over edge shapes and schedules, against float64; and their mutants."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.kernels import weight_only
from qtool.kernels.launch import Launch
from qtool.kernels.weight_only import (
    PackedWeight,
    dequantize_launch,
    pack,
    partial_sums,
    product_launch,
    splits_of,
    unpack,
)
from tests.kernels.conftest import KernelFault, Schedule, Simulator, poison

# Of a rounded output. Not less than half of one step, for float32 sums round before, and a tie may fall to either side.
HALF_STEP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
SCHEDULES = (Schedule("late", False, 1), Schedule("late", True, 2), Schedule("eager", True, 3), Schedule("mixed", True, 4))
# Scheme, its scales where they are not bfloat16. Every format, both spans, all kinds of scales, with zero points and without.
FAMILIES = (
    *(("w4g64", None), ("w4g128-asym", "float16"), ("w4g32-asymf16", None), ("w4g32", "float32"), ("w4", None)),
    *(("w2g64-asym", None), ("w2g32", "float16"), ("w2-asym", None), ("w3g64", None), ("w3g32-asym", "float32"), ("w3", None)),
    *(("w8", None), ("w8g64-asym", None), ("w8g32", "float32"), ("mxint8", None)),
    *(("nf4g64", None), ("nf4g64-dq", "float32"), ("e2m1g32-asymf16", None), ("iq4_nl", "float16")),
    *(("mxfp4", None), ("nvfp4", None)),
)
# tokens, outputs, inputs in multiples of the scheme's group (of 8 where a row is one), splits
SHAPES = ((1, 64, 4, 1), (2, 1, 1, 1), (7, 65, 11, 2), (8, 16, 40, 5), (9, 63, 5, 1), (16, 130, 9, 3), (15, 17, 2, 1))
BATCHES = ((17, 64, 1, 1), (64, 129, 7, 2), (65, 60, 24, 3), (130, 20, 3, 1))


@dataclass(frozen=True)
class Case:
    tensor: QuantizedTensor
    packed: PackedWeight
    x: Tensor
    bias: Tensor | None

    def exact(self) -> Tensor:
        """y [tokens, out] in float64, of the levels in x's dtype where they come from a table."""
        table = self.packed.table
        packed = replace(self.packed, table=None if table is None else table.to(self.x.dtype).float())
        y = self.x.double() @ unpack(packed).double().T
        return y if self.bias is None else y + self.bias.double()

    def largest_error(self, y: Tensor) -> float:
        """The error of the worst output, as a share of what rounding of y and float32 sums may bring."""
        exact = self.exact()
        scale = self.tensor.scale.float().abs() * self.tensor.of_tensor  # [out, groups]
        largest = 2.0 ** (self.packed.bits) if self.packed.table is None else float(self.packed.table.abs().max())
        terms = (to_groups(torch.ones(self.packed.shape), self.tensor.scheme) * scale.unsqueeze(-1)).flatten(1) * largest
        sums = self.x.double().abs() @ terms.double().T  # [tokens, out], no less than any partial sum's terms together
        allowed = HALF_STEP[self.x.dtype] * exact.abs() + 2.0**-21 * sums + 2.0**-24  # some roundings of 2^-24 each
        return float(((y.double() - exact).abs() / allowed).nan_to_num(torch.inf).max())


def weights(scheme: str, scale_dtype: str | None, out: int, n_in: int, seed: int) -> QuantizedTensor:
    fields = Scheme.model_validate(scheme).weights
    fields = fields if scale_dtype is None else fields.model_copy(update={"scale_dtype": scale_dtype})
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, n_in, generator=generator) * torch.logspace(-2, 1, out).unsqueeze(1)
    w[:, n_in // 2 :] += w.std(1, keepdim=True)  # ranges that do not lie about zero
    return quantize(w, fields)


def case_of(scheme: str, scale_dtype: str | None, tokens: int, out: int, n: int, dtype: torch.dtype, seed: int = 0) -> Case:
    group = Scheme.model_validate(scheme).weights.group
    tensor = weights(scheme, scale_dtype, out, n * (group or 8), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    x = torch.randn(tokens, tensor.shape[1], generator=generator)
    x[:, :: max(1, x.shape[1] // 3)] *= 50  # outliers
    bias = torch.randn(out, generator=generator).to(dtype) if tokens % 2 else None
    return Case(tensor, pack(tensor), x.to(dtype), bias)


def run(simulator: Simulator, case: Case, splits: int, schedule: Schedule) -> Tensor:
    tokens, out = len(case.x), case.packed.shape[0]
    y = poison((tokens, out), case.x.dtype)
    partial = poison((partial_sums(case.packed, tokens, splits),), torch.float32)
    counters = torch.zeros(len(case.packed.codes) * 3, dtype=torch.int32)
    simulator.run(product_launch(case.x, case.packed, case.bias, y, splits, partial, counters), schedule)
    assert not counters.any(), "counters are not back at zero"
    return y


def expression_of(case: Case) -> str:
    return product_launch(case.x, case.packed, None, case.x, 1, None, None).expression


def check(compiled: Path, file: str, cases: list[tuple[Case, int]]) -> None:
    """Each case in its splits under every schedule: right, and the same to the bit."""
    simulator = Simulator(compiled, file, sorted({expression_of(case) for case, _ in cases}))
    for case, splits in cases:
        found = [run(simulator, case, splits, schedule) for schedule in SCHEDULES]
        assert case.largest_error(found[0]) <= 1, f"{case.x.shape} {case.packed.shape} in {splits}"
        assert all(torch.equal(y, found[0]) for y in found), "the order in which warps run shows"


@pytest.mark.parametrize(("scheme", "scale_dtype"), FAMILIES, ids=lambda value: str(value))
def test_few_tokens_get_the_product_to_its_last_bit(compiled: Path, scheme: str, scale_dtype: str | None) -> None:
    made = [
        (case_of(scheme, scale_dtype, tokens, out, n, dtype, seed), splits)
        for seed, (tokens, out, n, splits) in enumerate(SHAPES)
        for dtype in HALF_STEP
    ]
    check(compiled, "decode_step.cu", made)


@pytest.mark.parametrize(("scheme", "scale_dtype"), FAMILIES[::2], ids=lambda value: str(value))
def test_many_tokens_get_the_product_to_its_last_bit(compiled: Path, scheme: str, scale_dtype: str | None) -> None:
    dtypes = list(HALF_STEP)
    made = [
        (case_of(scheme, scale_dtype, tokens, out, n, dtypes[seed % 2], seed), splits)
        for seed, (tokens, out, n, splits) in enumerate(BATCHES)
    ]
    check(compiled, "batch.cu", made)


@pytest.mark.parametrize(("scheme", "scale_dtype"), (*FAMILIES[1::2], FAMILIES[-1]), ids=lambda value: str(value))
def test_weights_are_decoded_to_their_nearest_16_bits(compiled: Path, scheme: str, scale_dtype: str | None) -> None:
    for out, n in ((1, 1), (70, 11)):
        case = case_of(scheme, scale_dtype, 1, out, n, torch.bfloat16)
        w = [poison(case.packed.shape, dtype) for dtype in HALF_STEP]
        launches = [dequantize_launch(case.packed, each) for each in w]
        simulator = Simulator(compiled, "dequantize.cu", [launch.expression for launch in launches])
        for launch, found in zip(launches, w, strict=True):
            simulator.run(launch, SCHEDULES[1])
            table = case.packed.table
            table = None if table is None else table.to(found.dtype).float()
            exact = unpack(replace(case.packed, table=table))
            # Codes come less half their range, and zero points too: one more rounding of float32.
            torch.testing.assert_close(found.float(), exact, rtol=1.01 * HALF_STEP[found.dtype], atol=2.0**-24)


def test_tokens_do_not_see_each_other_and_outputs_move_with_their_weights(compiled: Path) -> None:
    case = case_of("w4g64-asym", None, 8, 64, 9, torch.float16)
    simulator = Simulator(compiled, "decode_step.cu", [expression_of(case)])
    y = run(simulator, case, 2, SCHEDULES[0])
    fewer = replace(case, x=case.x[:3].contiguous())
    assert torch.equal(run(simulator, fewer, 2, SCHEDULES[0]), y[:3])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert case.tensor.zero is not None
    moved = replace(case.tensor, codes=case.tensor.codes[order], scale=case.tensor.scale[order], zero=case.tensor.zero[order])
    assert torch.equal(run(simulator, replace(case, packed=pack(moved)), 2, SCHEDULES[0]), y[:, order])


def test_whole_numbers_come_out_exactly(compiled: Path) -> None:
    """One-hot tokens and scales of one: each output is a code, so that a wrong place shows as a wrong number."""
    codes = torch.randint(-8, 8, (64, 128), generator=torch.Generator().manual_seed(3), dtype=torch.int8)
    tensor = QuantizedTensor(codes, torch.ones(64, 2, dtype=torch.bfloat16), None, Scheme.model_validate("w4g64").weights)
    for first in range(0, 128, 16):
        x = torch.zeros(16, 128, dtype=torch.float16)
        x[torch.arange(16), first + torch.arange(16)] = 1
        case = Case(tensor, pack(tensor), x, None)
        simulator = Simulator(compiled, "decode_step.cu", [expression_of(case)])
        assert torch.equal(run(simulator, case, 1, SCHEDULES[0]), codes.T[first : first + 16].half())


@pytest.mark.parametrize("tokens", [0, 1, 13, 40, 257])
def test_the_operator_takes_the_kernel_for_its_tokens(compiled: Path, monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    """What the operator does on a GPU, its launches run by the simulator."""
    started: list[Launch] = []

    def simulate(launch: Launch, _: torch.device) -> None:
        started.append(launch)
        Simulator(compiled, launch.file, [launch.expression]).run(launch, SCHEDULES[1])

    monkeypatch.setattr(weight_only, "run", simulate)
    monkeypatch.setattr(weight_only, "n_processors", lambda _: 132)
    monkeypatch.setattr(weight_only, "counters", lambda _, n: torch.zeros(n, dtype=torch.int32))
    tensor = weights("w4g64-asym", None, 70, 1536, 0)
    packed = pack(tensor)
    x = torch.randn(1, tokens, 1536, generator=torch.Generator().manual_seed(1)).bfloat16()
    bias = torch.randn(70, generator=torch.Generator().manual_seed(2)).bfloat16()
    y = weight_only._on_gpu(x, packed, bias)
    assert y.shape == (1, tokens, 70)
    assert [launch.file for launch in started] == {0: [], 257: ["dequantize.cu"], 40: ["batch.cu"]}.get(
        tokens, ["decode_step.cu"]
    )
    if 0 < tokens < 257:
        assert started[0].grid[1] == 3, "the inputs are split"
        assert Case(tensor, packed, x[0], bias).largest_error(y[0]) <= 1
    else:  # weights are rounded to bfloat16 once more
        torch.testing.assert_close(y, torch.nn.functional.linear(x, tensor.dequantize().bfloat16(), bias), rtol=0.02, atol=0.2)


def test_what_the_operator_cannot_do_on_a_gpu_is_said(compiled: Path) -> None:
    packed = pack(weights("w4g64", None, 16, 64, 0))
    with pytest.raises(QtoolError, match="cast them to float16 or bfloat16"):
        weight_only._on_gpu(torch.ones(1, 64), packed, None)
    with pytest.raises(QtoolError, match="bias in torch.float32"):
        weight_only._on_gpu(torch.ones(1, 64).half(), packed, torch.ones(16))


@pytest.mark.parametrize("processors", [1, 46, 132])
def test_inputs_are_split_over_no_more_blocks_than_there_is_work(processors: int) -> None:
    for out, n_in in ((64, 64), (1024, 4096), (28672, 8192)):
        codes = torch.empty(out // 16, n_in // 64, 128, dtype=torch.int32, device="meta")
        splits = splits_of(PackedWeight(codes, codes, None, None, 4, (out, n_in), 64, 1.0), 1, processors)
        assert splits == 1 or n_in // 64 // splits >= 8


MUTANTS = {
    "a barrier is gone": ("2 * t, g);\n  __syncthreads();", "2 * t, g);"),
    "scale and zero are swapped": (
        "Levels levels{};",
        "Levels levels{}; const void* kept = scale; scale = zero; zero = static_cast<const uint16_t*>(kept);",
    ),
    "rows g and g + 8 are swapped": ("r ? stored.bits[0] & 0xFFFF0000", "!r ? stored.bits[0] & 0xFFFF0000"),
    "a tile off by one": ("first_tile = blockIdx.x * NT;", "first_tile = blockIdx.x * NT + 1;"),
    "a block of inputs off by one": ("begin_of(blockIdx.y, n_blocks),", "begin_of(blockIdx.y, n_blocks) + (blockIdx.y > 0),"),
    "a group off by one": ("+ span * SPAN) >> group_shift;", "+ span * SPAN + 32) >> group_shift;"),
    "no end of the outputs": ("if (n < n_out) store(", "store("),
    "no end of the inputs": ("token < n_tokens && k < n_in", "token < n_tokens"),
    "no end of the tokens": ("token < n_tokens && k < n_in", "k < n_in"),
    "a counter is left": ("if (*flag) counters[place] = 0;", ""),
    "the last warp's sums are left out": ("for (int w = 0; w < WARPS; w++)", "for (int w = 0; w < WARPS - 1; w++)"),
    "a code's offset is wrong": ("+ (1 << (FORMAT - 1))) * PAIR", "+ (1 << FORMAT)) * PAIR"),
    "no zero points": ("sum -= zero_of<FORMAT>(zeros, i / 2) * total[i];", ""),
    "no scale of the tensor": ("n, alpha * sum);", "n, sum);"),
}
BATCH_MUTANTS = {
    "no barrier before a place is written again": ("__syncthreads();  // x of this block", "// x of this block"),
    "no barrier before sums": ("__syncthreads();  // the ring becomes sums", ""),
    "no wait for x": ("ptx::wait<STAGES - 2>();", ""),
    "a wait too few": ("ptx::wait<STAGES - 2>();", "ptx::wait<STAGES - 1>();"),
    "x comes a block late": ("load_x(block + STAGES - 1);", "load_x(block + STAGES);"),
    "rows do not change places": ("8 * (piece ^ token % 2 * 4));\n          b[m]", "8 * piece);\n          b[m]"),
    "warps take each other's tokens": ("8 * (warp / 2 * MT + m) + g;", "8 * ((1 - warp / 2) * MT + m) + g;"),
    "tiles beyond the last": ("has_tiles = first_tile < n_tiles;", "has_tiles = true;"),
    "a tile off by one": ("+ warp % 2 * NT, first_token", "+ warp % 2 * NT + 1, first_token"),
    "no end of the tokens": ("first_token + token < n_tokens && k < n_in;", "k < n_in;"),
    "the first tokens in all blocks": ("store(first_token + e / ROWS, n, sum)", "store(e / ROWS, n, sum)"),
    "a group off by one": ("+ span * SPAN) >> group_shift;", "+ span * SPAN + 32) >> group_shift;"),
}


def is_caught(compiled: Path, file: str, case: Case, change: tuple[str, str]) -> bool:
    def passes(simulator: Simulator) -> bool:
        try:
            return all(case.largest_error(run(simulator, case, 2, schedule)) <= 1 for schedule in SCHEDULES)
        except (KernelFault, AssertionError):
            return False

    assert passes(Simulator(compiled, file, [expression_of(case)]))
    return not passes(Simulator(compiled, file, [expression_of(case)], (change,)))


@pytest.mark.parametrize("name", MUTANTS)
def test_these_tests_catch(compiled: Path, name: str) -> None:
    case = case_of("w4g32-asym", None, 5, 70, 35, torch.float16)
    case = replace(case, packed=replace(case.packed, alpha=0.5), tensor=replace(case.tensor, of_tensor=0.5))
    assert is_caught(compiled, "decode_step.cu", case, MUTANTS[name])


@pytest.mark.parametrize("name", BATCH_MUTANTS)
def test_these_tests_catch_in_batches(compiled: Path, name: str) -> None:
    case = case_of("w4g32-asym", None, 70, 60, 41, torch.float16)
    assert is_caught(compiled, "batch.cu", case, BATCH_MUTANTS[name])
