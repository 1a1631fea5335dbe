"""The blockwise driver: transform, quantize, prune and factorize, one decoder block in memory at a time.

For each block:  observe its linears' inputs -> the method -> install -> go on with the changed linears -> save.
With `true_sequential` one walk does it, linears that share an input at a time; without, one pass observes all linears as
they were and a second one carries the changed block's outputs on.
A transform of scope block leaves the model's function alone, so blocks after it are fed from the model before the step; a
quantizer or pruner changes it, and so does a transform of scope linear: they are fed from the changed blocks. Quantizers of
scope block, and methods that ask for the drift, also see what the model before the step has in the same place: a twin that
goes through the blocks beside the changing one.
Factorize makes up for what quantization took: it sees W - W^, W of the model as it was right before the quantize steps.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qtool.calibration.input_values import InputValues
from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRankSelection
from qtool.formats.scheme import InputSelection, SchemeSelection
from qtool.formats.sparsity import SharedSparsity
from qtool.model.handle import BATCH, Block, ModelHandle
from qtool.model.memory import large_pieces_returned
from qtool.model.store import save_changes
from qtool.options import Needs, Selection, require_matches
from qtool.pipeline.block_scope import (
    keep_cache_of,
    make_static,
    quantize_cache_of,
    quantize_inputs_of,
    round_attention_of,
    rounding_of,
    transform_block,
    tune_block,
)
from qtool.pipeline.curvature import curvature_of, discard_curvature, gather_curvature
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.linear_scope import change_block, choose_change, chosen_groups
from qtool.pipeline.shares import shares_of
from qtool.pipeline.twin import Twin
from qtool.pipeline.work import Work
from qtool.progress import Progress
from qtool.registry import Method


@large_pieces_returned()
def run_blockwise(
    model: ModelHandle,
    method: Method,
    options: Any,
    tokens: Tensor | None,
    seed: int,
    folder: StepFolder,
    progress: Progress,
    unquantized: ModelHandle | None = None,
) -> dict[str, Any]:
    """Carry one step through all blocks, going on after those that are done; returns linears and fallbacks.

    Factorize takes `unquantized`, the model as it was right before the quantize steps.
    """
    needs = method.needed(options)
    needs_inputs = bool(needs) or method.scope in ("block", "cache", "inputs")
    if needs_inputs and tokens is None:
        raise QtoolError(f"{method.key} needs calibration data; put a calibrate step before it")
    changes_function = method.kind != "transform" or method.scope == "linear"
    head = head_to_change(model, options) if isinstance(options, Selection) else None
    if unquantized is not None:
        head = check_quantized(model, method, options, head)
    if method.scope == "inputs" and head is not None:
        scheme = model.schemes().get(head)
        head = head if scheme is not None and scheme.activations is not None else None
    sees_outputs = tokens is not None and "output_hessian" in needs
    progress.stage(method.key, model.n_blocks + (head is not None) + (model.n_blocks + 1 if sees_outputs else 0))

    source = model if changes_function else before_step(model, folder)
    hidden = source.embed(tokens) if needs_inputs and tokens is not None else None
    twin = None
    if tokens is not None and changes_function and (method.scope == "block" or "drift" in needs):
        twin = Twin(before_step(model, folder), tokens)
    if sees_outputs and tokens is not None and not all(folder.unit(f"block_{i:03d}").is_file() for i in range(model.n_blocks)):
        gather_curvature(before_step(model, folder), options, tokens, seed, folder, progress)
    shares = shares_of(before_step(model, folder), options) if isinstance(options, SharedSparsity) else {}
    for index in range(model.n_blocks):
        unit = f"block_{index:03d}"
        is_done = folder.unit(unit).is_file()
        is_last = index == model.n_blocks - 1 and head is None
        if not is_done or (hidden is not None and not is_last):
            block = source.block(index)
            if is_done:
                assert hidden is not None
                hidden = block.forward(hidden)
                if twin is not None:
                    twin.forward(index)
            else:
                work = Work(source.unit_changes(unit))
                if not changes_function:
                    assert hidden is not None
                    hidden = transform_block(block, method, options, needs, hidden, seed, work)
                elif method.scope == "cache":
                    assert hidden is not None
                    hidden = quantize_cache_of(block, method, options, hidden, work)
                elif method.scope == "packed_cache":
                    keep_cache_of(block, options, work)
                elif method.scope == "attention":
                    round_attention_of(block, options, work)
                elif method.scope == "inputs":
                    assert hidden is not None
                    hidden = quantize_inputs_of(block, method, options, hidden, work)
                elif method.scope == "block":
                    assert hidden is not None and twin is not None
                    hidden = tune_block(block, method, options, hidden, twin, seed, work)
                else:
                    before = None if unquantized is None else unquantized.block(index)
                    groups = chosen_groups(block, options, hidden, only_quantized=before is not None)
                    curvature = curvature_of(folder, block) if sees_outputs else {}
                    change = choose_change(block, before, method, options, work, curvature, shares)
                    hidden = change_block(block, groups, options, needs, hidden, twin, change, is_last)
                    if unquantized is not None:
                        unquantized.release(index)
                folder.write_records(unit, {"linears": work.linears, "fallbacks": work.fallbacks})
                save_changes(folder.unit(unit), work.changes)
            source.release(index)
        progress.advance(f"{model.blocks_name}.{index}")
    if head is not None and not folder.unit("outer").is_file():
        change_head(model, unquantized, head, method, options, needs, hidden, twin, folder, shares)
        progress.advance(head)
    discard_curvature(folder)
    return collect(model, folder)


def before_step(model: ModelHandle, folder: StepFolder) -> ModelHandle:
    """The model as it was before this step."""
    return ModelHandle(model.options, tuple(path for path in model.changes if path != folder.path))


def collect(model: ModelHandle, folder: StepFolder) -> dict[str, Any]:
    """The records of all units of a finished step."""
    names = [*(f"block_{index:03d}" for index in range(model.n_blocks)), "outer"]
    records = [folder.records(name) for name in names if folder.unit(name).is_file()]
    return {
        "linears": [linear for record in records for linear in record["linears"]],
        "fallbacks": [text for record in records for text in record["fallbacks"]],
    }


def check_quantized(model: ModelHandle, method: Method, options: Selection, head: str | None) -> str | None:
    """The head where it is quantized too; raises QtoolError where no chosen linear is."""
    quantized = model.schemes()
    if not any(not options.is_ignored(name) for name in quantized):
        raise QtoolError(f"{method.key}: ignore leaves none of the {len(quantized)} quantized linears; choose fewer patterns")
    return head if head in quantized else None


def check_selection(model: ModelHandle, method: Method, options: Selection) -> None:
    """Raise QtoolError before any work: a pattern that matches nothing, columns that do not divide, more rank than there is."""
    names = model.linear_names()
    require_matches(method.key, options.patterns(), names)
    head = head_to_change(model, options)
    if head is not None and method.scope == "block":
        raise QtoolError(f"{method.key} works on blocks, and {head} stands outside them; add it to ignore")
    if isinstance(options, LowRankSelection):
        for name in names:
            most = min(model.linear_shape(name))
            if options.rank > most and not options.is_ignored(name):
                raise QtoolError(
                    f"{method.key}: {name}: rank {options.rank} is more than its {most}; use {most} or less, or ignore it"
                )
    if isinstance(options, SchemeSelection):
        for name in names:
            scheme = options.scheme_of(name)
            shape = model.linear_shape(name)
            if scheme is not None and shape[1] % scheme.weights.grid.width:
                raise QtoolError(
                    f"{method.key}: {name}: {shape[1]} columns do not divide into codes of {scheme.weights.grid.width}, which "
                    f"{scheme.weights.format} has; add it to ignore"
                )
            if scheme is not None and scheme.activations is not None and shape[1] % (scheme.activations.group or shape[1]):
                raise QtoolError(
                    f"{method.key}: {name}: {shape[1]} inputs do not divide into the groups of {scheme.activations.group} that "
                    f"{scheme.activations} has; add it to ignore, or to modules with another scheme"
                )
            if scheme is None or scheme.weights.group is None:
                continue
            divided = shape[1] if scheme.weights.group_along == "out_channel" else shape[0]
            if not divided % scheme.weights.group:
                continue
            fitting = [size for size in (32, 64, 128, 256) if divided % size == 0]
            advice = f"use {', '.join(map(str, fitting))}" if fitting else "leave the group away"
            raise QtoolError(
                f"{method.key}: {name}: {divided} {'columns' if divided == shape[1] else 'rows'} do not divide into groups "
                f"of {scheme.weights.group}; {advice}"
            )


def head_to_change(model: ModelHandle, options: Selection) -> str | None:
    """The output head's name where the options ask for it; raises QtoolError where it is tied to the embedding."""
    outside = [name for name in model.linear_names() if not name.startswith(f"{model.blocks_name}.")]
    chosen = [name for name in outside if not options.is_ignored(name)]
    if not chosen:
        return None
    if model.is_tied and isinstance(options, LowRankSelection):
        return None  # it is never quantized
    if model.is_tied:
        raise QtoolError(f"{chosen[0]} is tied to the embedding, which stays dense; add it to ignore")
    return chosen[0]


def change_head(
    model: ModelHandle,
    unquantized: ModelHandle | None,
    head: str,
    method: Method,
    options: Any,
    needs: Needs,
    hidden: Tensor | None,
    twin: Twin | None,
    folder: StepFolder,
    shares: Mapping[str, float],
) -> None:
    """The same for the output head, which stands outside the blocks."""
    work = Work(model.unit_changes("outer"))
    originals = [] if twin is None else inputs_of_head(twin.model, head, twin.hidden)
    inputs = [] if hidden is None else inputs_of_head(model, head, hidden)
    with contextlib.ExitStack() as stack:
        stack.enter_context(model.outer())
        outside, before, stats = Block(model, -1, model.model, ""), None, None
        if unquantized is not None:
            stack.enter_context(unquantized.outer())
            before = Block(unquantized, -1, unquantized.model, "")
        if isinstance(options, InputSelection):
            make_head_static(outside, head, inputs, method, options, work)
        else:
            if hidden is not None:
                stats = LayerStats(model.linear_shape(head)[1], needs, model.device)
                for place, x in enumerate(inputs):
                    stats.update(x, originals[place] if originals else None)
            choose_change(outside, before, method, options, work, shares=shares)((head,), stats)
    folder.write_records("outer", {"linears": work.linears, "fallbacks": work.fallbacks})
    save_changes(folder.unit("outer"), work.changes)


def make_head_static(
    outside: Block, head: str, inputs: list[Tensor], method: Method, options: InputSelection, work: Work
) -> None:
    """Give the output head, fed with inputs [batch, length, in], static scales."""
    rounding = rounding_of(outside, head)
    assert rounding is not None, f"{head}: run_blockwise has seen that its inputs are rounded"
    seen = InputValues(rounding.group)
    for x in inputs:
        seen.update(x)
    make_static(outside, (head,), seen, method, options, work)


def inputs_of_head(model: ModelHandle, head: str, hidden: Tensor) -> list[Tensor]:
    """What the output head is fed for the last block's output hidden, batch by batch [batch, length, in]."""
    found: list[Tensor] = []
    with model.outer():
        hook = model.model.get_submodule(head).register_forward_pre_hook(lambda module, args: found.append(args[0].cpu()))
        for batch in hidden.split(BATCH):
            model.logits(batch)
        hook.remove()
    return found
