"""The one training driver: AdamW, warm-up then cosine, accumulation, clipping, checkpoints that resume to the bit.

The student trains in float32 under bf16 autocast and is rounded to its own dtype at the end. What trains: every dense
parameter, the scales of quantized layers and, where asked for, their codes (see layers/learned_codes.py); weights that are
exactly zero stay zero, so a pruned pattern survives.
Step n always sees the same windows (a seeded order over the calibration tokens and those that the original wrote), so a run
that was killed and goes on from its last checkpoint ends with the same bits.
"""

import math
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.errors import QtoolError
from qtool.layers.learned_codes import LearnedCodes
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import carry_rotation
from qtool.model.handle import ModelHandle
from qtool.model.linear import is_linear
from qtool.model.store import Changes, save_changes, write_atomically
from qtool.options import TrainingOptions
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.generation import TOGETHER, write_windows
from qtool.progress import Progress
from qtool.registry import Method


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
    checkpoint = folder.path / "checkpoint.pt"
    batch = options.batch
    order = seeded_order(len(tokens) + options.generate, options.steps * batch, seed)
    with model.materialized() as student, teacher.materialized() as original:
        if options.generate:
            tokens = torch.cat([tokens, written_windows(original, tokens, options.generate, seed, folder, progress)])
        learned = learn_codes(method.key, student) if options.code_lr else {}
        names = {id(p): name for name, p in student.named_parameters()}
        stored_dtype = {name: p.dtype for name, p in student.named_parameters()}
        student.float()
        parameters = [p for p in student.parameters() if p.is_floating_point()]
        keep = {p: p != 0 for p in pruned_weights(student)}
        for p in parameters:
            p.requires_grad_(True)
        places = {id(layer.places) for layer in learned.values()}
        groups = [
            {"params": [p for p in parameters if id(p) not in places], "peak": options.lr},
            {"params": [p for p in parameters if id(p) in places], "peak": options.code_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay, betas=(0.9, 0.95))
        first, losses = 0, []
        if checkpoint.is_file():
            saved = torch.load(checkpoint, map_location=model.device, weights_only=True)
            student.load_state_dict(saved["student"])
            optimizer.load_state_dict(saved["optimizer"])
            first, losses = saved["step"], saved["losses"]
        for step in range(options.steps):
            if step < first:
                progress.advance()
                continue
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate_at(step, options)
            total = 0.0
            for rows in tokens[order[step * batch : (step + 1) * batch]].to(model.device).tensor_split(options.accumulate):
                with torch.autocast(model.device.type, torch.bfloat16):
                    with torch.no_grad():
                        target = original(rows, use_cache=False).logits
                    logits = student(rows, use_cache=False).logits
                loss = method.run(logits, target, options) * len(rows) / batch
                loss.backward()
                total += float(loss.detach())
            if not math.isfinite(total):
                raise QtoolError(f"{method.key}: the loss is {total} at step {step}; lower lr (now {options.lr})")
            torch.nn.utils.clip_grad_norm_(parameters, options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for p, mask in keep.items():
                    p.mul_(mask)
            losses.append(total)
            progress.advance(f"loss {total:.4f}")
            if (step + 1) % options.checkpoint_every == 0 and step + 1 < options.steps:
                state = {
                    "step": step + 1,
                    "losses": losses,
                    "student": student.state_dict(),
                    "optimizer": optimizer.state_dict(),
                }
                write_atomically(checkpoint, lambda path, state=state: torch.save(state, path))  # type: ignore[misc]
        for p in parameters:
            p.requires_grad_(False)
        for name, p in student.named_parameters():
            p.data = p.data.to(stored_dtype[name])
        for name, layer in learned.items():
            put(student, name, layer.quantized())
        save_units(model, student, {names[id(p)] for p in parameters}, folder)
    checkpoint.unlink(missing_ok=True)
    (folder.path / "written.safetensors").unlink(missing_ok=True)
    return {"losses": losses, "linears": [], "fallbacks": []}


def written_windows(
    original: PreTrainedModel, tokens: Tensor, count: int, seed: int, folder: StepFolder, progress: Progress
) -> Tensor:
    """`write_windows`, kept with the step, so that a run that goes on trains on the same text."""
    path = folder.path / "written.safetensors"
    if path.is_file():
        for _ in range(0, count, TOGETHER):
            progress.advance()
        return load_file(path)["tokens"]
    found = write_windows(original, tokens, count, seed, progress)
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


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` stand at a full name; it rotates its input where what stood there did."""
    carry_rotation(model.get_submodule(name), layer)
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, layer)


def seeded_order(n_windows: int, n_needed: int, seed: int) -> Tensor:
    """Indices [n_needed] of windows: shuffled passes over all of them, one after the other."""
    generator = torch.Generator().manual_seed(seed)
    passes = math.ceil(n_needed / n_windows) if n_needed else 1
    return torch.cat([torch.randperm(n_windows, generator=generator) for _ in range(passes)])[:n_needed]


def rate_at(step: int, options: TrainingOptions) -> float:
    """Share of the peak rate at a step: linear warm-up, then cosine to zero at the end."""
    warm = options.warmup * options.steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (options.steps - warm)))


def pruned_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of dense linears that hold exact zeros."""
    weights = [module.weight for module in model.modules() if is_linear(module) and not isinstance(module, QuantLinear)]
    return [w for w in weights if isinstance(w, nn.Parameter) and bool((w == 0).any())]


def save_units(model: ModelHandle, student: nn.Module, trained: set[str], folder: StepFolder) -> None:
    """Write the trained parameters as changes of their units, codes of quantized layers with their new scales."""
    schemes = model.schemes()
    for index in [*range(model.n_blocks), -1]:
        unit = "outer" if index < 0 else f"block_{index:03d}"
        prefix = f"{model.blocks_name}.{index}."
        changes: Changes = model.unit_changes(unit)
        for name, p in student.named_parameters():
            inside = not name.startswith(f"{model.blocks_name}.") if index < 0 else name.startswith(prefix)
            layer = student.get_submodule(name.rpartition(".")[0])
            if not inside or name not in trained:
                continue
            if isinstance(layer, QuantLinear) and name.endswith(".scale"):
                linear = name.removesuffix(".scale")
                changes[f"{linear}.weight"] = (layer.qt, schemes[linear])
            else:
                changes[name] = p.data
        save_changes(folder.unit(unit), changes)
