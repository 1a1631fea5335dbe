"""LET: starts as SmoothQuant, beats it where a channel has outliers, and leaves every family's blocks as they were."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.transform.let import LetOptions, let
from qtool.methods.transform.smoothquant import SmoothQuantOptions, smoothquant
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.wiring import Edits, apply_edits, change_of_output, find_scalings
from qtool.options import ModelOptions


def prepared(folder: Path, dtype: str = "float32", samples: int = 6) -> tuple[Block, Tensor]:
    """A block and its inputs [samples, length, hidden]."""
    model = ModelHandle(ModelOptions.model_validate({"path": str(folder), "dtype": dtype}))
    hidden = model.embed(torch.randint(2, 4096, (samples, 16), generator=torch.Generator().manual_seed(0)))
    return model.block(0), hidden


def run(block: Block, hidden: Tensor, short: str, **choices: object) -> tuple[Edits, list[str]]:
    """The edits, and what the method notes."""
    options, notes = LetOptions.model_validate({"scheme": short, **choices}), []
    return let(block, find_scalings(block, hidden[:1]), hidden, block.forward(hidden), options, 0, notes.append), notes


def smooth(block: Block, hidden: Tensor) -> Edits:
    stats = {name: LayerStats(shape_of(layer)[1], ("amax",)) for name, layer in block.linears().items()}
    block.forward_observed(hidden, stats)
    return smoothquant(block, find_scalings(block, hidden[:1]), stats, SmoothQuantOptions(alpha=0.5), print)


def error_of_rounding(block: Block, hidden: Tensor, short: str, edits: Edits) -> float:
    """Mean squared error of the block's output, every linear rounded to nearest after the edits, which are undone."""
    targets, scheme = block.forward(hidden), Scheme.model_validate(short)
    before = {name: value.clone() for name, value in block.module.state_dict().items()}
    apply_edits(block.module, block.name, edits)
    layers = {
        name: QuantLinear(quantize(weight_of(layer), scheme.weights), getattr(layer, "bias", None), scheme.activations)
        for name, layer in block.linears().items()
    }
    with block.replaced(layers):
        out = block.forward(hidden)
    block.module.load_state_dict(before)
    return float((out.float() - targets.float()).square().mean())


def plant_outlier(block: Block, norm: str, consumers: tuple[str, ...], channel: int) -> None:
    """Make one channel of a norm's output 100 times as large, and the weights that read it small, as trained models have it."""
    with torch.no_grad():
        block.get(norm).get_parameter("weight")[channel] *= 100
        for name in consumers:
            block.get(name).get_parameter("weight")[:, channel] /= 30


def test_a_planted_outlier_is_shrunk_and_rounding_costs_less_than_after_smoothquant(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"), samples=12)
    norm = "model.layers.0.input_layernorm"
    consumers = tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
    plant_outlier(block, norm, consumers, channel=5)
    edits, notes = run(block, hidden, "w4a4", steps=80, batch=12)
    gain = block.get(norm).get_parameter("weight").detach()
    s = gain / edits[f"{norm}.weight"]
    assert s[5] > 4 * s.median() and notes == []
    assert torch.allclose(edits[f"{consumers[0]}.weight"], weight_of(block.get(consumers[0])) * s, rtol=1e-4, atol=1e-7)
    plain, smoothed, learned = (error_of_rounding(block, hidden, "w4a4", found) for found in ({}, smooth(block, hidden), edits))
    assert learned < 0.95 * smoothed and smoothed < 0.9 * plain


def test_without_a_step_it_is_smoothquant_where_that_helps(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"))
    plant_outlier(block, "model.layers.0.input_layernorm", tuple(f"model.layers.0.self_attn.{x}_proj" for x in "qkv"), 5)
    edits, expected = run(block, hidden, "w4a4", steps=0)[0], smooth(block, hidden)
    assert edits.keys() == expected.keys()
    # Exponent of a logarithm against a quotient of powers, both in float32.
    assert all(torch.allclose(edits[name], value, rtol=1e-4, atol=1e-7) for name, value in expected.items())


def test_every_familys_block_computes_the_same_and_rounds_better(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model(family))
    edits, notes = run(block, hidden, "w3a16g32-asym", steps=20, lr=0.03)
    assert edits and notes == []
    assert change_of_output(block, hidden[:1], edits) < 1e-5  # float32 rounding of one block
    losses = [error_of_rounding(block, hidden, "w3a16g32-asym", found) for found in (edits, {})]
    assert losses[0] < losses[1]


def test_shifts_learn_where_both_sides_have_biases(tiny_model: Callable[..., Path]) -> None:
    """OPT's norms and values shift, its fc1 cannot: ReLU stands behind it. A LLaMA has no biases."""
    block, hidden = prepared(tiny_model("opt"))
    takes = {s.source.rpartition(".")[2]: s.takes_shift for s in find_scalings(block, hidden[:1])}
    assert takes == {"self_attn_layer_norm": True, "v_proj": True, "final_layer_norm": True, "fc1": False}
    name = "model.decoder.layers.0.self_attn.out_proj"
    edits, _ = run(block, hidden, "w3a16g32-asym", steps=10)
    bias = block.get(name).get_parameter("bias").detach()
    assert float((edits[f"{name}.bias"] - bias).abs().max()) > 1e-3
    assert change_of_output(block, hidden[:1], edits) < 1e-5
    llama, hidden = prepared(tiny_model("llama"))
    assert not any(s.takes_shift for s in find_scalings(llama, hidden[:1]))


def test_a_far_off_middle_is_shifted_away(tiny_model: Callable[..., Path]) -> None:
    """A channel around 20 with little spread rounds badly in four bits per token; shifted, it does not."""
    block, hidden = prepared(tiny_model("opt"))
    norm = "model.decoder.layers.0.self_attn_layer_norm"
    with torch.no_grad():
        block.get(norm).get_parameter("bias")[3] = 20.0
    edits, _ = run(block, hidden, "w4a4", steps=0)
    assert abs(float(edits[f"{norm}.bias"][3])) < 2
    plain, shifted = (error_of_rounding(block, hidden, "w4a4", found) for found in ({}, edits))
    assert shifted < 0.5 * plain


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_block_in_half_precision_learns_too(dtype: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"), dtype)
    edits, notes = run(block, hidden, "w3a16g32-asym", steps=20, lr=0.03)
    assert edits and notes == [] and all(torch.isfinite(value).all() for value in edits.values())
    losses = [error_of_rounding(block, hidden, "w3a16g32-asym", found) for found in (edits, {})]
    assert losses[0] < losses[1]


def test_where_no_scale_helps_the_block_stays_and_that_is_noted(tiny_model: Callable[..., Path]) -> None:
    """Random activations have no outliers, and alpha 1 moves all their differences into the weights."""
    block, hidden = prepared(tiny_model("llama"))
    edits, notes = run(block, hidden, "w3a16g32-asym", steps=0, alpha=1.0)
    assert edits == {} and len(notes) == 1 and "no scale tried lowers" in notes[0]
    notes.clear()
    options = LetOptions.model_validate({"scheme": "w4a16g32"})
    assert let(block, [], hidden, block.forward(hidden), options, 0, notes.append) == {}
    assert len(notes) == 1 and "no scale passes anywhere" in notes[0]


def test_a_dead_channel_and_a_group_of_zeros_keep_edits_finite(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"))
    with torch.no_grad():
        block.get("model.layers.0.input_layernorm").get_parameter("weight")[3] = 0.0
        block.get("model.layers.0.mlp.down_proj").get_parameter("weight")[:, :32] = 0.0
    edits, _ = run(block, hidden, "w3a16g32-asym", steps=5)
    assert edits and all(torch.isfinite(value).all() for value in edits.values())
