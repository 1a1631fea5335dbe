"""The kernels of kernels_cuda/ on this CPU: compiled by g++ with simulator.h, started with the arguments a GPU would get."""

import ctypes
import hashlib
import mmap
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.kernels.launch import Launch, source

COPIES = ("late", "eager", "mixed")
HEADER = Path(__file__).resolve().parents[2] / "kernels_cuda" / "simulator.h"
COMPILER = ("g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fPIC", "-shared", "-DQT_HOST", "-w")


@dataclass(frozen=True)
class Schedule:
    """When cp.async copies, and whether one warp runs ahead; see simulator.h."""

    copies: str
    run_ahead: bool
    seed: int

    def __str__(self) -> str:
        return f"{self.copies}-{'run_ahead' if self.run_ahead else 'lockstep'}-{self.seed}"


class KernelFault(Exception):
    """A kernel touched what is not its own, is misaligned, or waits for ever."""


class Simulator:
    """One file of kernels with some of its templates, compiled."""

    def __init__(self, folder: Path, file: str, expressions: list[str], changes: tuple[tuple[str, str], ...] = ()) -> None:
        """changes: texts of the source that are replaced, each by its mutant."""
        text = source(file)
        for old, new in changes:
            assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
            text = text.replace(old, new)
        parts = [text, 'extern "C" const char* fault() { return simulator::message; }']
        for index, expression in enumerate(expressions):
            parts.append(
                f'extern "C" int run{index}(unsigned x, unsigned y, unsigned z, unsigned threads, size_t shared, int copies, '
                f"int ahead, unsigned seed, void** a) {{ return simulator::launch({{x, y, z}}, threads, shared, copies, ahead, "
                f"seed, [=] {{ simulator::call(&{expression}, a); }}); }}"
            )
        name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        library = folder / f"{name}.so"
        if not library.exists():  # else another worker of pytest, or a test before this one, compiled the same
            with tempfile.TemporaryDirectory(dir=folder) as work:
                cpp, made = Path(work, "kernels.cpp"), Path(work, "kernels.so")
                cpp.write_text("\n".join(parts), encoding="utf-8")
                command = [*COMPILER, "-include", str(HEADER), str(cpp), "-o", str(made)]
                done = subprocess.run(command, capture_output=True, text=True)
                assert done.returncode == 0, done.stderr[:4000]
                made.replace(library)
        self._library = ctypes.CDLL(str(library))
        self._library.fault.restype = ctypes.c_char_p
        self._names = {expression: f"run{index}" for index, expression in enumerate(expressions)}

    def run(self, launch: Launch, schedule: Schedule) -> None:
        """Tensors of the launch hold afterwards what the kernel left. Raises KernelFault."""
        tensors = {id(a): a for a in launch.arguments if isinstance(a, Tensor) and a.numel()}
        buffers = {key: GuardedBuffer(tensor) for key, tensor in tensors.items()}
        values: list[ctypes.c_void_p | ctypes.c_int32 | ctypes.c_float] = []
        for argument in launch.arguments:
            if isinstance(argument, int):
                values.append(ctypes.c_int32(argument))
            elif isinstance(argument, float):
                values.append(ctypes.c_float(argument))
            else:
                values.append(ctypes.c_void_p(buffers[id(argument)].address if id(argument) in buffers else None))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values))
        failed = getattr(self._library, self._names[launch.expression])(
            *(ctypes.c_uint(n) for n in launch.grid),
            ctypes.c_uint(launch.threads),
            ctypes.c_size_t(launch.shared_bytes),
            ctypes.c_int(COPIES.index(schedule.copies)),
            ctypes.c_int(schedule.run_ahead),
            ctypes.c_uint(schedule.seed),
            pointers,
        )
        for key, buffer in buffers.items():
            buffer.read_back(tensors[key])
        if failed:
            raise KernelFault(self._library.fault().decode())


class GuardedBuffer:
    """A copy of a tensor that ends at a page which nothing may touch, as nearly as 16-byte alignment lets it."""

    def __init__(self, tensor: Tensor) -> None:
        assert tensor.is_contiguous()
        room = -(-(tensor.nbytes + 16) // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = mmap.mmap(-1, room + mmap.PAGESIZE)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        ctypes.memset(base, 0xFF, room)  # NaN where the kernel reads before it
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(base + room), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
        self.address = base + (room - tensor.nbytes) // 16 * 16
        self._nbytes = tensor.nbytes
        ctypes.memmove(self.address, tensor.data_ptr(), tensor.nbytes)

    def read_back(self, tensor: Tensor) -> None:
        ctypes.memmove(tensor.data_ptr(), self.address, self._nbytes)


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of bytes 0xFF: NaN, or -1."""
    return torch.full((torch.empty(shape, dtype=dtype).nbytes,), 255, dtype=torch.uint8).view(dtype).view(shape)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what g++ made, one for all workers of pytest."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "kernels"
    folder.mkdir(exist_ok=True)
    return folder
