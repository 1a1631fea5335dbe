"""What a GPU does that no CPU can tell: registers of tensor-core fragments, rates of their instructions, the cost of a launch.

    python scripts/gpu_probe.py [--out FOLDER]
prints JSON, and writes fragments.json, the registers that went into and came out of each instruction, for twins of them on
a CPU to be compared with. Fragments hold small whole numbers placed as kernels_cuda/ places them: products that come out exact
mean that the placing is right. Exit code 1: one does not.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.kernels import launch, weight_only

SOURCE = Path(__file__).with_suffix(".cu")
FRAGMENTS = {"fragment_half": torch.float16, "fragment_bfloat": torch.bfloat16, "fragment_int8": torch.int8}
# Kernel: operations of one instruction, 2 m n k.
RATES = {
    "rate_bfloat": 2 * 16 * 8 * 16,
    "rate_int8": 2 * 16 * 8 * 32,
    "rate_int4": 2 * 16 * 8 * 64,
    "rate_binary_and": 2 * 16 * 8 * 256,
    "rate_binary_xor": 2 * 16 * 8 * 256,
}
TURNS, THREADS, BLOCKS_OF_PROCESSOR, LAUNCHES = 4096, 128, 8, 2000


def source() -> str:
    """The probe with the instructions of kernels_cuda/ before it."""
    return launch.source("ptx.cuh") + SOURCE.read_text(encoding="utf-8")


def place(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Registers a [32, 4] and b [32, 2], int32, of A [16, k] and B [k, 8]: lane 4 g + t, pieces of 32 bits along k.

    a0: row g, piece t    a1: row g + 8, piece t    a2: row g, piece t + 4    a3: row g + 8, piece t + 4    b0, b1: column g,
    pieces t and t + 4
    """
    rows = A.contiguous().view(torch.int32)  # [16, 8]
    columns = B.T.contiguous().view(torch.int32)  # [8, 8]
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    a = torch.stack([rows[g, t], rows[g + 8, t], rows[g, t + 4], rows[g + 8, t + 4]], 1)
    return a, torch.stack([columns[g, t], columns[g, t + 4]], 1)


def unplace(c: Tensor) -> Tensor:
    """C [16, 8] of registers [32, 4]: c0, c1 of row g, columns 2 t and 2 t + 1; c2, c3 of row g + 8."""
    C = torch.empty(16, 8, dtype=c.dtype)
    lane = torch.arange(32)
    g, t = lane // 4, lane % 4
    for index in range(4):
        C[g + 8 * (index // 2), 2 * t + index % 2] = c[:, index]
    return C


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("."))
    arguments = parser.parse_args()
    if (reason := launch.reason_not_to_run()) is not None:
        print(f"gpu_probe: {reason}", file=sys.stderr)
        return 2
    import cupy

    module = cupy.RawModule(code=source(), options=launch.OPTIONS)
    fragments, exact = {}, {}
    for name, dtype in FRAGMENTS.items():
        k = 32 // dtype.itemsize
        random = torch.Generator().manual_seed(0)
        A, B = (torch.randint(-7, 8, shape, generator=random).to(dtype) for shape in ((16, k), (k, 8)))
        a, b = place(A, B)
        on_gpu = [part.contiguous().cuda() for part in (a, b)]
        c = torch.zeros(32, 4, dtype=torch.int32 if dtype == torch.int8 else torch.float32, device="cuda")
        module.get_function(name)((1,), (32,), tuple(part.data_ptr() for part in (*on_gpu, c)))
        torch.cuda.synchronize()
        exact[name] = torch.equal(unplace(c.cpu()).double(), A.double() @ B.double())
        fragments[name] = {"a": a.tolist(), "b": b.tolist(), "c": c.cpu().tolist()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "fragments.json").write_text(json.dumps(fragments), encoding="utf-8")
    found = {"fragments": exact, "operations_per_second": rates(module), "launch_seconds": launches(module)}
    print(json.dumps(found, indent=1))
    return 0 if all(exact.values()) else 1


def rates(module: object) -> dict[str, float]:
    """Operations a second of each instruction, all processors busy, the best of five."""
    import cupy

    n_blocks = launch.n_processors(torch.device("cuda")) * BLOCKS_OF_PROCESSOR
    out = torch.zeros(n_blocks * THREADS, dtype=torch.int32, device="cuda")
    found = {}
    for name, operations in RATES.items():
        kernel = module.get_function(name)  # type: ignore[attr-defined]
        best = float("inf")
        for _ in range(6):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            kernel((n_blocks,), (THREADS,), (out.data_ptr(), cupy.int32(TURNS)))
            cupy.cuda.Device().synchronize()
            best = min(best, time.perf_counter() - begun)
        found[name] = operations * 4 * TURNS * n_blocks * (THREADS // 32) / best
    return found


def launches(module: object) -> dict[str, float]:
    """Seconds that Python spends on one call, of many in a row that the GPU does not hold up."""
    x = torch.zeros(8, device="cuda")
    kernel = module.get_function("nothing")  # type: ignore[attr-defined]
    packed = weight_only.pack(quantize(torch.randn(64, 128, device="cuda"), Scheme.model_validate("w4a16g64").weights))
    row = torch.randn(1, 128, device="cuda").to(torch.bfloat16)
    weight = torch.randn(64, 128, device="cuda").to(torch.bfloat16)
    calls = {
        "CuPy, an empty kernel": lambda: kernel((1,), (32,), (x.data_ptr(),)),
        "torch, x.add_(1)": lambda: x.add_(1),
        "torch, bf16 linear 64 x 128": lambda: torch.nn.functional.linear(row, weight),
        "qtool, w4a16 product 64 x 128": lambda: weight_only.matmul(row, packed),
    }
    found = {}
    for name, call in calls.items():
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        for _ in range(LAUNCHES):
            call()
        torch.cuda.synchronize()
        found[name] = (time.perf_counter() - begun) / LAUNCHES
    return found


if __name__ == "__main__":
    sys.exit(main())
