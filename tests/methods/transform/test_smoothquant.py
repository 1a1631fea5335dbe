"""SmoothQuant evens out both sides, by its own formula."""

from collections.abc import Callable
from pathlib import Path

import torch

from qtool.calibration.statistics import LayerStats
from qtool.methods.transform.smoothquant import SmoothQuantOptions, smoothquant
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.model.wiring import Scaling, apply_edits, find_scalings
from qtool.options import ModelOptions


def prepared(folder: Path) -> tuple[Block, torch.Tensor, list[Scaling], dict[str, LayerStats]]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    hidden = model.embed(torch.randint(0, 4096, (4, 24), generator=torch.Generator().manual_seed(0)))
    block = model.block(0)
    scalings = find_scalings(block, hidden[:1])
    stats = {name: LayerStats(weight_of(block.get(name)).shape[1], ("amax",)) for name in block.linears()}
    block.observe(hidden, stats)
    return block, hidden, scalings, stats


def test_at_one_half_activations_and_weights_have_equal_maxima(tiny_model: Callable[..., Path]) -> None:
    block, hidden, scalings, stats = prepared(tiny_model("opt"))
    scaling = next(s for s in scalings if s.source.endswith("self_attn_layer_norm"))
    apply_edits(block.module, block.name, smoothquant(block, [scaling], stats, SmoothQuantOptions(alpha=0.5), print))
    first = scaling.consumers[0]
    after = LayerStats(64, ("amax",))
    block.observe(hidden, {first: after})
    w_max = torch.cat([weight_of(block.get(name)) for name in scaling.consumers]).abs().amax(0)
    assert torch.allclose(after.amax(), w_max, rtol=1e-4)


def test_the_scales_are_those_of_the_formula(tiny_model: Callable[..., Path]) -> None:
    block, _, scalings, stats = prepared(tiny_model("opt"))
    scaling = next(s for s in scalings if s.source.endswith("self_attn_layer_norm"))
    edits = smoothquant(block, [scaling], stats, SmoothQuantOptions(alpha=0.8), print)
    W = torch.cat([weight_of(block.get(name)) for name in scaling.consumers])
    for j in range(0, 64, 7):  # one channel after the other, as the paper writes it
        s = stats[scaling.consumers[0]].amax()[j] ** 0.8 / W[:, j].abs().max() ** 0.2
        first = scaling.consumers[0]
        assert torch.allclose(edits[f"{first}.weight"][:, j], weight_of(block.get(first))[:, j] * s)
        norm = block.get(scaling.source)
        assert torch.allclose(edits[f"{scaling.source}.weight"][j], norm.get_parameter("weight")[j] / s)
        assert torch.allclose(edits[f"{scaling.source}.bias"][j], norm.get_parameter("bias")[j] / s)


def test_a_dead_channel_gets_a_finite_scale(tiny_model: Callable[..., Path]) -> None:
    block, _, scalings, stats = prepared(tiny_model("llama"))
    for name in stats:
        stats[name].amax()[3] = 0.0
    edits = smoothquant(block, scalings, stats, SmoothQuantOptions(alpha=0.5), print)
    assert all(torch.isfinite(value).all() for value in edits.values())
