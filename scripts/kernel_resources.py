"""Compile every CUDA kernel with NVRTC, without a GPU, and write what it takes to kernels_cuda/resources.json.

    python scripts/kernel_resources.py              # all files that changed since; minutes
For each architecture and template: registers of a thread and bytes spilled. All templates are compiled for sm_90, those of
SAMPLE for the other architectures too; tests/kernels/test_compiled.py compiles these again and compares. Needs the packages of
the extra `test`.
"""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda.bindings import nvrtc

from qtool.kernels import int8, weight_only
from qtool.kernels.launch import OPTIONS, source

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90")
LAST = "sm_90"
RESOURCES = Path(__file__).resolve().parent.parent / "kernels_cuda" / "resources.json"
# What CuPy adds to OPTIONS, and what tells registers.
MORE_OPTIONS = ("-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
# Of every file a few templates that tell it is compiled for all architectures, and compiled as resources.json says.
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
    return Compiled(cubin, int(registers), int(frame) + int(stores) + int(loads))


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


def every_template() -> dict[str, list[str]]:
    """All that qtool can launch, by file."""
    return weight_only.every_template() | int8.every_template()


def digest(file: str) -> str:
    """What tells whether a source changed."""
    return hashlib.sha256(source(file).encode()).hexdigest()[:16]


def read_resources() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(RESOURCES.read_text(encoding="utf-8")) if RESOURCES.exists() else {}
    return found


def main() -> None:
    known, resources = read_resources(), {}
    for file, templates in every_template().items():
        entry: dict[str, Any] = {"source": digest(file)}
        is_same = file in known and known[file]["source"] == entry["source"]
        for architecture in ARCHITECTURES:
            done = known[file].get(architecture, {}) if is_same else {}
            rows = {}
            for template in templates if architecture == LAST else SAMPLE[file]:
                if template not in done:
                    made = compile_kernel(file, template, architecture)
                    print(f"{architecture} {template}: {made.registers} registers, {made.spilled} bytes spilled", flush=True)
                    done[template] = [made.registers, made.spilled]
                rows[template] = done[template]
            entry[architecture] = rows
        resources[file] = entry
        write_resources({**known, **resources})
    write_resources(resources)  # without files that are no more


def write_resources(resources: dict[str, dict[str, Any]]) -> None:
    text = json.dumps(resources, indent=1)
    RESOURCES.write_text(re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
