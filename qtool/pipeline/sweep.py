"""A sweep: one recipe carried out with many overrides, side by side on Ray; each trial is a run like any other.

    extends: w4-gptq.yaml                                 the recipe, relative to this file
    grid: {pipeline.quantize/gptq.damp: [0.01, 0.1]}      every combination of these values
    trials: {small: {seed: 1}, ...}                       or stated ones by name; with a grid, each of them over all of it
Paths are those of `--set`. OUT/NAME is a trial's run folder; one that is finished stays, one that was stopped goes on.
Why Ray: the same file runs on the cores of one machine or on a cluster whose machines share a disk and have qtool, with GPUs
counted: a trial sees those that are its own.
"""

import itertools
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from qtool.errors import QtoolError, RecipeError
from qtool.model.store import write_text
from qtool.options import Options
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.run import run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import Recipe, load, parse, read_options

STORE_BYTES = 80 << 20  # of Ray's store for objects: trials hand over a line of text each; it takes no less


class Resources(Options):
    """Where trials run, and what one of them takes."""

    address: str | None = Field(None, description="a Ray cluster, auto or HOST:PORT, that shares this disk; null: this machine")
    cpus: float = Field(1, gt=0, description="processor cores of one trial")
    gpus: float = Field(0, ge=0, description="GPUs of one trial; 0.5: two trials share one")
    parallel: int | None = Field(None, ge=1, description="most trials at once; null: as many as there is room for")
    retries: int = Field(1, ge=0, description="how often a trial whose process dies, of memory too, goes on in a new one")


class SweepOptions(Options):
    """A sweep file."""

    extends: str = Field(description="the recipe, relative to this file")
    grid: dict[str, tuple[Any, ...]] = Field({}, description="path as in --set: values")
    trials: dict[str, dict[str, Any]] = Field({}, description="name: {path as in --set: value}")
    resources: Resources = Field(Resources(), description="where trials run, and what one of them takes")

    @model_validator(mode="after")
    def _state_trials(self) -> "SweepOptions":
        if not self.grid and not self.trials:
            raise ValueError("states no trial; give grid, trials or both")
        if empty := [path for path, values in self.grid.items() if not values]:
            raise ValueError(f"grid: {empty[0]} has no values")
        if wrong := [name for name in self.trials if not re.fullmatch(r"[\w.,=+-]+", name) or name.startswith(".")]:
            raise ValueError(f'trials: "{wrong[0]}" cannot name a folder; use letters, digits and . , = + - _')
        return self


@dataclass(frozen=True)
class Trial:
    """One run to be: its name, which is its folder's, and a recipe that is checked."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def read_sweep(path: Path) -> tuple[SweepOptions, list[Trial]]:
    """The file and its trials; raises one RecipeError with the mistakes of all of them, before any work."""
    options = read_options(path, SweepOptions)
    return options, make_trials(path.parent / options.extends, expand(options))


def expand(options: SweepOptions) -> dict[str, dict[str, Any]]:
    """Name: {path: value}, of every trial."""
    found: dict[str, dict[str, Any]] = {}
    combinations = list(itertools.product(*options.grid.values()))
    for (stated, values), combination in itertools.product((options.trials or {"": {}}).items(), combinations):
        chosen = dict(zip(options.grid, combination, strict=True))
        name = ",".join(part for part in (stated, name_of(chosen)) if part)
        if name in found:
            name = f"{name},{len(found)}"
        found[name] = {**values, **chosen}
    return found


def name_of(values: Mapping[str, Any]) -> str:
    """A folder's name that says what was set: scheme=w4a16g128,damp=0.1."""
    parts = [
        f"{path.rpartition('.')[2]}={value if isinstance(value, str) else json.dumps(value)}" for path, value in values.items()
    ]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts))[:120].lstrip(".")


def make_trials(recipe: Path, chosen: Mapping[str, Mapping[str, Any]]) -> list[Trial]:
    """Trials with their recipes; raises one RecipeError with every mistake of each."""
    trials, problems = list[Trial](), list[str]()
    for name, values in chosen.items():
        overrides = tuple(f"{path}={json.dumps(value)}" for path, value in values.items())
        try:
            loaded = load(recipe, overrides)
            check_recipe(loaded)
            trials.append(Trial(name, overrides, loaded))
        except RecipeError as error:
            problems += [f"{name}: {problem}" for problem in error.problems]
        except QtoolError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise RecipeError(problems)
    return trials


def run_sweep(options: SweepOptions, trials: Sequence[Trial], out: Path, progress: Progress) -> list[dict[str, Any]]:
    """Carry out all trials; returns what sweep.json holds: {name, overrides, path, status, error} of each."""
    out = out.resolve()
    progress.stage("sweep", len(trials))
    said: dict[str, str | None] = {}  # trial: what it failed of, null where it did not
    left = []
    for trial in trials:
        if is_finished(out / trial.name, trial.recipe):
            said[trial.name] = None
            progress.advance(f"{trial.name} was finished before")
        else:
            left.append(trial)
    for name, error in carry_out(options.resources, left, out):
        said[name] = error
        if error is not None:
            progress.note(f"{name}: {error}")
        progress.advance(name)
    rows = [describe(trial, out, said[trial.name]) for trial in trials]
    write_text(out / "sweep.json", json.dumps({"schema": 1, "trials": rows}, indent=1) + "\n")
    return rows


def describe(trial: Trial, out: Path, error: str | None) -> dict[str, Any]:
    """An entry of sweep.json."""
    status = "failed" if error is not None else json.loads((out / trial.name / "results.json").read_text("utf-8"))["status"]
    return {"name": trial.name, "overrides": trial.overrides, "path": trial.name, "status": status, "error": error}


def is_finished(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds the results of this very recipe."""
    results = folder / "results.json"
    return results.is_file() and json.loads(results.read_text(encoding="utf-8"))["digest"] == recipe.digest


def carry_out(resources: Resources, trials: Sequence[Trial], out: Path) -> Iterator[tuple[str, str | None]]:
    """(name, error or None) of each trial, in the order in which they end."""
    if not trials:
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a trial without GPUs sees none changed
    os.environ.setdefault("RAY_task_oom_retries", str(resources.retries))  # Ray alone would start such a trial for ever
    try:
        import ray
    except ImportError as error:
        raise QtoolError("a sweep runs on Ray, which is not here; pip install 'qtool[sweep]'") from error

    # Without an address Ray would join any cluster that runs here, or that RAY_ADDRESS names.
    here: dict[str, Any] = {"address": "local", "object_store_memory": STORE_BYTES, "include_dashboard": False}
    where = here if resources.address is None else {"address": resources.address}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise QtoolError(f"resources.address: {resources.address}: no Ray cluster answers there: {error}") from error
    try:
        check_room(resources, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        work = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus, max_retries=resources.retries)(run_trial)
        waiting, running = list(trials), dict[Any, str]()
        while waiting or running:
            while waiting and (resources.parallel is None or len(running) < resources.parallel):
                trial = waiting.pop(0)
                started = work.remote(trial.recipe.to_yaml(), str(out / trial.name), os.getcwd())
                running[started] = trial.name
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            name = running.pop(ended)
            try:
                yield name, ray.get(ended)
            except ray.exceptions.RayError as error:  # it died each time, or has an internal fault
                yield name, str(error).strip().splitlines()[-1]
    finally:
        ray.shutdown()


def check_room(resources: Resources, machines: Sequence[Mapping[str, float]]) -> None:
    """Raise QtoolError where no single machine of a cluster has what a trial takes, which would wait for ever."""
    if not any(resources.cpus <= one.get("CPU", 0) and resources.gpus <= one.get("GPU", 0) for one in machines):
        there = ", ".join(sorted({f"{one.get('CPU', 0):g} and {one.get('GPU', 0):g}" for one in machines}))
        asked = f"{resources.cpus:g} cpus and {resources.gpus:g} gpus"
        raise QtoolError(f"resources: a trial takes {asked} on one machine, but they have {there}; take fewer")


def run_trial(recipe: str, out: str, cwd: str) -> str | None:
    """One trial in a process of its own, which goes on where an earlier one stopped; returns what a user can put right."""
    os.chdir(cwd)  # relative paths mean what they mean there
    try:
        run_recipe(parse(recipe, f"{out}/recipe.yaml"), Path(out), Silent())
    except QtoolError as error:
        return str(error)
    return None
