"""fold_norms leaves gains at one and the model as it was."""

from collections.abc import Callable
from pathlib import Path

import torch

from qtool.methods.transform.fold_norms import FoldNormsOptions, fold_norms
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.model.wiring import change_of_output, find_scalings
from qtool.options import ModelOptions


def prepared(folder: Path) -> tuple[Block, torch.Tensor]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    hidden = model.embed(torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0)))
    return model.block(0), hidden


def test_gains_become_one_and_weights_carry_them(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"))
    edits = fold_norms(block, find_scalings(block, hidden), {}, FoldNormsOptions(), print)
    gain = block.get("model.layers.0.input_layernorm").get_parameter("weight").detach()
    query = "model.layers.0.self_attn.q_proj"
    assert torch.equal(edits["model.layers.0.input_layernorm.weight"], torch.ones(64))
    assert torch.allclose(edits[f"{query}.weight"], weight_of(block.get(query)) @ torch.diag(gain))
    assert change_of_output(block, hidden, edits) < 1e-5


def test_gemmas_gain_of_one_is_a_weight_of_zero(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("gemma3"))
    edits = fold_norms(block, find_scalings(block, hidden), {}, FoldNormsOptions(), print)
    assert edits["model.layers.0.input_layernorm.weight"].abs().max() < 1e-6
    assert change_of_output(block, hidden, edits) < 1e-5


def test_a_gain_of_zero_stays_and_is_noted(tiny_model: Callable[..., Path]) -> None:
    block, hidden = prepared(tiny_model("llama"))
    scalings = find_scalings(block, hidden)
    block.get("model.layers.0.input_layernorm").get_parameter("weight").data[7] = 0.0
    notes: list[str] = []
    edits = fold_norms(block, scalings, {}, FoldNormsOptions(), notes.append)
    assert len(notes) == 1 and "input_layernorm has a gain of zero" in notes[0]
    assert "model.layers.0.input_layernorm.weight" not in edits
    assert "model.layers.0.post_attention_layernorm.weight" in edits
