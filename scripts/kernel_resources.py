"""Compile every CUDA kernel with NVRTC, without a GPU, and write what it takes to kernels_cuda/resources.json.

    python scripts/kernel_resources.py              # all of a file that changed since; minutes, and a second call goes on
Of each template: the dynamic shared bytes that a launch asks for (null where they depend on the inputs), and for each
architecture registers of a thread, bytes that it spills, and static shared bytes. tests/kernels/test_compiled.py looks through
all of it, and compiles those of SAMPLE again and compares. Needs the packages of the extra `test`.
"""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

from qtool.kernels import int8, weight_only
from qtool.kernels.launch import OPTIONS, source

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
COLUMNS = ["dynamic shared", *(f"{architecture}: registers, spilled, static shared" for architecture in ARCHITECTURES)]
COLUMN_OF = {architecture: 1 + index for index, architecture in enumerate(ARCHITECTURES)}
N_PROCESSES = 2
RESOURCES = Path(__file__).resolve().parent.parent / "kernels_cuda" / "resources.json"
# What CuPy adds to OPTIONS, and what tells registers.
MORE_OPTIONS = ("-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
# Of every file a few templates that tell it is compiled as resources.json says.
SAMPLE = {
    "decode_step.cu": (
        "decode_step<F16, W4, BFLOAT, true, 64, 4, 2, 2>",
        "decode_step<BF16, W8, BFLOAT, false, 64, 2, 1, 2>",
        "decode_step<F16, TABLE, E4M3, false, 64, 2, 1, 4>",
    ),
    "batch.cu": ("batch<BF16, W4, BFLOAT, true, 64, 4, 2, 4>", "batch<F16, W2, FLOAT, false, 32, 2, 1, 3>"),
    "int8.cu": ("int8_product<BF16, 4, 3>", "quantize_tokens<F16, false, true>"),
    "dequantize.cu": ("dequantize<BF16, W3, FLOAT, true>",),
}


@dataclass(frozen=True)
class Compiled:
    cubin: bytes
    registers: int
    spilled: int  # bytes that a thread keeps in local memory
    shared: int  # static bytes of a block

    @property
    def numbers(self) -> list[int]:
        """One architecture's columns."""
        return [self.registers, self.spilled, self.shared]


def compile_kernel(file: str, template: str, architecture: str) -> Compiled:
    """One template; raises ValueError with the compiler's words."""
    _, program = nvrtc.nvrtcCreateProgram(source(file).encode(), file.encode(), 0, None, None)
    nvrtc.nvrtcAddNameExpression(program, template.encode())
    options = [option.encode() for option in (*OPTIONS, *MORE_OPTIONS, f"-arch={architecture}")]
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
    _, size = nvrtc.nvrtcGetProgramLogSize(program)
    log = bytes(size)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.decode().rstrip("\0")
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise ValueError(f"{template} for {architecture}: {text}")
    _, size = nvrtc.nvrtcGetCUBINSize(program)
    cubin = bytes(size)
    nvrtc.nvrtcGetCUBIN(program, cubin)
    nvrtc.nvrtcDestroyProgram(program)
    (registers,) = re.findall(r"Used (\d+) registers", text)
    frame, stores, loads = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)[0]
    shared = sum(map(int, re.findall(r"(\d+) bytes smem", text)))  # not a word of it where there is none
    return Compiled(cubin, int(registers), int(frame) + int(stores) + int(loads), shared)


def find_nvdisasm() -> Path:
    """The disassembler of the package nvidia-cuda-nvdisasm. Raises FileNotFoundError."""
    for folder in map(Path, sys.path):
        for found in sorted(folder.glob("nvidia/cu*/bin/nvdisasm")):
            return found
    raise FileNotFoundError("nvdisasm is missing; pip install nvidia-cuda-nvdisasm")


def opcodes(cubin: bytes, folder: Path) -> list[str]:
    """The instructions of a compiled kernel, in their order, with their modifiers, and of a call where it goes."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [str(find_nvdisasm()), "--print-code", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(CALL[^;]*|[A-Z][A-Z0-9_.]*)", text, re.MULTILINE)


def every_template() -> dict[str, dict[str, int | None]]:
    """All that qtool can launch, by file, with its dynamic shared bytes."""
    return {**weight_only.every_template(), **int8.every_template()}


def digest(file: str) -> str:
    """What tells whether a source changed."""
    return hashlib.sha256(source(file).encode()).hexdigest()[:16]


def read_resources() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESOURCES.read_text(encoding="utf-8")) if RESOURCES.exists() else {}
    return found


def write_resources(resources: dict[str, dict[str, Any]]) -> None:
    """A line for each template."""
    text = re.sub(r"\[[^{}:]*\]", lambda match: re.sub(r"\s+", "", match[0]), json.dumps(resources, indent=1))
    new = RESOURCES.with_suffix(".new")
    new.write_text(text + "\n", encoding="utf-8")
    new.replace(RESOURCES)  # so that an interrupted run leaves the last whole one


def measure(job: tuple[str, str, str]) -> tuple[tuple[str, str, str], list[int]]:
    """The numbers of one file's template on an architecture."""
    return job, compile_kernel(*job).numbers


def main() -> None:
    known, resources = read_resources(), {}
    jobs = []
    for file, templates in every_template().items():
        head = {"source": digest(file), "columns": COLUMNS}
        done = known[file]["templates"] if file in known and head.items() <= known[file].items() else {}
        rows = {
            template: [shared, *(done[template][1:] if template in done else [None] * len(ARCHITECTURES))]
            for template, shared in templates.items()
        }
        jobs += [(file, name, on) for on, i in COLUMN_OF.items() for name, row in rows.items() if row[i] is None]
        resources[file] = {**head, "templates": rows}
    write_resources(resources)
    with get_context("fork").Pool(N_PROCESSES) as pool:
        for count, ((file, template, architecture), numbers) in enumerate(pool.imap_unordered(measure, jobs), 1):
            resources[file]["templates"][template][COLUMN_OF[architecture]] = numbers
            print(f"{count} of {len(jobs)}: {architecture} {template}: {numbers}", flush=True)
            if count % 20 == 0 or count == len(jobs):
                write_resources(resources)


if __name__ == "__main__":
    main()
