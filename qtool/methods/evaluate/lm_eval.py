"""Tasks of the lm-evaluation-harness, run on the model in memory through lm-eval's Python API.

Every task, group and tag that lm-eval knows by name, every task in a local folder, and `demo_cloze`, which comes with the demo
model and needs no network. One metric for each of a task's: `demo_cloze/acc`, with the standard error that lm-eval states.
Where a metric is the mean over documents, so is a group's, each document's figure pairs it with the original's: the change
has the standard error of the mean of differences, which a bootstrap over documents converges to. A task's metric of all its
documents together (word_perplexity, bleu, f1, mcc) is aggregated anew over 200 resamples of them, the same ones for each model
by a seed that never changes: from these it and its change have their standard errors. A group has only what lm-eval states.
What lm-eval returns is written as it would write it: evaluations/STEP/SUBJECT-results.json, and its samples where asked for.
Answers of the original are kept on disk by the requests' text (model/answers.py), so that the next recipe asks it nothing.
Processes that torchrun or `accelerate launch` started share the documents, each with the whole model.
Source: Gao et al., https://github.com/EleutherAI/lm-evaluation-harness.
For: what the model can do, in numbers that others know.
Costs: a pass for every answer of every document: minutes to hours.
"""

import contextlib
import copy
import difflib
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from pydantic import Field

from qtool.artifact import Metric, Record
from qtool.calibration.tokens import ASSETS
from qtool.errors import QtoolError
from qtool.linalg.contributions import RESAMPLES, mean_parts_of, resampled_parts, standard_error
from qtool.model.answers import recall_answers
from qtool.model.handle import ModelHandle
from qtool.options import Options
from qtool.registry import Method

UNITS = {"word_perplexity": "ppl", "byte_perplexity": "ppl", "perplexity": "ppl", "bits_per_byte": "bits/byte"}


class LmEvalOptions(Options):
    """Which tasks, how much of them, and how they are put to the model."""

    tasks: tuple[str, ...] = Field(min_length=1, description="names of lm-eval tasks, groups or tags, or demo_cloze")
    include_path: tuple[str, ...] = Field((), description="local folders with tasks of your own (lm-eval's YAML files)")
    limit: int | None = Field(None, ge=1, description="items of each task; null: all")
    num_fewshot: int | None = Field(None, ge=0, description="solved examples before each item; null: as the task says")
    batch_size: int = Field(8, ge=1, description="requests in one forward")
    apply_chat_template: bool = Field(False, description="put each item through the tokenizer's chat template")
    fewshot_as_multiturn: bool = Field(True, description="with a chat template: each solved example is a turn of its own")
    system_instruction: str | None = Field(None, description="what stands before each item, as the system's message")
    log_samples: bool = Field(False, description="write every document with the model's answers too")


def lm_eval(model: ModelHandle, reference: ModelHandle, options: LmEvalOptions, seed: int) -> list[Metric | Record]:
    """Every metric of every task; raises QtoolError for a task that does not exist or whose data cannot be had."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM, Accelerator
    from lm_eval.utils import handle_non_serializable

    manager = find_tasks(options)
    with silenced(), contextlib.redirect_stdout(io.StringIO()), model.materialized() as module:
        # A copy of the tokenizer, because lm-eval gives it a padding token where it has none.
        lm = HFLM(pretrained=module, tokenizer=copy.deepcopy(model.tokenizer), batch_size=options.batch_size)
        if dist.is_initialized():  # as lm-eval does with a model that it has loaded itself
            lm.accelerator = Accelerator(cpu=model.device.type == "cpu")
            lm._rank, lm._world_size = dist.get_rank(), dist.get_world_size()
        recall_answers(lm, model)
        try:
            loaded = manager.load(list(options.tasks))
            manager.load = lambda _: loaded  # once is enough, and its tasks know how they aggregate
            least = min(options.limit or math.inf, *(len(task.eval_docs) for task in loaded["tasks"].values()))
            if least < lm.world_size:
                raise QtoolError(f"evaluate/lm_eval: {lm.world_size} processes share {least} documents; start {least} at most")
            answer = simple_evaluate(
                lm,
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.apply_chat_template,
                fewshot_as_multiturn=options.fewshot_as_multiturn and options.apply_chat_template,
                system_instruction=options.system_instruction,
                log_samples=True,
                bootstrap_iters=RESAMPLES,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (OSError, ValueError) as error:  # no network and no cache, or a task that this model cannot take
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise QtoolError(f"evaluate/lm_eval: {', '.join(options.tasks)}: {reason}") from error
    if lm.rank != 0:
        return []
    samples = {task: sorted(rows, key=lambda row: int(row["doc_id"])) for task, rows in answer.pop("samples").items()}
    found: list[Metric | Record] = []
    for task, results in answer["results"].items():
        items = document_items(samples, subtasks_of(task, answer.get("group_subtasks", {})))
        aggregations = loaded["tasks"][task].aggregation() if task in loaded["tasks"] else {}
        found += read_metrics(task, results, items, answer.get("higher_is_better", {}).get(task, {}), aggregations)

    def written(value: object) -> str:
        return json.dumps(value, default=handle_non_serializable, ensure_ascii=False)

    found.append(Record("results.json", written(answer) + "\n"))
    for task, rows in samples.items() if options.log_samples else ():
        found.append(Record(f"samples_{task}.jsonl", "".join(written(row) + "\n" for row in rows)))
    return found


def check_tasks(model: ModelHandle, options: LmEvalOptions) -> None:
    """Raise QtoolError for a task that does not exist, or a chat template that the tokenizer has not, before any work."""
    if options.apply_chat_template and not model.tokenizer.chat_template:
        raise QtoolError("evaluate/lm_eval: apply_chat_template: the tokenizer has no chat template; leave it false")
    find_tasks(options)


def find_tasks(options: LmEvalOptions) -> Any:
    """lm-eval's TaskManager; its own thousands of tasks are looked through only where a name asks for one of them."""
    from lm_eval.tasks import TaskManager

    if missing := [folder for folder in options.include_path if not Path(folder).is_dir()]:
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


def subtasks_of(name: str, members: dict[str, list[str]]) -> list[str]:
    """The tasks that a group stands for, through groups of groups; a task stands for itself."""
    return [task for member in members[name] for task in subtasks_of(member, members)] if members.get(name) else [name]


def document_items(samples: dict[str, list[dict[str, Any]]], tasks: list[str]) -> dict[str, list[Any]]:
    """`metric,filter`: what lm-eval aggregates of every document of the tasks."""
    found: dict[str, list[Any]] = {}
    for row in (row for task in tasks for row in samples.get(task, [])):
        for name in row["metrics"]:
            found.setdefault(f"{name},{row['filter']}", []).append(row[name])
    return found


def read_metrics(
    task: str,
    results: dict[str, Any],
    items: Mapping[str, Sequence[Any]],
    directions: Mapping[str, bool],
    aggregations: Mapping[str, Callable[[list[Any]], float]],
) -> list[Metric]:
    """Metrics of one task from lm-eval's {"acc,none": ..., "acc_stderr,none": ...}: metric, comma, filter."""
    metrics = []
    for key, value in results.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = results.get(f"{name}_stderr,{filter_name}")
        shown = f"{task}/{name}" if filter_name == "none" else f"{task}/{name}/{filter_name}"
        error = float(stderr) if isinstance(stderr, (int, float)) else None
        of_documents = items.get(key, [])
        parts = mean_parts_of(value, of_documents)
        if parts is None and name in aggregations:
            parts = resampled_parts(value, of_documents, aggregations[name])
            error = error if parts is None else standard_error(parts)
        unit, better, n = UNITS.get(name, "fraction"), directions.get(name), len(of_documents) or None
        metrics.append(Metric(shown, task, float(value), unit, error, None, better, parts, n))
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


METHOD = Method(run=lm_eval, options=LmEvalOptions, scope="model", check=check_tasks, measures=("*/*",), is_shared=True)
