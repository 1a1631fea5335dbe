"""A search over a recipe's options within a budget of trials, for the recipes that no other beats in quality, size and time.

    extends: w4-gptq.yaml                                              the recipe, relative to this file
    space: {pipeline.quantize/gptq.damp: {low: 1e-3, high: 0.1, log: true}, pipeline.quantize/gptq.scheme: {choice: [...]}}
    objectives: [kl_divergence, mib]                                   metrics of the compressed model, and costs
    trials: 20                 first: {pipeline.calibrate/text.samples: 16}      overrides of a cheap first look
Each trial's options are Optuna's proposal (TPE, several objectives) from the values of those before it. A first look carries
the recipe out with `first` on top; a trial that an earlier one's first look beats in every objective ends there.
What search/mixed_precision does inside one run, a scheme for each linear from what single linears cost, is not this: here whole
runs are made and measured, and any option of any step may change.
Why a sampler of its own for each trial, seeded by the trial's number: a search that was stopped then goes on as if it had not
been. Everything that Optuna knows stands in OUT/study.log, which its own tools read too.
Source: Akiba et al. 2019, arXiv:1907.10902 (Optuna); Ozaki et al. 2020, doi:10.1145/3377930.3389817 (TPE, several objectives).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from qtool.errors import QtoolError
from qtool.model.store import write_text
from qtool.options import Options
from qtool.pipeline.checks import check_measured
from qtool.pipeline.run import run_recipe
from qtool.pipeline.sweep import Trial, make_trials
from qtool.progress import Progress, Silent
from qtool.recipe import Step, read_options
from qtool.report.comparison import COSTS, Run, choose_metric, read_run

Row = dict[str, Any]  # an entry of search.json
STUDY = "study.log"


class Range(Options):
    """What values an option may take: a choice, or numbers from low to high, whole ones where both ends are."""

    choice: tuple[str | int | float | bool, ...] | None = Field(None, min_length=1, description="values to choose from")
    low: int | float | None = Field(None, description="least value")
    high: int | float | None = Field(None, description="greatest value")
    log: bool = Field(False, description="numbers on a logarithmic scale")

    @model_validator(mode="after")
    def _state_one(self) -> "Range":
        if (self.choice is None) == (self.low is None or self.high is None):
            raise ValueError("states either choice, or low and high")
        if self.low is not None and self.high is not None and not (0 if self.log else self.low) < self.high >= self.low:
            raise ValueError(f"low {self.low} is not below high {self.high}")
        if self.log and self.low is not None and self.low <= 0:
            raise ValueError("log needs low above 0")
        return self


class SearchFile(Options):
    """A search file."""

    extends: str = Field(description="the recipe, relative to this file")
    space: dict[str, Range] = Field(min_length=1, description="path as in --set: the values it may take")
    objectives: tuple[str, ...] = Field(
        ("kl_divergence", "mib"), min_length=1, description=f"metrics, NAME or NAME@DATASET, and costs: {', '.join(COSTS)}"
    )
    trials: int = Field(20, ge=1, description="most trials, those that end after their first look among them")
    first: dict[str, Any] = Field({}, description="overrides of a trial's cheap first look; without any there is none")
    seed: int = Field(0, ge=0, lt=2**31, description="of the proposals")


def read_search(path: Path) -> SearchFile:
    """The file, checked with the ends and choices of each option one at a time; raises one RecipeError, before any work."""
    options = read_options(path, SearchFile)
    chosen: dict[str, dict[str, Any]] = {"first look": options.first} if options.first else {}
    for name, values in options.space.items():
        for value in values.choice or (values.low, values.high):
            chosen[f"{name}={value}"] = {name: value}
    for trial in make_trials(path.parent / options.extends, chosen):
        for name in options.objectives:
            check_objective(name, trial.recipe.steps)
    return options


def check_objective(name: str, steps: Sequence[Step]) -> None:
    """Raise QtoolError for an objective that no run of these steps will have."""
    metric, _, dataset = ("tokens_per_second", "", "") if name == "ms_per_token" else name.partition("@")
    if metric not in COSTS:
        costs = ", ".join(COSTS)
        try:
            check_measured(f"objectives: {name}", metric, dataset or None, steps)
        except QtoolError as error:
            raise QtoolError(f"{error}; costs: {costs}") from error


def run_option_search(options: SearchFile, recipe: Path, out: Path, progress: Progress) -> list[Row]:
    """Carry out the search; returns search.json's trials: {name, options, state, values, front}."""
    try:
        import optuna
        from optuna.storages.journal import JournalFileBackend
    except ImportError as error:
        raise QtoolError("a search runs on Optuna, which is not here; pip install 'qtool[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    out.mkdir(parents=True, exist_ok=True)
    asked = out / "asked.json"
    content = json.dumps({**options.model_dump(mode="json"), "trials": None, "extends": str(recipe.resolve())})
    if asked.is_file() and asked.read_text(encoding="utf-8") != content:
        raise QtoolError(f"--out: {out} holds another search; only trials may change on the way; use another --out")
    write_text(asked, content)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(out / STUDY)))
    directions = [optuna.study.StudyDirection.MINIMIZE] * len(options.objectives)
    study = optuna.create_study(study_name="qtool", storage=storage, directions=directions, load_if_exists=True)
    progress.stage("search", options.trials)
    first_looks: dict[int, list[float]] = {}
    while True:
        known = study.get_trials(deepcopy=False)
        stopped = [one.number for one in known if one.state == optuna.trial.TrialState.RUNNING]
        first_looks |= {one.number: one.user_attrs["first"] for one in known if "first" in one.user_attrs}
        if not stopped and len(known) >= options.trials:
            break
        number = stopped[0] if stopped else len(known)
        study.sampler = optuna.samplers.TPESampler(seed=(options.seed + 7919 * number) % 2**31, n_startup_trials=5)
        trial = optuna.trial.Trial(study, known[number]._trial_id) if stopped else study.ask()
        chosen = {name: suggest(trial, name, values) for name, values in options.space.items()}
        state, values = optuna.trial.TrialState.COMPLETE, None
        name = f"{number:03d}"
        if options.first:
            look = measured(make_trials(recipe, {name: {**chosen, **options.first}})[0], out / f"{name}-first", options)
            trial.set_user_attr("first", look)
            earlier = [one for at, one in first_looks.items() if at < number]
            if any(all(a <= b for a, b in zip(one, look, strict=True)) and one != look for one in earlier):
                state = optuna.trial.TrialState.PRUNED
        if state == optuna.trial.TrialState.COMPLETE:
            values = measured(make_trials(recipe, {name: chosen})[0], out / name, options)
        study.tell(number, values, state)
        progress.advance(f"{name} {'ends after its first look' if values is None else chosen}")
    rows = [describe(one, options) for one in study.get_trials(deepcopy=False)[: options.trials]]
    mark_front(rows)
    write_text(
        out / "search.json", json.dumps({"schema": 1, "objectives": options.objectives, "trials": rows}, indent=1) + "\n"
    )
    return rows


def suggest(trial: Any, name: str, values: Range) -> Any:
    """Optuna's proposal for one option."""
    if values.choice is not None:
        return trial.suggest_categorical(name, values.choice)
    if isinstance(values.low, int) and isinstance(values.high, int):
        return trial.suggest_int(name, values.low, values.high, log=values.log)
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def measured(trial: Trial, out: Path, options: SearchFile) -> list[float]:
    """Carry a trial out, or go on with it, and read its objectives, each the less the better."""
    run_recipe(trial.recipe, out, Silent())
    run = read_run(out)
    return [objective(run, name) for name in options.objectives]


def objective(run: Run, name: str) -> float:
    """A cost or a metric of the compressed model, turned round where higher is better; raises QtoolError for an unknown one."""
    if name in COSTS:
        if name not in run.costs:
            raise QtoolError(f"objectives: {name} is measured by evaluate/generation; add that step to the recipe")
        return run.costs[name]
    row = run.metrics["compressed"][choose_metric([run], name)]
    return -float(row["value"]) if row.get("higher_is_better") else float(row["value"])


def describe(trial: Any, options: SearchFile) -> Row:
    """An entry of search.json; values as they were measured."""
    state = "done" if trial.values is not None else "ended after its first look"
    return {
        "name": f"{trial.number:03d}",
        "options": dict(trial.params),
        "state": state,
        "values": trial.values,
        "front": False,
    }


def best_of(rows: Sequence[Row]) -> Row:
    """Of the front, the trial nearest to having each objective's best value, each scaled to its range over the front."""
    front = [row for row in rows if row["front"]]
    columns = list(zip(*(row["values"] for row in front), strict=True))
    spans = [(min(column), max(column) - min(column) or 1.0) for column in columns]
    return min(front, key=lambda row: sum(((v - low) / span) ** 2 for v, (low, span) in zip(row["values"], spans, strict=True)))


def write_best(rows: Sequence[Row], out: Path) -> Path:
    """Write best.yaml, a recipe like any other; the others of the front stand in their trials' folders as recipe.yaml."""
    best = best_of(rows)
    text = (out / best["name"] / "recipe.yaml").read_text(encoding="utf-8")
    said = ", ".join(f"{name}={value}" for name, value in best["options"].items())
    write_text(out / "best.yaml", f"# best.yaml: trial {best['name']} of {out.name}, {said}\n{text}")
    return out / "best.yaml"


def mark_front(rows: Sequence[Row]) -> None:
    """Mark trials that no other one is as good as in every objective and better than in one."""
    done = [row for row in rows if row["values"] is not None]
    for row in done:
        others = (other["values"] for other in done if other["values"] != row["values"])
        row["front"] = not any(all(a <= b for a, b in zip(other, row["values"], strict=True)) for other in others)
