"""Launching CUDA kernels: what to launch is data; how, through CuPy, stands here alone.

A `Launch` names a kernel, its blocks and its arguments. `run` has NVRTC compile the kernel where it has not yet, and starts it
on torch's current stream with the tensors' own pointers, so that nothing is copied and nothing waits. CUDA graphs can record
a kernel that has run once before, which compiled it.
Why sources are joined into one text: CuPy's cache of compiled kernels knows the text and the options, not files that the text
includes, and would go on using what it compiled from an older header.
Why arguments are whole numbers of 32 bits, float32 and tensors only: CuPy makes 64 bits of Python's own numbers, and a null
of None where the number's address belongs.
"""

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qtool
from qtool.errors import QtoolError

OPTIONS = ("--std=c++17",)
FREE_SHARED_BYTES = 48 << 10  # what a block may have without asking
INCLUDE = re.compile(r'^#include "([\w.]+)"\n', re.MULTILINE)

Argument = Tensor | int | float | None


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: file and template of kernels_cuda/, blocks [x, y, z], threads and dynamic shared bytes of each."""

    file: str
    expression: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class _Stream:
    ptr: int


def sources_folder() -> Path:
    """kernels_cuda/ in the installed package, or beside it in a checkout."""
    package = Path(qtool.__file__).parent
    installed = package / "kernels_cuda"
    return installed if installed.is_dir() else package.parent / "kernels_cuda"


@cache
def source(file: str) -> str:
    """The text of one file of kernels_cuda/ with every file of ours that it includes, each once, in its place."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (sources_folder() / name).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
        return INCLUDE.sub(lambda match: expand(match[1]), text)

    return expand(file)


def add_operator(name: str, reference: Callable[..., Any], on_gpu: Callable[..., Any], shape: Callable[..., Any]) -> None:
    """torch.ops.qtool.NAME, which the three compute of the same arguments: those of the reference, as its annotations say.

    shape: empty outputs, for torch.compile and other callers that know tensors by their shapes alone.
    """
    full = f"qtool::{name}"
    torch.library.define(full, torch.library.infer_schema(reference, mutates_args=()))
    torch.library.impl(full, "CPU", reference)
    torch.library.impl(full, "CUDA", on_gpu)
    torch.library.register_fake(full, shape)


def reason_not_to_run() -> str | None:
    """Why kernels cannot run here, or None."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f"CuPy does not load ({error}); pip install 'qtool[cuda]'"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"the GPU has compute capability {capability[0]}.{capability[1]}, not 8.0 or above"


def run(launch: Launch, device: torch.device) -> None:
    """Start a kernel on a device's current stream. Raises QtoolError where CuPy is missing."""
    if device.index is not None and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _start(launch)
    else:
        _start(launch)


def _start(launch: Launch) -> None:
    import cupy

    device = torch.cuda.current_device()
    function = _function(launch.file, launch.expression, launch.shared_bytes, device)
    arguments = []
    for value in launch.arguments:
        if isinstance(value, Tensor):
            assert value.is_contiguous() and value.device.index == device, (
                f"{launch.expression}: {value.shape} on {value.device}"
            )
            arguments.append(value.data_ptr())
        elif value is None:
            arguments.append(0)
        else:
            arguments.append(cupy.int32(value) if isinstance(value, int) else cupy.float32(value))
    stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
    function(launch.grid, (launch.threads, 1, 1), tuple(arguments), shared_mem=launch.shared_bytes, stream=stream)


_compiling = threading.Lock()
_functions: dict[tuple[str, str, int, int], Callable[..., None]] = {}


def _function(file: str, expression: str, shared_bytes: int, device: int) -> Callable[..., None]:
    """The compiled kernel on a device, ready for so many dynamic shared bytes."""
    key = (file, expression, shared_bytes, device)
    found = _functions.get(key)
    if found is not None:
        return found
    try:
        import cupy
    except ImportError as error:
        raise QtoolError(f"CUDA kernels need CuPy, which does not load ({error}); pip install 'qtool[cuda]'") from error
    with _compiling:
        kernel: Any = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(expression,)).get_function(
            expression
        )
        if shared_bytes > FREE_SHARED_BYTES:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
        _functions[key] = kernel.kernel
    return _functions[key]


def n_processors(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_counters: dict[tuple[int, int], Tensor] = {}


def counters(device: torch.device, n: int) -> Tensor:
    """At least n zeros, int32, that kernels count in and leave as zeros.

    They are the current stream's own, for kernels of one stream never run at the same time; while a CUDA graph is recorded, the
    graph's own, which it sets to zero whenever it is replayed.
    """
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(n, dtype=torch.int32, device=device)
    stream = torch.cuda.current_stream(device)
    key = (stream.device_index, stream.cuda_stream)
    found = _counters.get(key)
    if found is None or len(found) < n:
        found = torch.zeros(max(n, 4096), dtype=torch.int32, device=device)
        _counters[key] = found
    return found


def aligned(x: Tensor) -> Tensor:
    """x as a kernel can read it, 16 bytes at once: in one piece that begins at a multiple of them; x itself where it does."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x
