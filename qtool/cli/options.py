"""Arguments and options that several verbs take in the same form."""

from pathlib import Path
from typing import Annotated

import typer

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
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON on stdout, and nothing else there.")]
