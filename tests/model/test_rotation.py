"""Places for rotations are found in every family, what forbids one is named, and the weights are those worked out by hand."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from qtool.errors import QtoolError
from qtool.linalg.hadamard import random_orthogonal
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.model.rotation import (
    TOLERANCE,
    Places,
    Reading,
    Rotations,
    Trial,
    UnitPlaces,
    block_edits,
    find_block_places,
    find_places,
    outer_change,
    trial_rotation,
)
from qtool.options import ModelOptions
from tests.conftest import DEMO, TOKENS

TinyModel = Callable[..., Path]
SAMPLE = torch.randint(2, 4096, (1, 24), generator=torch.Generator().manual_seed(0))
LAYER_NORMS = ("opt", "gpt2", "gpt_neox", "falcon")
VALUES = {"phi3": ("qkv_proj", 2), "gpt2": ("c_attn", 4), "gpt_neox": ("query_key_value", 4), "falcon": ("query_key_value", 1)}
VALUES |= {"opt": ("v_proj", 4)}
# What makes keys, or norms them, and how many scales: heads times pairs of channels, or channels where positions turn none.
KEYS = {"qwen3": ("k_norm", 8), "gemma3": ("k_norm", 8), "phi3": ("qkv_proj", 2 * 8), "falcon": ("query_key_value", 8)}
KEYS |= {"opt": ("k_proj", 4 * 16), "gpt2": ("c_attn", 4 * 16), "gpt_neox": ("query_key_value", 4 * (2 + 12))}


def opened(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder), dtype="float32"))


def rows_of(places: Places) -> tuple[str, list[list[int]]]:
    values = places.blocks[0].values
    assert values is not None
    return values.value.rsplit(".", 1)[-1], values.rows.tolist()


def test_every_family_has_its_places(family: str, tiny_model: TinyModel) -> None:
    places = find_places(opened(tiny_model(family)), SAMPLE)
    assert places.keeps_mean == (family in LAYER_NORMS)
    linear, n_heads = VALUES.get(family, ("v_proj", 2))
    assert [(name.rsplit(".", 1)[-1], shape) for name, shape in places.heads.items()] == [(linear, (n_heads, 16))] * 2
    n_experts = 4 if family == "mixtral" else 1
    assert sorted(places.inputs.values()) == [64] * 2 + [128] * 2 * n_experts
    if family == "gemma3":
        with pytest.raises(QtoolError, match=r"of model\.layers\.0\.post_attention_layernorm is not read by linears alone"):
            places.check_residual()
    else:
        places.check_residual()


def test_keys_can_be_scaled_in_every_family_both_channels_of_a_rotary_pair_alike(family: str, tiny_model: TinyModel) -> None:
    model = opened(tiny_model(family))
    hidden = model.embed(SAMPLE)
    block = model.block(0)
    places = find_block_places(block, hidden, with_keys=True)
    assert places.keys is not None
    assert (places.keys.key.rsplit(".", 1)[-1], places.keys.n) == KEYS.get(family, ("k_proj", 2 * 8))
    s = torch.linspace(0.5, 2, places.keys.n, dtype=torch.float64)
    rotations = Rotations(keys={places.keys.key: s})
    edits = block_edits(block, places, rotations)
    assert Trial(block, hidden).change(edits, rotations) <= TOLERANCE
    of_key = places.keys.of_key
    changed = block.get(places.keys.key).weight.detach().double()
    rows = of_key < places.keys.n
    if family == "llama":
        assert torch.equal(of_key, torch.arange(8).repeat(4) + torch.arange(2).repeat_interleave(16) * 8)
    if family in ("llama", "qwen3"):
        scaled = changed * (s[of_key][:, None] if changed.ndim == 2 else s[of_key])
        assert torch.allclose(edits[f"{places.keys.key}.weight"].double()[rows], scaled[rows], rtol=1e-6)


def test_values_in_fused_linears_lie_where_the_families_put_them(tiny_model: TinyModel) -> None:
    heads = torch.arange(12 * 16).view(12, 16)  # twelve heads' worth of rows: queries, keys and values of four heads
    assert rows_of(find_places(opened(tiny_model("gpt2")), SAMPLE))[1] == heads[8:].tolist()
    assert rows_of(find_places(opened(tiny_model("gpt_neox")), SAMPLE))[1] == heads[2::3].tolist()
    assert rows_of(find_places(opened(tiny_model("falcon")), SAMPLE))[1] == heads[5:6].tolist()  # one key, one value
    grouped = tiny_model("falcon", new_decoder_architecture=True, num_kv_heads=2, name="grouped")
    assert rows_of(find_places(opened(grouped), SAMPLE))[1] == heads[[3, 7]].tolist()  # two queries, key, value; twice


def test_the_weights_of_a_llama_block_are_those_worked_out_head_by_head(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama", attention_bias=True))
    random = torch.Generator().manual_seed(0)
    hidden = model.embed(SAMPLE)
    block = model.block(0)
    Q = random_orthogonal(64, random)
    R = torch.stack([random_orthogonal(16, random) for _ in range(2)])
    name = f"{block.name}.self_attn"
    places = find_block_places(block, hidden)
    edits = block_edits(block, places, Rotations(Q, {f"{name}.v_proj": R}))
    gain = block.module.get_parameter("input_layernorm.weight").detach().double()
    weights = {part: weight_of(block.get(f"{name}.{part}")).double() for part in ("q_proj", "v_proj", "o_proj")}
    bias = {part: block.module.get_parameter(f"self_attn.{part}.bias").detach().double() for part in weights}
    expected_v, expected_o = torch.zeros(32, 64).double(), weights["o_proj"].clone()
    for head in range(2):
        rows = slice(16 * head, 16 * head + 16)
        expected_v[rows] = R[head].T @ weights["v_proj"][rows] @ torch.diag(gain) @ Q
    for query in range(4):  # two query heads read each value head
        columns = slice(16 * query, 16 * query + 16)
        expected_o[:, columns] = weights["o_proj"][:, columns] @ R[query // 2]
    assert torch.allclose(edits[f"{name}.q_proj.weight"], weights["q_proj"] @ torch.diag(gain) @ Q)
    assert torch.allclose(edits[f"{name}.v_proj.weight"], expected_v)
    assert torch.allclose(edits[f"{name}.o_proj.weight"], Q.T @ expected_o)
    assert torch.allclose(edits[f"{name}.o_proj.bias"], Q.T @ bias["o_proj"])
    assert torch.allclose(edits[f"{name}.v_proj.bias"], torch.cat([bias["v_proj"][:16] @ R[0], bias["v_proj"][16:] @ R[1]]))
    assert f"{name}.q_proj.bias" not in edits  # no bias in the norm that would change it
    assert torch.equal(edits[f"{block.name}.input_layernorm.weight"], torch.ones(64).double())


def test_a_block_with_one_weight_left_out_is_caught(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama"))
    hidden = model.embed(SAMPLE)
    block = model.block(0)
    places, rotations = find_block_places(block, hidden), Rotations(trial_rotation(64, keeps_mean=False))
    edits = block_edits(block, places, rotations)
    assert Trial(block, hidden).change(edits, rotations) <= TOLERANCE
    del edits["model.layers.0.mlp.up_proj.weight"]
    assert Trial(block, hidden).change(edits, rotations) > 0.1


def test_a_rotation_that_moves_the_mean_does_not_pass_a_layer_norm(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("gpt2"))
    hidden = model.embed(SAMPLE)
    block = model.block(0)
    places = find_block_places(block, hidden)
    for keeps_mean in (True, False):
        rotations = Rotations(trial_rotation(64, keeps_mean))
        assert (Trial(block, hidden).change(block_edits(block, places, rotations), rotations) <= TOLERANCE) == keeps_mean


def test_a_bias_of_a_norm_goes_where_there_are_biases_and_stays_elsewhere(tiny_model: TinyModel) -> None:
    for family, stays in (("gpt2", False), ("falcon", True)):
        model = opened(tiny_model(family))
        hidden = model.embed(SAMPLE)
        block = model.block(0)
        places = find_block_places(block, hidden)
        edits = block_edits(block, places, Rotations(trial_rotation(64, keeps_mean=True)))
        norm = places.readings[0].norm
        assert bool(edits[f"{norm}.bias"].any()) == stays, family


def test_a_bias_without_a_gain_that_no_linear_takes_is_refused_by_name(tiny_model: TinyModel) -> None:
    folder = tiny_model("falcon")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter("transformer.h.1.input_layernorm.weight")[7] = 0
    model.save_pretrained(folder)
    with pytest.raises(QtoolError, match=r"transformer\.h\.1\.input_layernorm has a bias but no gain in channel 7"):
        find_places(opened(folder), SAMPLE).check_residual()


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "word_embeddings_layernorm stands on it outside"),
        (
            "OPTConfig",
            {"hidden_size": 64, "word_embed_proj_dim": 32, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            "embed_tokens gives 32 channels, the blocks have 64",
        ),
        (
            "Olmo2Config",
            {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
            "self_attn.q_norm is not read by linears alone",
        ),
    ],
)
def test_what_forbids_the_rotation_is_named(config: str, fields: dict[str, object], message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**TOKENS | fields))
    made.save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / file, tmp_path / "model" / file)
    with pytest.raises(QtoolError, match=f"the residual stream cannot be rotated: .*{message}.*; set residual: false"):
        find_places(opened(tmp_path / "model"), SAMPLE).check_residual()


def test_a_model_without_values_to_rotate_says_so() -> None:
    with pytest.raises(QtoolError, match="in no block do they pass from one linear to another; set heads: false"):
        Places(64, (UnitPlaces(()),), UnitPlaces(())).check_heads()


def test_embedding_and_head_are_tried_too(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("opt"))
    places = find_places(model, SAMPLE)
    hidden, Q = model.final_hidden(SAMPLE), trial_rotation(64, keeps_mean=True)
    with model.outer():
        edits = block_edits(Block(model, -1, model.model, ""), places.outer, Rotations(Q))
    assert outer_change(model, SAMPLE, hidden, edits, Q) <= TOLERANCE
    assert places.outer.readings == (Reading("model.decoder.final_layer_norm", ("lm_head",)),)
    for name in ("lm_head.weight", "model.decoder.embed_positions.weight"):
        assert outer_change(model, SAMPLE, hidden, {key: edits[key] for key in edits if key != name}, Q) > 0.01
