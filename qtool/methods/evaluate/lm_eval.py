"""Tasks of the lm-evaluation-harness, run on the model in memory through lm-eval's Python API.

Every task that lm-eval knows by name, every task in a local folder, and `demo_cloze`, which comes with the demo model
and needs no network. One metric for each of a task's: `demo_cloze/acc`, with the standard error that lm-eval states.
Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
For: what the model can do, in numbers that others know.
Costs: a pass for every answer of every document: minutes to hours.
"""

import contextlib
import copy
import difflib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from qtool.artifact import Metric
from qtool.calibration.tokens import ASSETS
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.options import Options
from qtool.registry import Method

UNITS = {"word_perplexity": "ppl", "byte_perplexity": "ppl", "perplexity": "ppl", "bits_per_byte": "bits/byte"}


class LmEvalOptions(Options):
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of lm-eval tasks, groups or tags, or demo_cloze")
    include_path: tuple[str, ...] = Field((), description="local folders with tasks of your own (lm-eval's YAML files)")
    limit: int | None = Field(None, ge=1, description="items of each task; null: all")
    num_fewshot: int | None = Field(None, ge=0, description="solved examples before each item; null: as the task says")
    batch_size: int = Field(8, ge=1, description="requests in one forward")


def lm_eval(model: ModelHandle, reference: ModelHandle, options: LmEvalOptions, seed: int) -> list[Metric]:
    """Every metric of every task; raises QtoolError for a task that does not exist or whose data cannot be had."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = find_tasks(options)
    with silenced(), model.materialized() as module:
        try:
            answer = simple_evaluate(
                # A copy of the tokenizer, because lm-eval gives it a padding token where it has none.
                HFLM(pretrained=module, tokenizer=copy.deepcopy(model.tokenizer), batch_size=options.batch_size),
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError) as error:  # no network and no cache, or a task that this model cannot take
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise QtoolError(f"evaluate/lm_eval: {', '.join(options.tasks)}: {reason}") from error
    return [metric for task, results in answer["results"].items() for metric in read_metrics(task, results)]


def check_tasks(model: ModelHandle, options: LmEvalOptions) -> None:
    """Raise QtoolError for a task that does not exist, before any work."""
    find_tasks(options)


def find_tasks(options: LmEvalOptions) -> Any:
    """lm-eval's TaskManager; its own thousands of tasks are looked through only where a name asks for one of them."""
    from lm_eval.tasks import TaskManager

    missing = [folder for folder in options.include_path if not Path(folder).is_dir()]
    if missing:
        raise QtoolError(f"evaluate/lm_eval: include_path: the folder {missing[0]} does not exist")
    folders = [str(ASSETS / "demo" / "tasks"), *options.include_path]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(options.tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    for name in options.tasks:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=4)
            known = f"did you mean {', '.join(close)}?" if close else "`lm-eval ls tasks` lists them all"
            raise QtoolError(f'evaluate/lm_eval: there is no task "{name}"; {known}')
    return manager


def read_metrics(task: str, results: dict[str, Any]) -> list[Metric]:
    """Metrics of one task from lm-eval's {"acc,none": ..., "acc_stderr,none": ...}: metric, comma, filter."""
    metrics = []
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{name}_stderr,{filter_name}")
        shown = f"{task}/{name}" if filter_name == "none" else f"{task}/{name}/{filter_name}"
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        metrics.append(Metric(shown, task, float(value), UNITS.get(name, "fraction"), error))
    return metrics


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """No progress bars and no log lines below errors, which lm-eval would write into qtool's own."""
    from lm_eval.models.huggingface import tqdm

    logger = logging.getLogger("lm_eval")
    level, begin = logger.level, tqdm.__init__

    def begin_hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        begin(self, *args, **(kwargs | {"disable": True}))

    logger.setLevel(logging.ERROR)
    tqdm.__init__ = begin_hidden
    try:
        yield
    finally:
        tqdm.__init__ = begin
        logger.setLevel(level)


METHOD = Method(run=lm_eval, options=LmEvalOptions, scope="model", check=check_tasks)
