"""What a step does to a whole block at once: transforms, and quantizers of scope block."""

import time
from typing import Any

from torch import Tensor

from qtool.calibration.input_values import InputValues
from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme
from qtool.formats.kv_cache import CacheScales
from qtool.formats.scheme import ActivationScheme, InputSelection, Scheme, SchemeSelection
from qtool.layers.kv_cache import CacheObserver, attentions_of, pass_through, quantize_cache
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import Block
from qtool.model.linear import shape_of, weight_of
from qtool.model.rounded_attention import quantize_by_kivi, round_attention
from qtool.model.store import INPUTS, ROUNDING
from qtool.model.wiring import apply_edits, change_of_output, find_groups, find_scalings
from qtool.options import Needs
from qtool.pipeline.linear_scope import chosen_groups, share_tensor_scales
from qtool.pipeline.twin import Twin
from qtool.pipeline.work import Work, errors
from qtool.registry import Method

TRANSFORM_TOLERANCE = 1e-5  # of a block's float32 output, relative


def transform_block(block: Block, method: Method, options: Any, needs: Needs, hidden: Tensor, seed: int, work: Work) -> Tensor:
    """Apply a transform's edits after checking that the block still computes the same; returns its output before them.

    A transform that needs `inputs` sees the block's own and its output, the others statistics of its linears' inputs.
    """
    note = work.note(method.key)
    if "inputs" in needs:
        after, scalings = block.forward(hidden), find_scalings(block, hidden[:1])
        edits = method.run(block, scalings, hidden, after, options, seed + block.index, note)
    else:
        after, stats = observe_linears(block, needs, hidden)
        scalings = [s for s in find_scalings(block, hidden[:1]) if not needs or s.consumers[0] in stats]
        edits = method.run(block, scalings, stats, options, note)
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


def observe_linears(block: Block, needs: Needs, hidden: Tensor) -> tuple[Tensor, dict[str, LayerStats]]:
    """The block's output and, by full name, statistics of its linears' inputs; those that share one share them."""
    stats: dict[str, LayerStats] = {}
    observers = {}
    if needs:
        for group in find_groups(block, hidden[:1]):
            shared = LayerStats(shape_of(block.get(group.linears[0]))[1], needs, block.device)
            observers[group.linears[0]] = shared
            stats |= dict.fromkeys(group.linears, shared)
    return block.forward_observed(hidden, observers), stats


def quantize_cache_of(block: Block, method: Method, options: Any, hidden: Tensor, work: Work) -> Tensor:
    """Let a method of scope cache find scales for what the block's attention keeps; returns the block's new output."""
    attentions = attentions_of(block.module)
    observers = {name: CacheObserver() for name in attentions}
    handles = [pass_through(attentions[name], observer.see) for name, observer in observers.items()]
    block.forward(hidden)
    for handle in handles:
        handle.remove()
    for name, seen in observers.items():
        full = f"{block.name}.{name}"
        if seen.k is None or seen.v is None:
            raise QtoolError(f"{method.key}: {full}: it hands no keys to a cache, so that there is nothing to quantize")
        found: CacheScales = method.run(seen.k, seen.v, block.dtype, options, work.note(full))
        quantize_cache(attentions[name], found.to(block.device))
        work.changes[full] = found
    return block.forward(hidden)


def keep_cache_of(block: Block, options: KiviScheme, work: Work) -> None:
    """Let a block's attention keep its keys and values by options; nothing is read off the model."""
    for name, attention in attentions_of(block.module).items():
        quantize_by_kivi(attention, options)
        work.changes[f"{block.name}.{name}"] = options


def round_attention_of(block: Block, options: AttentionRounding, work: Work) -> None:
    """Let a block's attention round between its linears; nothing is read off the model."""
    for name, attention in attentions_of(block.module).items():
        round_attention(attention, options)
        work.changes[f"{block.name}.{name}{ROUNDING}"] = options


def quantize_inputs_of(block: Block, method: Method, options: InputSelection, hidden: Tensor, work: Work) -> Tensor:
    """Let a method of scope inputs find static scales for what the block's linears read; returns the block's new output."""
    chosen: dict[tuple[str, ...], InputValues] = {}
    for names in chosen_groups(block, options, hidden, only_quantized=True):
        alike: dict[ActivationScheme, list[str]] = {}  # linears that round one input in different ways have scales of their own
        for name in names:
            if (scheme := rounding_of(block, name)) is not None:
                alike.setdefault(scheme, []).append(name)
        chosen |= {tuple(members): InputValues(scheme.group) for scheme, members in alike.items()}
    block.forward_observed(hidden, {names[0]: seen for names, seen in chosen.items()})
    for names, seen in chosen.items():
        make_static(block, names, seen, method, options, work)
    return block.forward(hidden)


def rounding_of(block: Block, name: str) -> ActivationScheme | None:
    """How the linear rounds its inputs at run time; None where it does not."""
    layer = block.get(name)
    return layer.activations if isinstance(layer, QuantLinear) and layer.inputs is None else None


def make_static(
    block: Block, names: tuple[str, ...], seen: InputValues, method: Method, options: InputSelection, work: Work
) -> None:
    """Give linears that share an input, and round it alike, the static scales that the method finds for it."""
    begun = time.perf_counter()
    if seen.n_tokens == 0:
        work.note(names[0])("no token of the calibration text came here; its inputs are scaled at run time as before")
        return
    scheme = rounding_of(block, names[0])
    assert scheme is not None, f"{names[0]}: its inputs are rounded"
    static = scheme.model_copy(update={"static": True})
    try:
        found = method.run(seen, static, block.dtype, options, work.note(names[0])).to(block.device)
    except QtoolError as error:
        raise QtoolError(f"{method.key}: {names[0]}: {error}") from error
    seconds = (time.perf_counter() - begun) / len(names)
    for name in names:
        layer = block.get(name)
        assert isinstance(layer, QuantLinear), f"{name} is quantized"
        after = Scheme(weights=layer.scheme, activations=static)
        block.put(name, QuantLinear(layer.qt, layer.bias, static, layer.low_rank, found))
        work.changes |= {f"{name}.weight": (layer.qt, after), f"{name}{INPUTS}": found}
        work.linears.append({"name": name, "scheme": str(after), "seconds": seconds})


def tune_block(
    block: Block, method: Method, options: SchemeSelection, hidden: Tensor, twin: Twin, seed: int, work: Work
) -> Tensor:
    """Let a method of scope block quantize all of the block's linears together; returns the block's new output."""
    schemes = {name: scheme for name in block.linears() if (scheme := options.scheme_of(name)) is not None}
    for name in schemes:
        if isinstance(block.get(name), QuantLinear):
            raise QtoolError(f"{method.key}: {name} is quantized already; quantize once, and prune before it")
    begun = time.perf_counter()
    found = method.run(block, hidden, twin.forward(block.index), schemes, options, seed + block.index, work.note(block.name))
    seconds = (time.perf_counter() - begun) / max(len(found), 1)
    for name, tensor in found.items():
        layer = block.get(name)
        before = weight_of(layer)
        scheme = schemes[name].model_copy(update={"weights": tensor.scheme})
        block.put(name, QuantLinear(tensor, getattr(layer, "bias", None), scheme.activations))
        work.changes[f"{name}.weight"] = (tensor, scheme)
        facts = errors(before, tensor.dequantize(), None)
        work.linears.append({"name": name, "scheme": str(scheme), "seconds": seconds, **facts})
    for group in find_groups(block, hidden[:1]):
        share_tensor_scales(block, tuple(name for name in group.linears if name in found), work)
    return block.forward(hidden)
