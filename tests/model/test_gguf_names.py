"""Names and orders of rows: what llama.cpp's converter makes of each family's tensors, and the way back."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import MODEL_ARCH, get_tensor_name_map

from qtool.model.gguf_names import FAMILIES, GPT2, GPT_NEOX, LLAMA, QWEN3, is_transposed, original_name, row_order, stored_name
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_those_of_the_packages_own_map(family: str, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model(family))))
    known = FAMILIES[family]
    arch = next(arch for arch in MODEL_ARCH if arch.name.lower().replace("_", "") == known.architecture.replace("_", ""))
    theirs = get_tensor_name_map(arch, model.n_blocks)
    names = {name: stored_name(known, name) for name in model.stored_names()}
    assert names == {name: theirs.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    assert {original_name(known, str(stored)) for stored in names.values()} == set(names)


def test_what_an_architecture_has_not_has_no_name() -> None:
    assert stored_name(LLAMA, "model.layers.0.self_attn.q_norm.weight") is None
    assert stored_name(QWEN3, "model.layers.0.self_attn.q_proj.bias") is None
    assert original_name(LLAMA, "rope_freqs.weight") is None


def test_llamas_heads_have_their_halves_interleaved() -> None:
    assert row_order(LLAMA, "blk.0.attn_q.weight", 8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert row_order(LLAMA, "blk.0.attn_k.weight", 8, 2, 1).tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert row_order(LLAMA, "blk.0.attn_v.weight", 8, 2, 1) is None


def test_turning_neighbours_of_interleaved_rows_is_turning_halves() -> None:
    """One head of 8 channels at one position: the rotation that llama.cpp does, on rows in its order, is transformers'."""
    random = torch.Generator().manual_seed(0)
    q, angle = torch.randn(8, generator=random), torch.rand(4, generator=random)
    cos, sin = torch.cat([angle, angle]).cos(), torch.cat([angle, angle]).sin()
    halves = q * cos + torch.cat([-q[4:], q[:4]]) * sin
    order = row_order(LLAMA, "blk.0.attn_q.weight", 8, 1, 1)
    pairs = torch.view_as_complex(q[order].view(4, 2)) * torch.polar(torch.ones(4), angle)
    torch.testing.assert_close(torch.view_as_real(pairs).flatten(), halves[order])


def test_neox_has_all_queries_first() -> None:
    order = row_order(GPT_NEOX, "blk.0.attn_qkv.bias", 12, 2, 2)  # two heads of two channels: q q k k v v each
    assert order.tolist() == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]


def test_gpt2_alone_is_transposed() -> None:
    assert is_transposed(GPT2, "blk.0.attn_qkv.weight") and not is_transposed(GPT2, "blk.0.attn_qkv.bias")
    assert not is_transposed(GPT2, "token_embd.weight") and not is_transposed(LLAMA, "blk.0.ffn_up.weight")
