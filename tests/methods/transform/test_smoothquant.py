"""SmoothQuant evens out both sides, by its own formula; its search finds what trying every alpha on real outputs finds."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from qtool import laws
from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.methods.transform.smoothquant import METHOD, SmoothQuantOptions, smoothquant
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.model.wiring import Scaling, apply_edits, find_scalings
from qtool.options import ModelOptions
from qtool.recipe import parse


def prepared(folder: Path) -> tuple[Block, torch.Tensor, list[Scaling], dict[str, LayerStats]]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    hidden = model.embed(torch.randint(0, 4096, (4, 24), generator=torch.Generator().manual_seed(0)))
    block = model.block(0)
    scalings = find_scalings(block, hidden[:1])
    stats = {name: LayerStats(weight_of(block.get(name)).shape[1], ("amax", "sample")) for name in block.linears()}
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


# ---- the search ----


class Searching(SmoothQuantOptions):
    """Options whose default searches, so that the laws run the search."""

    alpha: float | str = "search"  # type: ignore[assignment]
    scheme: Scheme | None = Scheme.model_validate("w4a4")


@pytest.mark.parametrize("law", ["transforming_keeps_the_output", "transforming_is_deterministic"])
def test_the_search_satisfies_the_laws_of_its_kind(law: str) -> None:
    laws.of(replace(METHOD, options=Searching, key="transform/smoothquant"))[law]()


def rounded_per_token(x: torch.Tensor) -> torch.Tensor:
    """x [tokens, in] in whole numbers of four bits, each token in its own range, the end of which lies half a step out."""
    scale = x.abs().amax(1, keepdim=True) / 7.5
    return scale * (x / scale).round().clamp(-8, 7)


def test_the_alpha_kept_is_the_best_of_all_by_real_outputs(tiny_model: Callable[..., Path]) -> None:
    """A second search, over the formula written out, with inputs rounded by hand."""
    block, hidden, scalings, stats = prepared(tiny_model("opt"))
    scaling = next(s for s in scalings if s.source.endswith("self_attn_layer_norm"))
    norm = block.get(scaling.source)
    with torch.no_grad():  # two channels stand out, as trained models have them
        for channel, by in ((5, 30.0), (40, 8.0)):
            norm.get_parameter("weight")[channel] *= by
            norm.get_parameter("bias")[channel] *= by
            for name in scaling.consumers:
                block.get(name).get_parameter("weight")[:, channel] /= by
    inputs: list[torch.Tensor] = []
    hook = block.get(scaling.consumers[0]).register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, 1)))
    seen = LayerStats(64, ("amax", "sample"))
    block.observe(hidden, {scaling.consumers[0]: seen})
    hook.remove()
    X, weights = torch.cat(inputs), [weight_of(block.get(name)) for name in scaling.consumers]  # [tokens, in], [out, in]
    x_max, w_max = X.abs().amax(0), torch.cat(weights).abs().amax(0)
    scheme = Scheme.model_validate("w4a4")

    def loss(s: torch.Tensor) -> float:
        Q = [quantize(W * s, scheme.weights).dequantize() for W in weights]
        return sum(float((rounded_per_token(X / s) @ q.T - X @ W.T).square().sum()) for q, W in zip(Q, weights, strict=True))

    tried = {step / 20: x_max ** (step / 20) / w_max ** (1 - step / 20) for step in range(21)}
    best = min(tried, key=lambda alpha: loss(tried[alpha]))
    options = SmoothQuantOptions.model_validate({"alpha": "search", "scheme": "w4a4"})
    edits = smoothquant(block, [scaling], {scaling.consumers[0]: seen}, options, print)
    found = edits[f"{scaling.consumers[0]}.weight"] / weights[0]
    assert torch.allclose(found.nanmedian(0).values, tried[best], rtol=1e-3)
    assert 0 < best < 1 and best != 0.5 and loss(tried[best]) < 0.1 * loss(torch.ones(64))


def test_each_place_has_an_alpha_of_its_own_and_none_where_no_scale_helps(tiny_model: Callable[..., Path]) -> None:
    block, _, scalings, stats = prepared(tiny_model("llama"))
    options = SmoothQuantOptions.model_validate({"alpha": "search", "scheme": "w4a4"})
    edits = smoothquant(block, scalings, stats, options, print)
    one = {s.source: smoothquant(block, [s], stats, options, print) for s in scalings}
    assert set(edits) == {name for found in one.values() for name in found}
    scaling = scalings[0]
    for name in scaling.consumers:  # nothing to round, so that every scale loses the same
        block.get(name).get_parameter("weight").data.zero_()
    assert smoothquant(block, [scaling], stats, options, print) == {}


def test_a_dead_channel_keeps_searched_scales_finite(tiny_model: Callable[..., Path]) -> None:
    block, _, scalings, stats = prepared(tiny_model("llama"))
    for name in stats:
        stats[name].amax()[3] = 0.0
        stats[name].sample()[:, 3] = 0.0
    options = SmoothQuantOptions.model_validate({"alpha": "search", "scheme": "w8a8"})
    edits = smoothquant(block, scalings, stats, options, print)
    assert edits and all(torch.isfinite(value).all() for value in edits.values())


def test_a_search_states_what_it_rounds_to_and_nothing_else_does() -> None:
    with pytest.raises(ValidationError, match="state the scheme"):
        SmoothQuantOptions.model_validate({"alpha": "search"})
    with pytest.raises(ValidationError, match="leave scheme away"):
        SmoothQuantOptions.model_validate({"alpha": 0.5, "scheme": "w8a8"})
    with pytest.raises(Exception, match="r.yaml:4: transform/smoothquant: alpha is 2; valid: number >= 0 and <= 1 or search"):
        parse(
            "model: demo\npipeline:\n  - calibrate/text: {source: demo:calibration}\n  - transform/smoothquant: {alpha: 2}\n",
            "r.yaml",
        )
