"""What a step does to linears, those that share an input at a time: quantize, prune, reshape, make up for quantization."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRankSelection
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import with_common_scale
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import Block
from qtool.model.linear import shape_of, weight_of
from qtool.model.memory import return_free_memory
from qtool.model.store import LOW_RANK
from qtool.model.walk import Walk
from qtool.model.wiring import find_groups, oriented
from qtool.options import Needs, Selection, Sequential
from qtool.pipeline.twin import Twin
from qtool.pipeline.work import Work, errors
from qtool.registry import Method

Change = Callable[[tuple[str, ...], LayerStats | None], None]  # names of linears that share an input, its statistics


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


def choose_change(
    block: Block,
    before: Block | None,
    method: Method,
    options: Any,
    work: Work,
    curvature: Mapping[str, Tensor] | None = None,
    shares: Mapping[str, float] | None = None,
) -> Change:
    """What a step does to linears: with the block as it was `before` it was quantized, make up for that.

    curvature: the output_hessian [out, out] of linears by name, where the method asks for it.
    shares: the sparsity of linears by name, where it is not the one that the options state.
    """
    if before is None:
        return partial(
            change_linears, block, method=method, options=options, work=work, curvature=curvature or {}, shares=shares or {}
        )
    return partial(compensate_linears, block, before, method=method, options=options, work=work)


def chosen_groups(block: Block, options: Selection, hidden: Tensor | None, only_quantized: bool) -> list[tuple[str, ...]]:
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


def side_by_side(walk: Walk, beside: Walk | None) -> Iterator[tuple[str, list[Tensor], list[Tensor]]]:
    """Every stop of a walk with its inputs, and those of a second walk through the same stops."""
    if beside is None:
        for name, inputs in walk:
            yield name, inputs, []
        return
    for (name, inputs), (other, originals) in zip(walk, beside, strict=True):
        assert name == other, f"{name} and {other}: both walks call the same linears in the same order"
        yield name, inputs, originals


def change_linears(
    block: Block,
    names: tuple[str, ...],
    stats: LayerStats | None,
    method: Method,
    options: Any,
    work: Work,
    curvature: Mapping[str, Tensor],
    shares: Mapping[str, float],
) -> None:
    """Quantize, prune or reshape linears that share an input, in one call where the method works row by row."""
    batches: list[tuple[Scheme | None, Any, list[str]]] = []
    for name in names:
        if isinstance(block.get(name), QuantLinear):
            raise QtoolError(f"{method.key}: {name} is quantized already; quantize once, and prune before it")
        scheme = options.scheme_of(name) if isinstance(options, SchemeSelection) else None
        is_rowwise = method.rowwise and (scheme is None or scheme.weights.is_rowwise)
        own = options.model_copy(update={"sparsity": shares[name]}) if name in shares else options
        if is_rowwise and batches and batches[-1][:2] == (scheme, own):
            batches[-1][2].append(name)
        else:
            batches.append((scheme, own, [name]))
    for scheme, own, members in batches:
        begun = time.perf_counter()
        n_rows, note = sum(shape_of(block.get(name))[0] for name in members), work.note(members[0])
        seen = stats if stats is None else stats.of_output(curvature.get(members[0]))
        chosen = (own,) if scheme is None else (method.asked_of(scheme), own)
        # The method alone holds its copy of the weights [out of all, in], so it may write into them or let them go.
        try:
            result = method.run(torch.cat([weight_of(block.get(name)) for name in members]), seen, *chosen, note)
        except QtoolError as error:
            raise QtoolError(f"{method.key}: {members[0]}: {error}") from error
        seconds = time.perf_counter() - begun
        if scheme is not None:  # a method may choose, say, the group
            result, scheme = method.found_by(result, scheme)
        start = 0
        for name in members:
            layer = block.get(name)
            before = weight_of(layer)
            stop = start + len(before)
            if scheme is not None:
                part = result if len(members) == 1 else result.rows(start, stop)
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
                    "scheme": str(scheme) if scheme is not None else in_words(method, after),
                    "seconds": seconds * (stop - start) / n_rows,
                    **errors(before, after, stats),
                }
            )
            start = stop
        return_free_memory()
    share_tensor_scales(block, names, work)


def share_tensor_scales(block: Block, names: tuple[str, ...], work: Work) -> None:
    """Give linears that share an input one scale of the tensor, which runtimes that join them want; no weight changes."""
    changed = [(name, value) for name in names if isinstance(value := work.changes.get(f"{name}.weight"), tuple)]
    for scheme in {scheme for _, (_, scheme) in changed if scheme.weights.scale_dtype == "float8_e4m3fn"}:
        members = {name: tensor for name, (tensor, own) in changed if own == scheme}
        if len({tensor.of_tensor for tensor in members.values()}) == 1:
            continue
        common = with_common_scale(list(members.values()))
        if common is None:
            work.note(names[0])("no one scale of a tensor holds those of all linears that share its input; each has its own")
            continue
        for name, tensor in zip(members, common, strict=True):
            layer = block.get(name)
            block.put(name, QuantLinear(tensor, getattr(layer, "bias", None), scheme.activations))
            work.changes[f"{name}.weight"] = (tensor, scheme)


def in_words(method: Method, after: Tensor) -> str:
    """What stands for the scheme of a linear that keeps its dtype."""
    return f"sparse {float((after == 0).float().mean()):.2f}" if method.kind == "prune" else "dense"


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
        changed = QuantLinear(layer.qt, layer.bias, layer.activations, low_rank, layer.inputs)
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
