"""Arguments and options that several verbs take in the same form."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Runtime(StrEnum):
    """What computes quantized linears."""

    reference = "reference"
    cpu = "cpu"
    cuda = "cuda"


RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=VALUE",
        default_factory=list,
        show_default=False,
        help="Override a value of the recipe: seed=3, model=PATH, pipeline.calibrate/text.samples=8, "
        "pipeline.2.alpha=0.7 (steps count from 1). May be given many times.",
    ),
]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1; goes before what the recipe says.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read a model's pytorch_model.bin where it has no safetensors file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")]


def model_overrides(overrides: list[str], device: str | None, allow_pickle: bool = False) -> list[str]:
    """Those of --set, and what the other options say of the model."""
    return [*overrides, *([f"model.device={device}"] if device else []), *(["model.allow_pickle=true"] if allow_pickle else [])]
