"""The blockwise driver: transform, quantize, prune and factorize, one decoder block in memory at a time.

For each block:  observe its linears' inputs -> the method -> install -> go on with the changed linears -> save.
With `true_sequential` one walk does it, linears that share an input at a time; without, one pass observes all linears as
they were and a second one carries the changed block's outputs on.
A transform leaves the model's function alone, so blocks after it are fed from the model before the step; a quantizer or
pruner changes it, so they are fed from the changed blocks. Methods of scope block, and those that ask for the drift, also
see what the model before the step has in the same place: a twin that goes through the blocks beside the changing one.
Factorize makes up for what quantization took: it sees W - W^, W of the model as it was right before the quantize steps.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRankSelection
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import BATCH, Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.memory import large_pieces_returned, return_free_memory
from qtool.model.store import LOW_RANK, Changes, save_changes
from qtool.model.walk import Walk
from qtool.model.wiring import apply_edits, change_of_output, find_groups, find_scalings, oriented
from qtool.options import Needs, Selection, Sequential, require_matches
from qtool.pipeline.folder import StepFolder
from qtool.progress import Progress
from qtool.registry import Method

TRANSFORM_TOLERANCE = 1e-5  # of a block's float32 output, relative
Change = Callable[[tuple[str, ...], LayerStats | None], None]  # names of linears that share an input, its statistics


@dataclass
class Work:
    """What one unit (a block, or what stands outside the blocks) has come to."""

    changes: Changes
    linears: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def note(self, where: str) -> Callable[[str], None]:
        return lambda text: self.fallbacks.append(f"{where}: {text}")


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
    needs_inputs = bool(needs) or method.scope == "block"
    if needs_inputs and tokens is None:
        raise QtoolError(f"{method.key} needs calibration data; put a calibrate step before it")
    changes_function = method.kind != "transform"
    head = head_to_change(model, options) if isinstance(options, Selection) else None
    if unquantized is not None:
        head = check_quantized(model, method, options, head)
    progress.stage(method.key, model.n_blocks + (head is not None))

    source = model if changes_function else before_step(model, folder)
    hidden = source.embed(tokens) if needs_inputs and tokens is not None else None
    twin = None
    if tokens is not None and changes_function and (method.scope == "block" or "drift" in needs):
        twin = Twin(before_step(model, folder), tokens)
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
                    hidden = transform_block(block, method, options, needs, hidden, work)
                elif method.scope == "block":
                    assert hidden is not None and twin is not None
                    hidden = tune_block(block, method, options, hidden, twin, seed, work)
                else:
                    before = None if unquantized is None else unquantized.block(index)
                    groups = chosen_groups(block, options, hidden, only_quantized=before is not None)
                    change = choose_change(block, before, method, options, work)
                    hidden = change_block(block, groups, options, needs, hidden, twin, change, is_last)
                    if unquantized is not None:
                        unquantized.release(index)
                folder.write_records(unit, {"linears": work.linears, "fallbacks": work.fallbacks})
                save_changes(folder.unit(unit), work.changes)
            source.release(index)
        progress.advance(f"{model.blocks_name}.{index}")
    if head is not None and not folder.unit("outer").is_file():
        change_head(model, unquantized, head, method, options, needs, hidden, twin, folder)
        progress.advance(head)
    return collect(model, folder)


class Twin:
    """The model as it was before the step, with what its next block is fed."""

    def __init__(self, model: ModelHandle, tokens: Tensor) -> None:
        self.model = model
        self.hidden = model.embed(tokens)

    def forward(self, index: int) -> Tensor:
        """Go through block `index`; returns its output [samples, length, hidden]."""
        self.hidden = self.model.block(index).forward(self.hidden)
        self.model.release(index)
        return self.hidden

    @contextlib.contextmanager
    def walk(self, index: int, stops: list[str]) -> Iterator[Walk]:
        """A walk through block `index`, which takes `hidden` along."""
        with Walk(self.model.block(index), self.hidden, stops) as walk:
            yield walk
        self.model.release(index)


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
            if scheme is None or scheme.weights.group is None or not shape[1] % scheme.weights.group:
                continue
            fitting = [size for size in (32, 64, 128, 256) if shape[1] % size == 0]
            advice = f"use {', '.join(map(str, fitting))}" if fitting else "leave the group away"
            raise QtoolError(
                f"{method.key}: {name}: {shape[1]} columns do not divide into groups of {scheme.weights.group}; {advice}"
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


# ---- one block ----


def transform_block(block: Block, method: Method, options: Any, needs: Needs, hidden: Tensor, work: Work) -> Tensor:
    """Apply a transform's edits after checking that the block still computes the same; returns its output before them."""
    stats: dict[str, LayerStats] = {}
    observers = {}
    if needs:
        for group in find_groups(block, hidden[:1]):
            shared = LayerStats(shape_of(block.get(group.linears[0]))[1], needs, block.device)
            observers[group.linears[0]] = shared
            stats |= dict.fromkeys(group.linears, shared)
    after = block.forward_observed(hidden, observers)
    scalings = [s for s in find_scalings(block, hidden[:1]) if not needs or s.consumers[0] in stats]
    edits = method.run(block, scalings, stats, options, work.note(method.key))
    change = change_of_output(block, hidden[:1], edits)
    if not change <= TRANSFORM_TOLERANCE:
        raise QtoolError(
            f"{method.key}: {block.name}: the block's float32 output would change by {change:.1e}, more than "
            f"{TRANSFORM_TOLERANCE:.0e}; nothing was applied. The scales may be too extreme for this model: use a milder option"
        )
    apply_edits(block.module, block.name, edits)
    for name in edits:
        work.changes[name] = block.module.get_parameter(name.removeprefix(f"{block.name}.")).data
    return after


def choose_change(block: Block, before: Block | None, method: Method, options: Any, work: Work) -> Change:
    """What a step does to linears: with the block as it was `before` it was quantized, make up for that."""
    if before is None:
        return partial(change_linears, block, method=method, options=options, work=work)
    return partial(compensate_linears, block, before, method=method, options=options, work=work)


def change_block(
    block: Block,
    chosen: list[tuple[str, ...]],
    options: Any,
    needs: Needs,
    hidden: Tensor | None,
    twin: Twin | None,
    change: Change,
    is_last: bool,
) -> Tensor | None:
    """Change the chosen linears, those that share an input together; returns the block's new output."""
    groups = {names[0]: names for names in chosen}
    if hidden is None:
        for names in groups.values():
            change(names, None)
        return None
    stats = {name: LayerStats(shape_of(block.get(name))[1], needs, block.device) for name in groups}
    if not (isinstance(options, Sequential) and options.true_sequential):
        block.observe(hidden, stats)
        for name, names in groups.items():
            change(names, stats.pop(name))
        return None if is_last else block.forward(hidden)
    with contextlib.ExitStack() as stack:
        walk = stack.enter_context(Walk(block, hidden, list(groups)))
        beside = None if twin is None else stack.enter_context(twin.walk(block.index, list(groups)))
        for name, inputs, originals in side_by_side(walk, beside):
            while inputs:
                stats[name].update(inputs.pop(), originals.pop() if originals else None)
            return_free_memory()
            change(groups.pop(name), stats.pop(name))
        for name, names in groups.items():  # no sample came there
            change(names, stats.pop(name))
        return None if is_last else walk.finish()


def side_by_side(walk: Walk, beside: Walk | None) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Every stop of a walk with its inputs, and those of a second walk through the same stops."""
    if beside is None:
        for name, inputs in walk:
            yield name, inputs, []
        return
    for (name, inputs), (other, originals) in zip(walk, beside, strict=True):
        assert name == other, f"{name} and {other}: both walks call the same linears in the same order"
        yield name, inputs, originals


def tune_block(
    block: Block, method: Method, options: SchemeSelection, hidden: Tensor, twin: Twin, seed: int, work: Work
) -> Tensor:
    """Let a method of scope block quantize all of the block's linears together; returns the block's new output."""
    schemes = {name: scheme for name in block.linears() if (scheme := options.scheme_of(name)) is not None}
    begun = time.perf_counter()
    found = method.run(block, hidden, twin.forward(block.index), schemes, options, seed + block.index, work.note(block.name))
    seconds = (time.perf_counter() - begun) / max(len(found), 1)
    for name, tensor in found.items():
        layer = block.get(name)
        before = weight_of(layer)
        block.put(name, QuantLinear(tensor, getattr(layer, "bias", None), schemes[name].activations))
        work.changes[f"{name}.weight"] = (tensor, schemes[name])
        facts = errors(before, tensor.dequantize(), None)
        work.linears.append({"name": name, "scheme": str(schemes[name]), "seconds": seconds, **facts})
    return block.forward(hidden)


def chosen_groups(
    block: Block, options: Selection, hidden: Tensor | None, only_quantized: bool
) -> list[tuple[str, ...]]:
    """The names of linears to change, those with one input together; each alone where no input is at hand."""
    linears = block.linears()
    chosen = {name for name in linears if not options.is_ignored(name)}
    if only_quantized:
        chosen = {name for name in chosen if isinstance(linears[name], QuantLinear)}
    called = [] if hidden is None else [group.linears for group in find_groups(block, hidden[:1])]
    known = {name for names in called for name in names}
    groups = [*called, *((name,) for name in linears if name not in known)]
    kept = [tuple(name for name in names if name in chosen) for names in groups]
    return [names for names in kept if names]


def change_linears(
    block: Block, names: tuple[str, ...], stats: LayerStats | None, method: Method, options: Any, work: Work
) -> None:
    """Quantize or prune linears that share an input, in one call where the method works row by row."""
    batches: list[tuple[Scheme | None, list[str]]] = []
    for name in names:
        if isinstance(block.get(name), QuantLinear):
            raise QtoolError(f"{method.key}: {name} is quantized already; quantize once, and prune before it")
        scheme = options.scheme_of(name) if isinstance(options, SchemeSelection) else None
        if method.rowwise and batches and batches[-1][0] == scheme:
            batches[-1][1].append(name)
        else:
            batches.append((scheme, [name]))
    for scheme, members in batches:
        begun = time.perf_counter()
        n_rows, note = sum(shape_of(block.get(name))[0] for name in members), work.note(members[0])
        chosen = (options,) if scheme is None else (scheme.weights, options)
        # The method alone holds its copy of the weights [out of all, in], so it may write into them or let them go.
        try:
            result = method.run(torch.cat([weight_of(block.get(name)) for name in members]), stats, *chosen, note)
        except QtoolError as error:
            raise QtoolError(f"{method.key}: {members[0]}: {error}") from error
        seconds = time.perf_counter() - begun
        start = 0
        for name in members:
            layer = block.get(name)
            before = weight_of(layer)
            stop = start + len(before)
            if scheme is not None:
                part = result.rows(start, stop)
                block.put(name, QuantLinear(part, getattr(layer, "bias", None), scheme.activations))
                work.changes[f"{name}.weight"] = (part, scheme)
                after = part.dequantize()
            else:
                after = result[start:stop]
                weight = block.module.get_parameter(f"{name}.weight".removeprefix(f"{block.name}."))
                weight.data = oriented(layer, after).to(weight.dtype)
                work.changes[f"{name}.weight"] = weight.data
            work.linears.append(
                {
                    "name": name,
                    "scheme": str(scheme) if scheme is not None else f"sparse {float((after == 0).float().mean()):.2f}",
                    "seconds": seconds * (stop - start) / n_rows,
                    **errors(before, after, stats),
                }
            )
            start = stop
        return_free_memory()


def compensate_linears(
    block: Block,
    before: Block,
    names: tuple[str, ...],
    stats: LayerStats | None,
    method: Method,
    options: LowRankSelection,
    work: Work,
) -> None:
    """Put the factors of what quantization took from linears that share an input beside their codes."""
    for name in names:
        layer, original = block.get(name), before.get(name)
        assert isinstance(layer, QuantLinear), f"{name} is not quantized"
        if isinstance(original, QuantLinear):
            raise QtoolError(f"{method.key}: {name} was quantized before the last quantize steps began; add it to ignore")
        begun = time.perf_counter()
        W = weight_of(original)  # [out, in]
        try:
            found = method.run(W - weight_of(layer), stats, options, work.note(name))
        except QtoolError as error:
            raise QtoolError(f"{method.key}: {name}: {error}") from error
        low_rank = found.stored_in(options.dtype)
        changed = QuantLinear(layer.qt, layer.bias, layer.activations, low_rank)
        block.put(name, changed)
        work.changes[f"{name}{LOW_RANK}"] = low_rank
        stored = work.changes[f"{name}.weight"]
        assert isinstance(stored, tuple), f"{name} is quantized, so its change is one of codes"
        work.linears.append(
            {
                "name": name,
                "scheme": f"{stored[1]} + rank {low_rank.rank}",
                "seconds": time.perf_counter() - begun,
                **errors(W, weight_of(changed), stats),
            }
        )
    return_free_memory()


def errors(before: Tensor, after: Tensor, stats: LayerStats | None) -> dict[str, float | None]:
    """SQNR of the weights in dB, and the relative squared error of the outputs over the calibration tokens."""
    D = after.to(before.device) - before
    noise, signal = float(D.square().sum()), float(before.square().sum())
    sqnr = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
    relative = None
    if stats is not None and stats.has_hessian and stats.n_tokens:
        H = stats.hessian()
        power = float(((before @ H) * before).sum())
        relative = float(((D @ H) * D).sum()) / power if power > 0 else None
    return {"sqnr_db": sqnr, "relative_output_error": relative}


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
        if hidden is not None:
            stats = LayerStats(model.linear_shape(head)[1], needs, model.device)
            for place, x in enumerate(inputs):
                stats.update(x, originals[place] if originals else None)
        choose_change(outside, before, method, options, work)((head,), stats)
    folder.write_records("outer", {"linears": work.linears, "fallbacks": work.fallbacks})
    save_changes(folder.unit("outer"), work.changes)


def inputs_of_head(model: ModelHandle, head: str, hidden: Tensor) -> list[Tensor]:
    """What the output head is fed for the last block's output hidden, batch by batch [batch, length, in]."""
    found: list[Tensor] = []
    with model.outer():
        hook = model.model.get_submodule(head).register_forward_pre_hook(lambda module, args: found.append(args[0].cpu()))
        for batch in hidden.split(BATCH):
            model.logits(batch)
        hook.remove()
    return found
