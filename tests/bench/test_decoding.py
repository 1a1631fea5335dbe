"""Decoding as bench generate times it: the same text in every form, and the reason where a step cannot be recorded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2Config

from qtool.bench.decoding import CALLS, Decoding, FixedCache, GrowingCache, fixed_cache, make_decoding
from qtool.formats.kivi import KiviScheme
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import quantize_by_kivi

PROMPT, NEW = 12, 10  # past the sliding window of 16 that two of the families have


def written(decoding: Decoding, prompt: Tensor, n_tokens: int) -> Tensor:
    """Tokens [batch, n_tokens] after a prompt [batch, length]."""
    decoding.clear()
    decoding.first(prompt)
    found = [decoding.token.clone()]
    for _ in range(n_tokens - 1):
        decoding.next()
        found.append(decoding.token.clone())
    return torch.cat(found, 1)


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("mistral", {}), ("gemma3", {"layer_types": ["sliding_attention", "full_attention"]}), ("gpt2", {})],
)
def test_a_fixed_cache_gives_the_text_of_a_growing_one(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], family: str, fields: dict[str, object]
) -> None:
    model = quantized(tiny_model(family, **fields), "w4a16g32").take()
    one, other = torch.randint(4096, (2, 2, PROMPT), generator=torch.Generator().manual_seed(0))
    cache, growing = fixed_cache(model, PROMPT + NEW), make_decoding(model, one, NEW)
    assert not isinstance(cache, str), cache
    assert isinstance(growing, GrowingCache) and (growing.form, growing.why) == (CALLS, None)
    fixed, addresses = FixedCache(model, cache, batch=2), set()
    for prompt in (one, other, one):
        assert torch.equal(written(fixed, prompt, NEW), written(growing, prompt, NEW))
        addresses.add(tuple(layer.keys.data_ptr() for layer in cache.layers))
    assert len(addresses) == 1, "a recorded step would go on with what stood elsewhere"


def test_caches_of_another_kind_have_no_fixed_form(tiny_model: Callable[..., Path]) -> None:
    codes = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    quantize_by_kivi(codes.get_submodule("model.layers.1.self_attn"), KiviScheme())
    assert fixed_cache(codes, 8) == "its cache keeps packed codes, and grows"
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    states = AutoModelForCausalLM.from_config(Lfm2Config(**sizes, layer_types=["conv", "full_attention"]))
    assert fixed_cache(states, 8) == "its cache has layers of LinearAttentionLayer, not of keys and values alone"
