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


def test_every_template_was_compiled_from_these_sources() -> None:
    known = resources.read_resources()
    assert {file: list(entry[resources.LAST]) for file, entry in known.items()} == resources.every_template()
    stale = [file for file, entry in known.items() if entry["source"] != resources.digest(file)]
    assert not stale, "run python scripts/kernel_resources.py"


def test_no_kernel_spills() -> None:
    rows = [
        (file, architecture, template, spilled)
        for file, entry in resources.read_resources().items()
        for architecture in resources.ARCHITECTURES
        for template, (_, spilled) in entry[architecture].items()
    ]
    assert len(rows) > 200 and [row for row in rows if row[3]] == []


@pytest.mark.parametrize(("file", "template"), SAMPLE)
@pytest.mark.parametrize("architecture", resources.ARCHITECTURES)
def test_it_compiles_as_it_did(tmp_path: Path, file: str, template: str, architecture: str) -> None:
    made = resources.compile_kernel(file, template, architecture)
    assert [made.registers, made.spilled] == resources.read_resources()[file][architecture][template]
    found = resources.opcodes(made.cubin, tmp_path)
    assert len(found) > 50
    assert [
        wanted for wanted in WANTED[template.split("<")[0]] if not any(re.fullmatch(f"{wanted}.*", code) for code in found)
    ] == []
    assert [code for code in found if re.match(MEMORY, code)] == []
    assert [code for code in found if architecture == resources.LAST and re.match(EMULATION, code)] == []


def test_an_emulated_instruction_would_be_seen() -> None:
    """What the disassembler prints of a division, and of a product that a chip does in steps."""
    assert not re.match(EMULATION, "CALL.REL.NOINC `($__internal_0_$__cuda_sm20_div_s64) ")
    assert re.match(EMULATION, "CALL.REL.NOINC `($__internal_0_$__cuda_sm_90_mma_b1_xor) ")
