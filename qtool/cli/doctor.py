"""`qtool doctor`: what is installed, what this machine offers, what is missing and how to get it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

import qtool
from qtool.cli.console import make_console
from qtool.errors import QtoolError


@dataclass(frozen=True)
class Part:
    """A package, by the names it is distributed under, and what it is for."""

    names: tuple[str, ...]
    purpose: str
    is_required: bool = True


PARTS = (
    Part(("torch",), "everything"),
    Part(("transformers",), "models and tokenizers"),
    Part(("accelerate",), "models without weights in memory"),
    Part(("safetensors",), "weights on disk"),
    Part(("datasets",), "text from the hub"),
    Part(("pyarrow",), "text from .parquet files"),
    Part(("huggingface-hub",), "models from the hub"),
    Part(("lm-eval",), "evaluate/lm_eval"),
    Part(("pydantic",), "recipes"),
    Part(("cupy-cuda13x", "cupy-cuda12x", "cupy"), "CUDA kernels, with an NVIDIA GPU", is_required=False),
    Part(("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "compiling them, where no CUDA toolkit does", is_required=False),
    Part(("ray",), "qtool sweep", is_required=False),
    Part(("optuna",), "qtool search", is_required=False),
    Part(("compressed-tensors",), "loading exports with plain transformers", is_required=False),
)


def doctor() -> None:
    """Show versions, this machine, and what is missing with the command that installs it."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("qtool", qtool.__version__, "")
    table.add_row("python", platform.python_version(), "")
    missing = []
    for part in PARTS:
        version = find_version(part)
        if version is None and part.is_required:
            missing.append(part.names[0])
        advice = "" if version else f"[yellow]pip install {part.names[0]}[/yellow]"
        table.add_row(part.names[0], version or "[yellow]missing[/yellow]", f"[dim]{part.purpose}[/dim]  {advice}")
    if find_version(PARTS[0]) is not None:
        from qtool.pipeline.machine import describe_machine, describe_products  # here, because it imports torch

        for name, fact in (describe_machine(Path.cwd()) | describe_products()).items():
            table.add_row(name, fact, "")
    make_console().print(table)
    if missing:
        raise QtoolError(f"qtool cannot run without {', '.join(missing)}; pip install {' '.join(missing)}")
    print("nothing that qtool needs is missing")


def find_version(part: Part) -> str | None:
    """The installed version under the first name that is found; None where none is."""
    for name in part.names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
