"""`qtool run`: carry out a recipe, and go on where an interrupted run stopped."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from qtool.cli.interrupt import interruptible
from qtool.cli.options import AllowPickle, Device, Json, Overrides, RecipeArgument, model_overrides
from qtool.cli.progress import show_progress
from qtool.cli.summary import Row, print_summary


def run(
    recipe: RecipeArgument,
    overrides: Overrides,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME-OF-RECIPE where not given.")] = None,
    device: Device = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what the folder holds of an earlier run.")] = False,
    allow_pickle: AllowPickle = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the gates as JUnit XML.")] = None,
    markdown: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a summary fit for a pull request.")] = None,
    github: Annotated[bool, typer.Option("--github", help="Print failed gates as annotations of GitHub Actions.")] = False,
    json_only: Json = False,
) -> None:
    """Carry out a recipe. The same command goes on where an interrupted run stopped."""
    with interruptible("the same command goes on from here"):
        from qtool.recipe import load  # here, as in every verb, so that help need not wait for it

        loaded = load(recipe, model_overrides(overrides, device, allow_pickle))
        folder = out or Path("runs") / recipe.stem
        with redirect_stdout(sys.stderr if json_only else sys.stdout), show_progress(silent=json_only) as progress:
            from qtool.pipeline.ranks import asked_for  # here, because they import torch
            from qtool.pipeline.run import run_recipe

            results = run_recipe(loaded, folder, progress, fresh=fresh)
    if not asked_for().is_first:
        return  # one of several processes that torchrun started: the first tells
    if json_only:
        print(json.dumps(results, indent=1))
    else:
        print_summary(results, folder)
    show_ci(results, recipe.stem, junit, markdown, github)
    if results["status"] == "gate-failed":
        raise typer.Exit(3)


def show_ci(results: Row, name: str, junit: Path | None, markdown: Path | None, github: bool) -> None:
    """What the options ask for of a run called `name`; the runner reads annotations on stderr too, and --json needs stdout."""
    if junit is None and markdown is None and not github:
        return
    from qtool.model.store import write_text
    from qtool.report import ci

    if junit is not None:
        write_text(junit, ci.junit_xml(results, name))
    if markdown is not None:
        write_text(markdown, ci.markdown(results, name))
    for line in ci.github_annotations(results) if github else ():
        print(line, file=sys.stderr)
