"""What a run will take, from shapes and options alone: seconds, peak memory and disk of each step.

Time is floating-point operations by the rate of one matrix product, measured on the spot: text goes through the blocks so
and so often, learning runs each window forward and back, and methods of one matrix tell their own operations, or have those
of one sweep over its columns. Expect to be told the size of the wait, not the minute: the half of it or the double.
Memory is the largest of what a step holds at once: one block with what is kept of it, the activations of all windows, or
the whole model with its optimizer where training or lm-eval needs it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.tokens import TextOptions, WrittenOptions, read_tokens
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.formats.allocation import SearchOptions, stored_bytes
from qtool.formats.rotations import LearnedRotations
from qtool.formats.scheme import SchemeSelection
from qtool.model.handle import BATCH, ModelHandle
from qtool.model.rotated_network import CHECKS, JUDGED
from qtool.options import BlockTuning, Curvature, Options, Selection, Sequential, TrainingOptions
from qtool.pipeline.checks import planned_model, planned_text
from qtool.recipe import CHANGING, Step

IDLE_BYTES = 420 * 2**20  # Python with torch and transformers, before any model
EFFICIENCY = 0.4  # of the rate of one large product, what a block of many small operations keeps
ROUNDING = 3000  # operations' worth of time that choosing a range and rounding takes for one weight
ALONE = 3  # times the cost of a token where each is drawn after the one before it
FORWARD, BACKWARD = 2, 4  # operations for one weight and one token


@dataclass(frozen=True)
class Cost:
    """Of one step; disk is what stays in the run's folder."""

    key: str
    operations: float
    memory_bytes: float
    disk_bytes: float

    def seconds(self, rate: float) -> float:
        """On a machine of `rate` operations a second."""
        return self.operations / (rate * EFFICIENCY)


@dataclass(frozen=True)
class Sizes:
    """Of a model: weights of the blocks' linears, of one block, outside the blocks; bytes of a stored weight."""

    blocks: int
    block: int
    outer: int
    itemsize: int
    hidden: int
    vocab: int
    widest: int  # inputs of the widest linear

    @property
    def all(self) -> int:
        return self.blocks + self.outer


def sizes_of(model: ModelHandle) -> Sizes:
    """Counted on the skeleton."""
    linears = [model.linear_shape(name) for name in model.linear_names() if name.startswith(f"{model.blocks_name}.")]
    blocks = sum(out * columns for out, columns in linears)
    config = model.config.get_text_config()
    return Sizes(
        blocks, blocks // model.n_blocks, model.n_parameters() - blocks, model.dtype.itemsize, int(config.hidden_size),
        int(config.vocab_size), max(columns for _, columns in linears),
    )  # fmt: skip


def estimate(model: ModelHandle, steps: Sequence[Step], seed: int, export_bytes: dict[str, int]) -> list[Cost]:
    """The cost of each step, in their order; `export_bytes`: what each export will write."""
    costs = []
    told = [planned_text(step, steps[:index]).options for index, step in enumerate(steps)]
    texts = {index: options for index, options in enumerate(told) if isinstance(options, TextOptions)}
    windows = {index: tuple(windows_of(text, model.tokenizer, seed).shape) for index, text in texts.items()}
    windows |= {
        index: (step.options.samples, step.options.length)
        for index, step in enumerate(steps)
        if isinstance(step.options, WrittenOptions)
    }
    calibration = next((shape for index, shape in windows.items() if steps[index].method.kind == "calibrate"), (0, 0))
    for index, step in enumerate(steps):
        sizes = sizes_of(model)
        if step.method.kind in CHANGING:
            costs.append(changing_cost(model, step, sizes, calibration))
            model = planned_model(model, [step])
        elif isinstance(step.options, SearchOptions):
            costs.append(search_cost(model, step, sizes, calibration))
        elif step.method.kind == "evaluate":
            n_subjects = 1 + any(one.method.kind in CHANGING for one in steps) + len(export_bytes)
            costs.append(evaluation_cost(step, sizes, n_subjects, windows.get(index)))
        elif step.method.kind == "export":
            size = export_bytes[step.key]
            costs.append(Cost(step.key, 100 * sizes.all, held(sizes) + 6 * sizes.block, size))
        else:
            costs.append(Cost(step.key, 0, IDLE_BYTES, 0))
    return costs


def windows_of(text: TextOptions, tokenizer: object, seed: int) -> Tensor:
    """The tokens [samples, length] that a step reads."""
    return read_windows(text, tokenizer, seed).tokens if isinstance(text, WindowOptions) else read_tokens(text, tokenizer, seed)


def held(sizes: Sizes) -> float:
    """Bytes that any step holds: the libraries, and the larger of one block and what stands outside the blocks."""
    return IDLE_BYTES + max(sizes.block, sizes.outer) * sizes.itemsize


def changing_cost(model: ModelHandle, step: Step, sizes: Sizes, calibration: tuple[int, ...]) -> Cost:
    """Of a step that changes the model."""
    options, method = step.options, step.method
    n_tokens, length = calibration[0] * calibration[1], calibration[1]
    needs = method.needed(options)
    if isinstance(options, TrainingOptions):
        window = length * sizes.all * (FORWARD + FORWARD + BACKWARD)
        states = 16 if options.optimizer == "adamw" else 10  # with weights and gradients in float32
        memory = float(IDLE_BYTES + sizes.all * (2 * sizes.itemsize + states))
        memory += 4 * 4 * options.batch / options.accumulate * length * sizes.vocab
        written = options.generate * length * sizes.all * FORWARD * ALONE
        return Cost(step.key, options.steps * options.batch * window + written, memory, sizes.all * sizes.itemsize)
    if (method.kind, method.scope) == ("transform", "model"):
        return rotation_cost(step, sizes, calibration)
    passes = 0 if not (needs or method.scope in ("block", "cache", "inputs")) else 2
    twin = method.kind != "transform" and (method.scope == "block" or "drift" in needs)
    operations: float = (passes + twin) * n_tokens * sizes.blocks * FORWARD
    activations = float(2 + 2 * twin) * n_tokens * sizes.hidden * sizes.itemsize * bool(passes)
    if isinstance(options, Sequential) and options.true_sequential:
        activations += n_tokens * sizes.widest * sizes.itemsize
    memory = held(sizes) + sizes.block * sizes.itemsize * twin + activations
    if isinstance(options, BlockTuning):
        operations += model.n_blocks * options.steps * options.batch * length * sizes.block * (FORWARD + BACKWARD)
        memory += 16 * sizes.block
    if isinstance(options, Curvature) and "output_hessian" in needs:
        operations += options.gradient_tokens * sizes.all * (FORWARD + BACKWARD)
        memory += options.gradient_tokens * sizes.hidden * sizes.itemsize
    largest = 0
    if isinstance(options, Selection):
        for name in model.linear_names():
            if not options.is_ignored(name):
                out, columns = model.linear_shape(name)
                operations += linear_operations(step, out, columns, n_tokens)
                largest = max(largest, out * columns, *(columns**2 for _ in needs))
    return Cost(step.key, operations, memory + 5 * 4 * largest, changes_bytes(model, options, sizes))


def rotation_cost(step: Step, sizes: Sizes, calibration: tuple[int, ...]) -> Cost:
    """Of rotations of the whole model: products with each weight in float64, and what learning them takes before."""
    fold = FORWARD * sizes.all * sizes.hidden  # operations
    operations, memory = 2.0 * 2 * fold, held(sizes) + 3 * 8 * float(max(sizes.block, sizes.outer))
    if isinstance(options := step.options, LearnedRotations):
        tokens = options.batch * calibration[1]
        judged = (CHECKS + 1) * min(JUDGED, calibration[0]) * calibration[1]
        operations += options.steps * 3 * fold + (options.steps * tokens * (FORWARD + BACKWARD) + judged * FORWARD) * sizes.all
        memory += 3.0 * 4 * sizes.all + 4.0 * 4 * tokens * (sizes.vocab + sizes.widest * sizes.blocks / max(sizes.block, 1))
    return Cost(step.key, operations, memory, sizes.all * sizes.itemsize)


def changes_bytes(model: ModelHandle, options: Options, sizes: Sizes) -> float:
    """What a step's changes take in the run's folder; a search's outcome counts as four bits."""
    if not isinstance(options, SchemeSelection):
        return sizes.blocks * sizes.itemsize
    if options.scheme == "search":
        return sizes.blocks / 2
    chosen = {name: options.scheme_of(name) for name in model.linear_names()}
    return sum(stored_bytes(model.linear_shape(name), scheme.weights) for name, scheme in chosen.items() if scheme)


def linear_operations(step: Step, out: int, columns: int, n_tokens: int) -> float:
    """What one linear costs beside the text's way through its block."""
    method, needs = step.method, step.method.needed(step.options)
    total = float(ROUNDING * out * columns)
    if "hessian" in needs:
        total += n_tokens * columns**2 + 4 * columns**3 + 2 * out * columns**2
    if "output_hessian" in needs:
        total += n_tokens * out**2 + 4 * out**3 + 2 * columns * out**2
    return total + (0 if method.operations is None else method.operations(step.options, out, columns))


def search_cost(model: ModelHandle, step: Step, sizes: Sizes, calibration: tuple[int, ...]) -> Cost:
    """Of a search: every candidate is rounded, then its loss is found."""
    options = step.options
    assert isinstance(options, SearchOptions)
    n_tokens, n_candidates = calibration[0] * calibration[1], len(options.candidates)
    looked_at = min(options.samples, calibration[0]) * calibration[1]
    rounding = 2 * n_tokens * sizes.blocks * FORWARD
    for name in model.linear_names():
        out, columns = model.linear_shape(name)
        rounding += n_candidates * (ROUNDING * out * columns + 2 * out * columns**2) + n_tokens * columns**2
    n_passes = 3 if options.sensitivity == "gradient" else 1 + 4 * model.n_blocks * n_candidates / 2
    memory = held(sizes) + n_candidates * sizes.block * 2 + 3 * looked_at * sizes.hidden * sizes.itemsize
    return Cost(step.key, rounding + n_passes * looked_at * sizes.all * FORWARD, memory, n_candidates * sizes.blocks)


def evaluation_cost(step: Step, sizes: Sizes, n_subjects: int, shape: Sequence[int] | None) -> Cost:
    """Of one evaluate step for all it looks at; lm-eval's own text is not known beforehand, and only its memory is told."""
    if shape is None:
        return Cost(step.key, 0, IDLE_BYTES + sizes.all * sizes.itemsize, 0)
    n_tokens = shape[0] * shape[1]
    logits = 3 * 4 * shape[1] * sizes.vocab
    memory = held(sizes) + 3 * n_tokens * sizes.hidden * sizes.itemsize + logits + BATCH * shape[1] * sizes.widest * 4
    return Cost(step.key, n_subjects * n_tokens * sizes.all * FORWARD, memory, 0)


def rate_of(model: ModelHandle) -> float:
    """Operations a second of a matrix product in the model's dtype, on its device; takes half a second."""
    side = 1024
    a = torch.randn(side, side, dtype=model.dtype, device=model.device)
    begun, count = time.perf_counter(), 0
    while time.perf_counter() - begun < 0.5 or count < 3:
        a = (a @ a).clamp_(-1, 1)
        count += 1
    if a.is_cuda:
        torch.cuda.synchronize()
    return count * 2 * side**3 / (time.perf_counter() - begun)
