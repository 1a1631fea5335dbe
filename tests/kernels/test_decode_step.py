"""decode_step.cu on the simulator, every template family over edge shapes and schedules, against float64; and its mutants."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.kernels.weight_only import PackedWeight, decode_step, pack, partial_sums, splits_of, unpack
from tests.kernels.conftest import KernelFault, Schedule, Simulator, poison

HALF_STEP = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}  # of a rounded output; float32 sums round before, so that ties vary
SCHEDULES = (Schedule("late", False, 1), Schedule("late", True, 2), Schedule("late", True, 3))  # this kernel has no copies
# Scheme, its scales where they are not bfloat16. Every format, both spans, all kinds of scales, with zero points and without.
FAMILIES = (
    *(("w4g64", None), ("w4g128-asym", "float16"), ("w4g32-asymf16", None), ("w4g32", "float32"), ("w4", None)),
    *(("w2g64-asym", None), ("w2g32", "float16"), ("w2-asym", None), ("w3g64", None), ("w3g32-asym", "float32"), ("w3", None)),
    *(("w8", None), ("w8g64-asym", None), ("w8g32", "float32"), ("mxint8", None)),
    *(
        ("nf4g64", None),
        ("nf4g64-dq", "float32"),
        ("e2m1g32-asymf16", None),
        ("iq4_nl", "float16"),
        ("mxfp4", None),
        ("nvfp4", None),
    ),
)
# tokens, outputs, inputs in multiples of the scheme's group (of 8 where a row is one), splits
SHAPES = ((1, 64, 4, 1), (2, 1, 1, 1), (7, 65, 11, 2), (8, 16, 40, 5), (9, 63, 5, 1), (16, 130, 9, 3), (15, 17, 2, 1))


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
    counters = torch.zeros(len(case.packed.codes), dtype=torch.int32)
    simulator.run(decode_step(case.x, case.packed, case.bias, y, splits, partial, counters), schedule)
    assert not counters.any(), "counters are not back at zero"
    return y


def expression_of(case: Case) -> str:
    return decode_step(case.x, case.packed, None, case.x, 1, None, None).expression


@pytest.mark.parametrize(("scheme", "scale_dtype"), FAMILIES, ids=lambda value: str(value))
def test_every_output_is_the_product_to_its_last_bit(compiled: Path, scheme: str, scale_dtype: str | None) -> None:
    cases = [
        (case_of(scheme, scale_dtype, tokens, out, n, dtype, seed), splits)
        for seed, (tokens, out, n, splits) in enumerate(SHAPES)
        for dtype in HALF_STEP
    ]
    simulator = Simulator(compiled, "decode_step.cu", sorted({expression_of(case) for case, _ in cases}))
    for case, splits in cases:
        found = [run(simulator, case, splits, schedule) for schedule in SCHEDULES]
        assert case.largest_error(found[0]) <= 1, f"{case.x.shape} {case.packed.shape} in {splits}"
        assert all(torch.equal(y, found[0]) for y in found), "the order in which warps run shows"


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


@pytest.mark.parametrize("processors", [1, 46, 132])
def test_inputs_are_split_over_no_more_blocks_than_there_is_work(processors: int) -> None:
    for out, n_in in ((64, 64), (1024, 4096), (28672, 8192)):
        packed = pack(quantize(torch.ones(1, n_in).expand(out, n_in), Scheme.model_validate("w4g64").weights))
        splits = splits_of(packed, 1, processors)
        assert splits == 1 or n_in // 64 // splits >= 8


MUTANTS = {
    "a barrier is gone": ("+ g] = acc[n][m][i];\n  __syncthreads();", "+ g] = acc[n][m][i];"),
    "scale and zero are swapped": (
        "stage.scale[n][span] = load_scale<SCALE>(scale,",
        "stage.zero[n][span] = ptx::load4((const uint32_t*)scale + index); stage.scale[n][span] = load_scale<SCALE>(zero,",
    ),
    "rows g and g + 8 are swapped": (
        "r ? stored.bits[0] & 0xFFFF0000 : stored.bits[0] << 16",
        "!r ? stored.bits[0] & 0xFFFF0000 : stored.bits[0] << 16",
    ),
    "a tile off by one": ("first_tile = blockIdx.x * NT;", "first_tile = blockIdx.x * NT + 1;"),
    "a block of inputs off by one": ("blockIdx.y / gridDim.y);", "blockIdx.y / gridDim.y) + (blockIdx.y > 0);"),
    "a group off by one": ("+ span * SPAN) >> group_shift;", "+ span * SPAN + 32) >> group_shift;"),
    "no end of the outputs": ("if (n >= n_out) return;", ""),
    "no end of the inputs": ("token < n_tokens && k < n_in", "token < n_tokens"),
    "no end of the tokens": ("token < n_tokens && k < n_in", "k < n_in"),
    "a counter is left": ("if (*is_last) counters[blockIdx.x] = 0;", ""),
    "the last warp's sums are left out": ("for (int w = 0; w < WARPS; w++)", "for (int w = 0; w < WARPS - 1; w++)"),
    "a code's offset is wrong": ("+ (1 << (FORMAT - 1))) * PAIR", "+ (1 << FORMAT)) * PAIR"),
    "no zero points": ("sum -= shift * total[m][2 * r + e];", ""),
    "no scale of the tensor": ("sum = alpha * sum +", "sum = sum +"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_these_tests_catch(compiled: Path, name: str) -> None:
    case = case_of("w4g64-asym", None, 5, 70, 17, torch.float16)
    case = replace(case, packed=replace(case.packed, alpha=0.5), tensor=replace(case.tensor, of_tensor=0.5))
    change = MUTANTS[name]
    mutant = Simulator(compiled, "decode_step.cu", [expression_of(case)], (change,))

    def passes(simulator: Simulator) -> bool:
        try:
            return all(case.largest_error(run(simulator, case, 2, schedule)) <= 1 for schedule in SCHEDULES)
        except (KernelFault, AssertionError):
            return False

    assert passes(Simulator(compiled, "decode_step.cu", [expression_of(case)]))
    assert not passes(mutant)
