"""`qtool stream`: quantize a checkpoint of any size file by file, without building the model."""

from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.interrupt import interruptible
from qtool.cli.options import Device, Overrides, RecipeArgument, model_overrides
from qtool.cli.progress import show_progress


def stream(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option(help="Folder to write; must not exist yet.")],
    overrides: Overrides,
    workers: Annotated[
        int, typer.Option(min=1, help="Files worked on at the same time; each takes memory for one linear of its own.")
    ] = 1,
    device: Device = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier command left unfinished.")] = False,
) -> None:
    """Write the export of a recipe without building the model, one tensor in memory at a time.

    Takes one quantize step that needs no text, such as quantize/rtn, and one export. The same command goes on where an
    interrupted one stopped.
    """
    with interruptible("the same command goes on from here"):
        from qtool.recipe import load  # here, as in every verb, so that help need not wait for it

        loaded = load(recipe, model_overrides(overrides, device))
        with show_progress() as progress:
            from qtool.pipeline.run import Stage  # here, because it imports torch
            from qtool.pipeline.stream import stream_recipe

            with Stage("stream") as stage:
                artifact = stream_recipe(loaded, out, progress, workers, fresh)
    kept = "exactly what rounding gave" if artifact.lossless else "close to what rounding gave, not equal"
    facts = f"{stage.facts['seconds']:.1f} s, at most {stage.facts['peak_rss_gib']:.2f} GiB of memory"
    print(f"{artifact.path}: {artifact.bytes / 2**20:,.1f} MiB, {kept}; {facts}")
