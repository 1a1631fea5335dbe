"""Wiring is found in every family, and a wrong one is refused."""

from collections.abc import Callable
from pathlib import Path

import torch

from qtool.model.handle import Block, ModelHandle
from qtool.model.wiring import Scaling, change_of_output, find_groups, find_scalings, scale_edits
from qtool.options import ModelOptions

# For each family: the groups of block 0 by last names, and the scalings as source -> consumers.
ATTENTION, MLP = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
EXPECTED: dict[str, tuple[list[set[str]], set[str]]] = {
    "llama": (
        [ATTENTION, {"o_proj"}, MLP, {"down_proj"}],
        {"input_layernorm", "post_attention_layernorm", "v_proj", "up_proj"},
    ),
    "gpt2": ([{"c_attn"}, {"c_proj"}, {"c_fc"}, {"c_proj"}], {"ln_1", "ln_2"}),
    "opt": ([ATTENTION, {"out_proj"}, {"fc1"}, {"fc2"}], {"self_attn_layer_norm", "final_layer_norm", "v_proj", "fc1"}),
    "phi3": (
        [{"qkv_proj"}, {"o_proj"}, {"gate_up_proj"}, {"down_proj"}],
        {"input_layernorm", "post_attention_layernorm"},
    ),
    "gemma3": (
        [ATTENTION, {"o_proj"}, MLP, {"down_proj"}],
        {"input_layernorm", "pre_feedforward_layernorm", "v_proj", "up_proj"},
    ),
}
EXPECTED |= dict.fromkeys(("mistral", "qwen2", "qwen3"), EXPECTED["llama"])


def first_block(folder: Path) -> tuple[Block, torch.Tensor]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    hidden = model.embed(torch.randint(0, 4096, (1, 24), generator=torch.Generator().manual_seed(0)))
    return model.block(0), hidden


def last(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def test_groups_and_scalings_are_those_of_the_family(tiny_model: Callable[..., Path]) -> None:
    for family, (groups, sources) in EXPECTED.items():
        block, hidden = first_block(tiny_model(family))
        assert [{last(name) for name in group.linears} for group in find_groups(block, hidden)] == groups, family
        assert {last(scaling.source) for scaling in find_scalings(block, hidden)} == sources, family


def test_every_found_scaling_leaves_the_block_as_it_was(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model(family))
    scalings = find_scalings(block, hidden)
    edits: dict[str, torch.Tensor] = {}
    for scaling in scalings:
        s = torch.rand(int(scaling.spread.max()) + 1) * 3 + 0.2
        scale_edits(block, scaling, s, edits)
    assert edits, family
    assert change_of_output(block, hidden, edits) < 1e-5  # float32 rounding of one block


def test_a_wrong_wiring_changes_the_output_and_is_not_found(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    gate, down = "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.down_proj"
    wrong = Scaling(gate, (down,), torch.arange(128))  # SiLU stands between them
    assert change_of_output(block, hidden, scale_edits(block, wrong, torch.full((128,), 2.0))) > 0.01
    assert gate not in {scaling.source for scaling in find_scalings(block, hidden)}


def test_grouped_query_heads_share_the_scale_of_their_value_head(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    scaling = next(s for s in find_scalings(block, hidden) if last(s.source) == "v_proj")
    assert scaling.spread.view(4, 16)[0].equal(scaling.spread.view(4, 16)[1])  # query heads 0 and 1 read value head 0
    assert scaling.spread.unique().numel() == 32


def test_a_router_counts_as_a_reader_of_its_norm(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("mixtral"))
    linears = {last(name) for group in find_groups(block, hidden) for name in group.linears}
    assert "gate" not in linears
    norms = {last(scaling.source) for scaling in find_scalings(block, hidden)}
    assert "post_attention_layernorm" not in norms  # experts read gathered copies, so moving a scale there is refused
