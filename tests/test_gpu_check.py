"""scripts/gpu_check without a GPU: it says so, and what its probe places in registers is what the instruction's tables say."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_probe", SCRIPTS / "gpu_probe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be checked, which takes ten minutes")
def test_without_a_gpu_it_exits_2_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "gpu_check: torch sees no CUDA GPU\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_without_wheels_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "gpu_check"), "--wheels", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "holds no wheel" in done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_fragments_hold_what_the_tables_of_mma_say(probe: ModuleType, dtype: torch.dtype) -> None:
    """By the formulas of PTX ISA, "Matrix Fragments for mma.m16n8k16" and "mma.m16n8k32", element by element."""
    n, k = 4 // dtype.itemsize, 32 // dtype.itemsize  # elements of a register, and along k
    A = torch.arange(16 * k).view(16, k).remainder(128).to(dtype)
    B = torch.arange(8 * k).view(k, 8).remainder(127).to(dtype)
    a, b = probe.place(A, B)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4 * n):  # the tables count elements: a0 .. a7, or a0 .. a15
            register, part = divmod(i, n)
            row = group if register in (0, 2) else group + 8
            column = thread * n + part + (k // 2 if register >= 2 else 0)
            assert a[lane, register : register + 1].view(dtype)[part] == A[row, column]
        for i in range(2 * n):
            register, part = divmod(i, n)
            assert b[lane, register : register + 1].view(dtype)[part] == B[thread * n + part + register * k // 2, group]
    C = torch.arange(128.0).view(16, 8)
    c = torch.stack(
        [torch.stack([C[(lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)] for i in range(4)]) for lane in range(32)]
    )
    assert torch.equal(probe.unplace(c), C)
