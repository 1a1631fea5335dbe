"""`qtool eval`: measure a finished run or any model, without changing it."""

import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qtool.cli.options import AllowPickle, Device, Json, Overrides, Runtime
from qtool.cli.progress import show_progress
from qtool.cli.summary import print_metrics
from qtool.errors import QtoolError

if TYPE_CHECKING:
    from qtool.recipe import Step


def evaluate(
    target: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="demo, a folder, a hub id, or a run's folder.")],
    overrides: Overrides,
    source: Annotated[str | None, typer.Option(help="Text for the perplexity: demo:test, a file, a data set.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Windows to take; all where not given.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    original: Annotated[
        str | None, typer.Option(help="What MODEL was made from, to measure it against; with --source the KL divergence too.")
    ] = None,
    runtime: Annotated[
        Runtime, typer.Option(help="What computes quantized linears: decoded weights as in a run, or a device's fast products.")
    ] = Runtime.reference,
    out: Annotated[Path | None, typer.Option(help="Folder for results.json and report.html, as those of a run.")] = None,
    device: Device = None,
    allow_pickle: AllowPickle = False,
    json_only: Json = False,
) -> None:
    """Measure a model, or a run's compressed model beside its original; a run brings its own evaluate steps.

    A model may be any checkpoint that transformers loads, quantized by whatever tool. With --original and --out it is
    measured as a run's is, and `qtool compare` takes it beside others and beside runs.
    """
    is_run = (Path(target) / "recipe.yaml").is_file()
    if original is not None and is_run:
        raise QtoolError(f"--original: {target} is a run, and is measured against the original of its recipe; leave it away")
    steps = choose_steps(target, source, length, samples, tasks, overrides, is_beside=original is not None)
    with redirect_stdout(sys.stderr if json_only else sys.stdout), show_progress(silent=json_only) as progress:
        from qtool.pipeline.ranks import asked_for  # here, because they import torch
        from qtool.pipeline.run import evaluate_target

        results = evaluate_target(target, steps, progress, device or "auto", allow_pickle, runtime.value, out, original)
    if not asked_for().is_first:
        return  # one of several processes that torchrun started: the first tells
    if json_only:
        print(json.dumps(results, indent=1))
    else:
        print_metrics(results["metrics"])
        for line in results["runtime"]:
            print(f"{runtime.value}: {line}")
        if out is not None:
            print(out / "report.html")


def choose_steps(
    target: str,
    source: str | None,
    length: int | None,
    samples: int | None,
    tasks: str | None,
    overrides: list[str],
    is_beside: bool,
) -> "list[Step]":
    """The evaluate steps that the options ask for, else those of the run's recipe; is_beside: of two models."""
    from qtool.recipe import load, parse

    if source is None and (length is not None or samples is not None):
        raise QtoolError("--length and --samples say how to cut a text; name it with --source")
    windows = {"source": source, "length": length, "samples": samples}
    asked: list[dict[str, object]] = []
    if source is not None:
        stated = {name: value for name, value in windows.items() if value is not None}
        asked += [{key: stated} for key in ("evaluate/perplexity", *(["evaluate/kl_divergence"] if is_beside else []))]
    if tasks is not None:
        asked.append({"evaluate/lm_eval": {"tasks": [task.strip() for task in tasks.split(",")]}})
    recipe = Path(target) / "recipe.yaml"
    if asked:
        return list(parse(json.dumps({"model": target, "pipeline": asked}), "qtool eval", overrides).steps)
    if not recipe.is_file():
        raise QtoolError(f"{target} is no run with steps of its own; say what to measure with --source or --tasks")
    steps = [step for step in load(recipe, overrides).steps if step.method.kind == "evaluate"]
    if not steps:
        raise QtoolError(f"{recipe} has no evaluate step; say what to measure with --source or --tasks")
    return steps
