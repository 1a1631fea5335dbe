"""The one training driver: AdamW, a schedule of rates, accumulation, clipping, checkpoints that resume to the bit.

    step n:  gradients of  labels CE + (1 - labels) L(student, target)  over one batch;  AdamW;  zeros are made zero again
The student trains in float32 under bf16 autocast and is rounded to its own dtype at the end. What trains: every dense
parameter, the scales of quantized layers and, where asked for, their codes (see layers/learned_codes.py), unless the method's
course says otherwise (see model/course.py); weights that are exactly zero stay zero, so a pruned pattern survives.
Step n always sees the same windows (a seeded order over the calibration tokens and those that the original wrote), so a run
that was killed and goes on from its last checkpoint ends with the same bits.
Several processes share each batch: a loss's student is cut into parts (FSDP), that of a course is whole in each, because
courses look at whole matrices. Every step is one line of events.jsonl.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import PreTrainedModel

from qtool.errors import QtoolError
from qtool.formats.target import Target
from qtool.layers.learned_codes import LearnedCodes
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.trained_linear import trained_linears
from qtool.linalg.adamw8bit import AdamW8bit
from qtool.linalg.divergence import distillation_loss
from qtool.model.course import Course, Trainee, merge, put
from qtool.model.handle import BATCH, ModelHandle
from qtool.model.linear import is_linear
from qtool.model.store import Changes, save_changes, write_atomically
from qtool.options import Selection, TrainingOptions
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.generation import TOGETHER, write_windows
from qtool.pipeline.ranks import Ranks, asked_for, full_state, restore_state, shard, unshard
from qtool.pipeline.targets import Kept, Live, Targets, digest_targets, in_memory, keep
from qtool.progress import Progress
from qtool.registry import Method

NO_LABEL = -100  # cross_entropy's own mark of a position without one


def run_training(
    model: ModelHandle,
    teacher: ModelHandle,
    method: Method,
    options: TrainingOptions,
    tokens: Tensor,
    seed: int,
    folder: StepFolder,
    progress: Progress,
) -> dict[str, Any]:
    """Train the model on the loss of `method`; writes every unit's changes and returns the curve of losses."""
    progress.stage(method.key, options.steps + -(-options.generate // TOGETHER))
    ranks, notes = asked_for(), list[str]()
    check_windows(method.key, options, tokens, ranks)
    if ranks.size > 1:  # cutting a model into parts leaves its mark on the handle's skeleton
        model, teacher = ModelHandle(model.options, model.changes), ModelHandle(teacher.options, teacher.changes)
    with contextlib.ExitStack() as stack:
        student = stack.enter_context(model.materialized())
        with contextlib.ExitStack() as beside:
            original = beside.enter_context(in_memory(teacher, options))
            windows = all_windows(original, tokens, options, seed, folder, progress, ranks)
            if options.cache is not None and original is not None:
                kept = Path(options.cache) / digest_targets(teacher, windows, options)
                if ranks.is_first:
                    keep(teacher, original, windows, kept, options)
                ranks.wait()
                targets: Targets = Kept(kept)
            else:
                targets = Live(original, options)
                stack.enter_context(beside.pop_all())
        learned = learn_codes(method.key, student) if options.code_lr else {}
        dtypes = {name: p.dtype for name, p in student.named_parameters()}
        before = dict(student.named_modules())
        student.float()
        zeros = pruned_weights(student)
        if options.start == "random":
            masks = {name: student.get_parameter(name) != 0 for name in zeros}
            draw_anew(method.key, student, seed)
            for name, mask in masks.items():
                student.get_parameter(name).data.mul_(mask)
        course, chosen = Course(), tuple[str, ...]()
        if method.scope == "course":
            chosen = chosen_linears(method.key, model, student, options) if isinstance(options, Selection) else ()
            trainee = Trainee(
                student,
                None if options.cache is not None else cast(PreTrainedModel | None, original),
                (model.block_modules(), teacher.block_modules()),
                chosen,
                options.steps,
                seed,
                notes.append,
                lambda new: setattr(targets, "model", new),
                windows[len(windows) - options.validation :],
                windows[: len(windows) - options.validation],
                model,
            )
            course = method.run(trainee, options)
            lost = sorted({f"{name}.weight" for name, _ in trained_linears(student)} & set(zeros))
            if lost:
                notes.append(f"zeros do not stay where weights are made of other numbers: {lost[0]} ({len(lost)} linears)")
        if options.recompute:
            stack.enter_context(recomputing(model.block_modules()))
        training = Training(student, targets, method, course, options, windows, seed, folder, ranks, progress)
        if ranks.size > 1 and method.scope == "training":
            shard(student, model.block_modules(), model.device)
            if isinstance(targets, Live) and targets.model is not None:
                shard(targets.model, teacher.block_modules(), model.device)
            training.is_sharded = True
        training.prepare({id(layer.places) for layer in learned.values()}, zeros)
        training.carry_out()
        unshard(student)
        words = course.finish()
        merge(student, before)
        for p in student.parameters():
            p.requires_grad_(False)
        for name, p in student.named_parameters():
            if name in dtypes:
                p.data = p.data.to(dtypes[name])
        for name, layer in learned.items():
            put(student, name, layer.quantized())
        if ranks.is_first:
            save_units(model, student, course, folder)
    for name in ("checkpoint.pt", "best.pt", "written.safetensors"):
        if ranks.is_first:
            (folder.path / name).unlink(missing_ok=True)
    linears = [
        {"name": name, "scheme": words[name], "seconds": 0.0, "sqnr_db": None, "relative_output_error": None} for name in words
    ]
    return {
        "losses": training.losses,
        "validation": training.validation,
        "linears": linears,
        "fallbacks": [f"{method.key}: {note}" for note in notes],
    }


class Training:
    """A student on its way: what a checkpoint holds, and how one step is made."""

    def __init__(
        self,
        student: PreTrainedModel,
        targets: Targets,
        method: Method,
        course: Course,
        options: TrainingOptions,
        windows: Tensor,
        seed: int,
        folder: StepFolder,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.student, self.targets, self.method, self.course, self.options = student, targets, method, course, options
        self.windows, self.folder, self.ranks, self.progress = windows, folder, ranks, progress
        self.order = seeded_order(len(windows) - options.validation, options.steps * options.batch, seed)
        self.device = student.device
        self.is_sharded = False
        self.phase = self.step = 0
        self.losses: list[float] = []
        self.validation: list[dict[str, float]] = []

    def prepare(self, places: set[int], pruned: list[str]) -> None:
        """Choose what trains, mark the zeros that stay in the weights of these names, and take up a checkpoint."""
        options, extra = self.options, self.course.extra
        every = [p for p in self.student.parameters() if p.is_floating_point()]
        trained = every if self.course.trained is None else list(self.course.trained)
        self.parameters = trained + ([] if extra is None else list(extra.parameters()))
        for p in every:
            p.requires_grad_(False)
        for p in self.parameters:
            p.requires_grad_(True)
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.parameters if id(p) not in places], "peak": options.lr},
            {"params": [p for p in self.parameters if id(p) in places], "peak": options.code_lr, "weight_decay": 0.0},
        ]
        self.groups = [group for group in groups if group["params"]]
        named = dict(self.student.named_parameters())
        self.keep = {named[name]: named[name].detach() != 0 for name in pruned if name in named}
        phased = self.course.phases > 1 and self.course.trained is None
        self.start = {name: value.clone() for name, value in self.student.state_dict().items()} if phased else {}
        self.begin_phase()
        checkpoint = self.folder.path / "checkpoint.pt"
        if checkpoint.is_file():
            saved = torch.load(checkpoint, map_location=self.device, weights_only=True)
            restore_state(self.student, self.optimizer, saved, self.is_sharded)
            for name, value in self.course.state.items():
                value.copy_(saved["state"][name])
            if extra is not None:
                extra.load_state_dict(saved["extra"])
            self.phase, self.step = saved["phase"], saved["step"]
            self.losses, self.validation = saved["losses"], saved["validation"]

    def begin_phase(self) -> None:
        """A fresh optimizer, and with several phases the student as it was at first."""
        if self.phase and self.start:
            self.student.load_state_dict(self.start)
        groups = [{**group, "params": list(group["params"])} for group in self.groups]
        decay, betas = self.options.weight_decay, (0.9, 0.95)
        self.optimizer: torch.optim.Optimizer
        if self.options.optimizer == "adamw8bit":
            self.optimizer = AdamW8bit(groups, weight_decay=decay, betas=betas)
        else:  # one kernel for all parameters, where there are such
            fused = True if self.device.type == "cuda" else None
            self.optimizer = torch.optim.AdamW(groups, weight_decay=decay, betas=betas, fused=fused)

    def carry_out(self) -> None:
        """All steps of all phases, from where the checkpoint stands."""
        first, resumed = self.phase, self.step
        for phase in range(first, self.course.phases):
            if self.course.phases > 1:
                self.progress.stage(f"{self.method.key} {phase + 1} of {self.course.phases}", self.options.steps)
            if phase > first:
                self.course.between(phase)
                self.phase = phase
                self.begin_phase()
            self.course.begin(phase)
            for step in range(self.options.steps):
                if phase == first and step < resumed:
                    self.progress.advance()
                    continue
                self.carry_out_step(step)
                if self.options.validation and self.is_measured(step) and self.measure(step):
                    break
                is_last = step + 1 == self.options.steps and phase + 1 == self.course.phases
                if (
                    self.step % self.options.checkpoint_every == 0 and not is_last
                ):  # after the measurement, which is a part of it
                    self.save(self.folder.path / "checkpoint.pt")

    def carry_out_step(self, step: int) -> None:
        """Gradients, one update, zeros, one line of events."""
        options, begun = self.options, time.perf_counter()
        rate = rate_at(step, options)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        self.course.before_step(step)
        total = self.course.gradients(step, lambda: self.backward(step))
        if not math.isfinite(total):
            raise QtoolError(f"{self.method.key}: the loss is {total} at step {step}; lower lr (now {options.lr})")
        for p, mask in self.course.masks.items():
            if p.grad is not None:
                p.grad.mul_(mask)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, options.clip)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.make_zeros()
        self.course.after_step(step)
        self.losses.append(total)
        self.progress.advance(f"loss {total:.4f}")
        self.step = step + 1
        if self.ranks.is_first:
            self.folder.run.event(
                "training",
                key=self.method.key,
                phase=self.phase,
                step=step,
                loss=total,
                rate=rate,
                gradient_norm=float(norm),
                seconds=round(time.perf_counter() - begun, 4),
            )

    @torch.no_grad()
    def make_zeros(self) -> None:
        """Zero what pruning made zero, and what the course masks with its moments."""
        for p, mask in self.keep.items():
            p.mul_(mask)
        for p, mask in self.course.masks.items():
            p.mul_(mask)
            for name in ("exp_avg", "exp_avg_sq"):  # a weight that comes back begins without a past
                if name in self.optimizer.state[p]:
                    self.optimizer.state[p][name].mul_(mask)

    def backward(self, step: int) -> float:
        """Add the gradients of one batch; returns its loss, of all processes, without the course's penalty."""
        batch = self.options.batch
        places = self.ranks.share(self.order[step * batch : (step + 1) * batch])
        total = 0.0
        for part in places.tensor_split(self.options.accumulate):
            if len(part):
                loss = self.loss(part) * len(part) / batch
                penalty = self.course.penalty()
                whole = loss if penalty is None else loss + penalty * len(part) / batch
                (whole * self.ranks.size if self.is_sharded else whole).backward()  # FSDP takes the mean of all
                total += float(loss.detach())
        if not self.is_sharded:
            self.ranks.add_gradients(self.parameters)
        return self.ranks.add(total, self.device)

    def loss(self, places: Tensor) -> Tensor:
        """The mean loss over windows, by their indices."""
        rows = self.windows[places].to(self.device)  # [batch, length]
        told = self.course.share()
        share = self.options.labels if told is None else told
        target = self.targets.of(places, rows) if share < 1 else None
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.course.logits(self.student, rows)
        labels = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], NO_LABEL)], dim=1)  # [batch, length]
        if target is None:
            return cross_entropy(logits, labels)
        loss = self.compare(logits, target, labels)
        return loss if share == 0 else share * cross_entropy(logits, labels) + (1 - share) * loss

    def compare(self, logits: Tensor, target: Target, labels: Tensor) -> Tensor:
        """What the method makes of the student's logits and the target."""
        if self.method.scope == "training":
            loss: Tensor = self.method.run(logits, target, labels, self.options)
            return loss
        if self.course.loss is not None:
            return self.course.loss(logits, target, labels)
        return distillation_loss(logits, target, self.options.temperature)

    def is_measured(self, step: int) -> bool:
        return (step + 1) % self.options.validate_every == 0 or step + 1 == self.options.steps

    @torch.no_grad()
    def measure(self, step: int) -> bool:
        """The loss on the windows held out; whether to end here, with the best weights put back."""
        n, best_path = self.options.validation, self.folder.path / "best.pt"
        held = self.ranks.share(torch.arange(len(self.windows) - n, len(self.windows)))
        parts = [float(self.loss(part)) * len(part) for part in held.split(BATCH)]
        found = self.ranks.add(sum(parts), self.device) / n
        earlier = [row["loss"] for row in self.validation if row["phase"] == self.phase]
        self.validation.append({"phase": self.phase, "step": step, "loss": found})
        if self.ranks.is_first:
            self.folder.run.event("validation", key=self.method.key, phase=self.phase, step=step, loss=found)
        if self.options.patience is None:
            return False
        if not earlier or found < min(earlier):
            self.save(best_path)
            return False
        waited = len(earlier) - earlier.index(min(earlier))
        is_over = waited >= self.options.patience
        if is_over or step + 1 == self.options.steps:
            saved = torch.load(best_path, map_location=self.device, weights_only=True)
            restore_state(self.student, self.optimizer, saved, self.is_sharded)
        return is_over

    def save(self, path: Path) -> None:
        """All that a run which was killed goes on with."""
        state = full_state(self.student, self.optimizer, self.is_sharded) | {
            "phase": self.phase,
            "step": self.step,
            "losses": self.losses,
            "validation": self.validation,
            "state": self.course.state,
            "extra": {} if self.course.extra is None else self.course.extra.state_dict(),
        }
        if self.ranks.is_first:
            write_atomically(path, lambda temporary: torch.save(state, temporary))
        self.ranks.wait()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of logits [..., vocab] and the text's next tokens [...], in nats per token."""
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=NO_LABEL)


def check_windows(where: str, options: TrainingOptions, tokens: Tensor, ranks: Ranks) -> None:
    """Raise QtoolError where too few windows are left to train on, or a process would see none."""
    if options.validation >= len(tokens):
        raise QtoolError(
            f"{where}: validation holds out {options.validation} of {len(tokens)} calibration windows; leave some to train on"
        )
    if options.batch < ranks.size:
        raise QtoolError(f"{where}: batch {options.batch} is less than one window for each of {ranks.size} processes; raise it")


def all_windows(
    original: nn.Module | None,
    tokens: Tensor,
    options: TrainingOptions,
    seed: int,
    folder: StepFolder,
    progress: Progress,
    ranks: Ranks,
) -> Tensor:
    """Windows [samples, length]: those of the text, those that the original writes, and last those that are held out."""
    kept, held = tokens[: len(tokens) - options.validation], tokens[len(tokens) - options.validation :]
    if not options.generate:
        return tokens
    assert isinstance(original, PreTrainedModel), "in_memory loads the original where it is to write"
    return torch.cat([kept, written_windows(original, kept, options.generate, seed, folder, progress, ranks), held])


@contextlib.contextmanager
def recomputing(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, blocks keep their inputs alone and are called again on the way back."""

    def wrap(forward: Any) -> Any:
        return lambda *args, **kwargs: recomputed(forward, *args, use_reentrant=False, **kwargs)

    for block in blocks:
        block.forward = wrap(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def draw_anew(where: str, student: PreTrainedModel, seed: int) -> None:
    """Draw every parameter as the architecture's own first weights are."""
    for name, module in student.named_modules():
        if isinstance(module, (QuantLinear, LearnedCodes)):
            raise QtoolError(f"{where}: start: random: {name} is quantized; train from scratch first, then quantize")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module in student.modules():
            student._init_weights(module)


def chosen_linears(where: str, model: ModelHandle, student: nn.Module, options: Selection) -> tuple[str, ...]:
    """Names of the linears that the options choose; raises QtoolError for one that is quantized or tied."""
    names = tuple(name for name in model.linear_names() if not options.is_ignored(name))
    for name in names:
        if isinstance(student.get_submodule(name), QuantLinear):
            raise QtoolError(f"{where}: {name} is quantized already; quantize after it, or add it to ignore")
        if model.is_tied and not name.startswith(f"{model.blocks_name}."):
            raise QtoolError(f"{where}: {name} is tied to the embedding, which stays as it is; add it to ignore")
    if not names:
        raise QtoolError(f"{where}: ignore leaves no linear to work on")
    return names


def written_windows(
    original: PreTrainedModel,
    tokens: Tensor,
    count: int,
    seed: int,
    folder: StepFolder,
    progress: Progress,
    ranks: Ranks,
) -> Tensor:
    """`write_windows`, kept with the step, so that a run that goes on trains on the same text."""
    path = folder.path / "written.safetensors"
    if path.is_file():
        for _ in range(0, count, TOGETHER):
            progress.advance()
        return load_file(path)["tokens"]
    found = write_windows(original, tokens, count, seed, progress)
    if ranks.is_first:
        write_atomically(path, lambda temporary: save_file({"tokens": found}, temporary))
    return found


def learn_codes(where: str, student: nn.Module) -> dict[str, LearnedCodes]:
    """Put a layer whose codes learn in place of every quantized one; raises QtoolError for codes that cannot."""
    found = {name: module for name, module in student.named_modules() if isinstance(module, QuantLinear)}
    if not found:
        raise QtoolError(f"{where}: code_lr: no linear is quantized; put a quantize step before it, or leave code_lr away")
    for name, layer in found.items():
        if not layer.qt.is_plain or layer.low_rank is not None or layer.scheme.grid.width > 1:
            raise QtoolError(
                f"{where}: {name}: {layer.scheme}: codes learn where scales and zero points are all that stands beside them; "
                "leave code_lr away"
            )
        put(student, name, LearnedCodes(layer))
    return {name: module for name, module in student.named_modules() if isinstance(module, LearnedCodes)}


def seeded_order(n_windows: int, n_needed: int, seed: int) -> Tensor:
    """Indices [n_needed] of windows: shuffled passes over all of them, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(n_needed / n_windows) if n_needed else 1
    return torch.cat([torch.randperm(n_windows, generator=generator) for _ in range(passes)])[:n_needed]


def rate_at(step: int, options: TrainingOptions) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine to zero, or level and at the end linear to zero."""
    warm, n = options.warmup * options.steps, options.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    if options.schedule == "wsd":
        return min(1.0, (n - step) / (options.decay * n + 1))
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (n - warm)))


def pruned_weights(model: nn.Module) -> list[str]:
    """Names of the weights of dense linears that hold exact zeros."""
    dense = [(f"{name}.weight", x) for name, x in model.named_modules() if is_linear(x) and not isinstance(x, QuantLinear)]
    return [name for name, x in dense if isinstance(x.weight, nn.Parameter) and bool((x.weight == 0).any())]


def save_units(model: ModelHandle, student: nn.Module, course: Course, folder: StepFolder) -> None:
    """Write the parameters as changes of their units, codes of quantized layers with their scales."""
    schemes = model.schemes() | course.schemes
    for index in [*range(model.n_blocks), -1]:
        unit = "outer" if index < 0 else f"block_{index:03d}"
        prefix = f"{model.blocks_name}.{index}."
        changes: Changes = model.unit_changes(unit)
        for name, p in student.named_parameters():
            inside = not name.startswith(f"{model.blocks_name}.") if index < 0 else name.startswith(prefix)
            layer = student.get_submodule(name.rpartition(".")[0])
            if not inside or not p.is_floating_point():
                continue
            if isinstance(layer, QuantLinear) and name.endswith(".scale"):
                linear = name.removesuffix(".scale")
                changes[f"{linear}.weight"] = (layer.qt, schemes[linear])
            else:
                changes[name] = p.data
        save_changes(folder.unit(unit), changes)
