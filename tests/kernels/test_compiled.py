"""Kernels compiled by NVRTC without a GPU: on every architecture, as resources.json says, with the instructions they need."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "kernel_resources.py"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


resources = load_script()
SAMPLE = [(file, template) for file, templates in resources.SAMPLE.items() for template in templates]
# What a kernel is for, in its machine code: tensor cores, loads of 16 bytes past L1, copies to shared memory.
WANTED = {
    "int8_product": (r"IMMA\.16832\.S8\.S8", r"LDGSTS.*\.128", r"LDS\.128"),
    "quantize_tokens": (r"LDG\.E\.128", r"STG\.E\.64", r"SHFL\.BFLY", r"FRND"),
    "decode_step": (r"HMMA\.16816\.F32", r"LDG\.E\.NA.*\.128"),
    "batch": (r"HMMA\.16816\.F32", r"LDG\.E\.NA.*\.128", r"LDGSTS.*\.128", r"LDS\.128"),
    "dequantize": (r"LDG\.E\.NA.*\.128", r"STG\.E\.128"),
}
MEMORY = r"LDL|STL"  # what registers did not suffice for
# A call of what stands in for an instruction that the chip lacks; divisions and roots, which no chip has, are none. Code for
# sm_90, the one architecture here that lacks some, names what it calls; the others' has labels.
EMULATION = r"CALL(?!.*_(div|rcp|sqrt)_)"
LACKING = "sm_90"
# What a block may have at most, by NVIDIA's programming guide, in its table of compute capabilities.
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10}


def test_every_template_was_compiled_from_these_sources() -> None:
    known = resources.read_resources()
    recorded = {file: {template: row[0] for template, row in entry["templates"].items()} for file, entry in known.items()}
    assert recorded == resources.every_template()  # their dynamic shared bytes too
    stale = [
        file
        for file, entry in known.items()
        if (entry["source"], entry["columns"]) != (resources.digest(file), resources.COLUMNS)
        or any(None in row[1:] for row in entry["templates"].values())
    ]
    assert not stale, "run python scripts/kernel_resources.py"


def rows() -> list[tuple[str, str, int, int, int]]:
    """template, architecture, registers, bytes spilled, shared bytes."""
    return [
        (template, architecture, registers, spilled, static + (dynamic or 0))
        for entry in resources.read_resources().values()
        for template, (dynamic, *columns) in entry["templates"].items()
        for architecture, (registers, spilled, static) in zip(resources.ARCHITECTURES, columns, strict=True)
    ]


def test_no_kernel_spills() -> None:
    assert len(rows()) > 1000 and [row for row in rows() if row[3]] == []


def test_every_block_fits() -> None:
    """Registers of a thread, shared bytes of a block."""
    assert [row for row in rows() if not 0 < row[2] <= 255 or row[4] > SHARED[row[1]]] == []


@pytest.mark.parametrize(("file", "template"), SAMPLE)
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_it_compiles_as_it_did(tmp_path: Path, file: str, template: str, architecture: str) -> None:
    made = resources.compile_kernel(file, template, architecture)
    row = resources.read_resources()[file]["templates"][template]
    assert made.numbers == row[resources.COLUMN_OF[architecture]]
    found = resources.opcodes(made.cubin, tmp_path)
    assert len(found) > 50
    assert [
        wanted for wanted in WANTED[template.split("<")[0]] if not any(re.fullmatch(f"{wanted}.*", code) for code in found)
    ] == []
    assert [code for code in found if re.match(MEMORY, code)] == []
    assert [code for code in found if architecture == LACKING and re.match(EMULATION, code)] == []


def test_an_emulated_instruction_would_be_seen() -> None:
    """What the disassembler prints of a division, and of a product that a chip does in steps."""
    assert not re.match(EMULATION, "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ")
    assert re.match(EMULATION, "CALL.REL.NOINC `($__internal_0_$__cuda_sm_90_mma_b1_xor) ")
