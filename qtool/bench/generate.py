"""How fast a compressed model writes, and in how much memory, beside the same model in 16 bits.

    prefill    seconds until the first token of a prompt [batch, prompt] is chosen
    decode     tokens a second afterwards, one for each row of the batch at a time, greedily, with the cache: see decoding.py
The model in 16 bits is this one with every quantized linear decoded to a plain one, which has the shapes, the dtype and so the
speed and the memory of the original; whatever it keeps in few bits beside its linears, such as its cache, stays.
Each repetition writes the whole text anew; medians and quartiles are over repetitions. Prompts are random tokens: what is
written does not matter to time.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.bench.decoding import Decoding, make_decoding
from qtool.bench.timing import Timed, summarize
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import carry_rotation
from qtool.model.acceleration import Acceleration, stored_bytes
from qtool.model.handle import ModelHandle
from qtool.model.memory import return_free_memory
from qtool.options import ModelOptions
from qtool.pipeline.machine import describe_machine
from qtool.pipeline.run import Stage, finished_run
from qtool.progress import Progress
from qtool.report.results import versions

SUBJECTS = ("16 bits", "fast", "reference")


@dataclass(frozen=True)
class Workload:
    """Rows that are written side by side, each batch a measurement; tokens of the prompt and tokens written after it."""

    batches: tuple[int, ...]
    prompt: int
    new: int
    repetitions: int


def bench_generate(
    options: ModelOptions, workload: Workload, progress: Progress, with_reference: bool = False
) -> dict[str, Any]:
    """Measure an export, another checkpoint that qtool reads, or a run's folder; with_reference: what decodes at each call too.

    Raises QtoolError where the model has no quantized linear, or is too short for the prompt and what follows it.
    """
    handle = _open(options, None)
    config = handle.config.get_text_config()
    if not handle.schemes():
        raise QtoolError(f"{options.path} has no quantized linear; name an export or a run's folder")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and workload.prompt + workload.new > longest:
        raise QtoolError(
            f"--prompt {workload.prompt} and --new {workload.new} come to more than the model's {longest} positions; take fewer"
        )
    subjects = SUBJECTS if with_reference else SUBJECTS[:2]
    progress.stage("bench generate", len(subjects) * len(workload.batches))
    acceleration = Acceleration()
    rows: list[dict[str, Any]] = []
    for subject in subjects:
        with Stage(subject) as stage:
            model = _load(options, subject, acceleration)
            found = [_measure(model, config.vocab_size, batch, workload, progress, subject) for batch in workload.batches]
        memory = {"weights_bytes": stored_bytes(model), "peak_rss_gib": stage.facts["peak_rss_gib"]}
        rows += [{"subject": subject, **row, **memory, "peak_gpu_gib": stage.facts["peak_gpu_gib"]} for row in found]
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        del model
        return_free_memory()
    return {
        "model": options.path,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "workload": asdict(workload),
        "linears": acceleration.lines(),
        "rows": rows,
        "machine": describe_machine(Path.cwd()),
        "versions": versions(),
    }


def _open(options: ModelOptions, acceleration: Acceleration | None) -> ModelHandle:
    folder = Path(options.path)
    if not (folder / "state").is_dir():
        return ModelHandle(options, acceleration=acceleration)
    recipe, changes = finished_run(folder)
    return ModelHandle(recipe.model.model_copy(update={"device": options.device}), changes, acceleration)


def _load(options: ModelOptions, subject: str, acceleration: Acceleration) -> PreTrainedModel:
    model = _open(options, acceleration if subject == "fast" else None).take()
    if subject == "16 bits":
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, QuantLinear)]:
            model.set_submodule(name, decoded(layer, model.dtype))
    return model


def decoded(layer: QuantLinear, dtype: torch.dtype) -> nn.Linear:
    """A plain linear with the weights that a quantized one amounts to; inputs are not rounded."""
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=dtype)
    plain.weight = nn.Parameter(layer.weight_values(dtype).detach(), requires_grad=False)
    plain.register_parameter("bias", layer.bias)
    carry_rotation(layer, plain)
    return plain


@torch.no_grad()
def _measure(
    model: PreTrainedModel, vocab: int, batch: int, workload: Workload, progress: Progress, subject: str
) -> dict[str, Any]:
    prompt = torch.randint(vocab, (batch, workload.prompt), generator=torch.Generator().manual_seed(0)).to(model.device)
    decoding = make_decoding(model, prompt, workload.new)
    firsts: list[float] = []
    rests: list[float] = []
    for _ in range(workload.repetitions):
        first, rest = _write(model, decoding, prompt, workload.new)
        firsts.append(first)
        rests.append(rest)
    progress.advance(f"{subject}, batch {batch}")
    tokens = batch * (workload.new - 1)
    step = summarize(rests)
    return {
        "batch": batch,
        "first_token_seconds": asdict(summarize(firsts)),
        "decode_tokens_per_second": asdict(Timed(tokens / step.median, tokens / step.high, tokens / step.low, step.samples)),
        "decoding": {"form": decoding.form, "why": decoding.why},
    }


def _write(model: PreTrainedModel, decoding: Decoding, prompt: Tensor, new: int) -> tuple[float, float]:
    """Seconds until the first new token, and of the new - 1 after it."""
    decoding.clear()
    begun = _now(model)
    decoding.first(prompt)
    first = _now(model)
    for _ in range(new - 1):
        decoding.next()
    return first - begun, _now(model) - first


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def speedups(rows: Sequence[dict[str, Any]], subject: str) -> list[tuple[int, float, float]]:
    """(batch, how many times the speed of 16 bits the subject's prefill has, and its decoding)."""
    of = {(row["subject"], row["batch"]): row for row in rows}
    found = []
    for (name, batch), row in of.items():
        if name == subject:
            base = of[(SUBJECTS[0], batch)]
            prefill = base["first_token_seconds"]["median"] / row["first_token_seconds"]["median"]
            decode = row["decode_tokens_per_second"]["median"] / base["decode_tokens_per_second"]["median"]
            found.append((batch, prefill, decode))
    return found
