"""KIVI in transformers' models: decoding through the packed cache is the window, family by family, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme
from qtool.model.attention import EagerAttention
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import KiviLayer, misfit, quantize_by_kivi
from qtool.model.store import save_changes
from qtool.options import ModelOptions

TinyModel = Callable[..., Path]
SCHEME = KiviScheme(group=16, residual=6, sinks=2)
TOKENS = torch.randint(2, 4096, (2, 44), generator=torch.Generator().manual_seed(0))  # [samples, length]


def model_of(folder: Path, scheme: KiviScheme | None) -> Any:
    """The model in float64, where no sum of another order brings a number over the border of two codes."""
    handle = ModelHandle(ModelOptions(path=str(folder)))
    model = handle.take().double()
    for name in handle.attention_names() if scheme is not None else ():
        assert scheme is not None
        quantize_by_kivi(model.get_submodule(name), scheme)
    return model


@torch.no_grad()
def logits_of(model: Any, pieces: tuple[Tensor, ...]) -> tuple[Tensor, Any]:
    """Logits of tokens that come in pieces, and the cache at the end."""
    past, found = None, []
    for piece in pieces:
        out = model(piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1), past


@torch.no_grad()
def window_of(model: Any) -> Tensor:
    logits: Tensor = model(TOKENS, use_cache=False).logits
    return logits


def test_an_attention_without_the_interface_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match="does not go through transformers' AttentionInterface; .* use quantize/kv_cache"):
        model_of(tiny_model("falcon"), SCHEME)


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt2", "gpt_neox", "mixtral"]
)
def test_decoding_is_the_window(family: str, tiny_model: TinyModel) -> None:
    """Heads that share keys and that do not, and sliding windows, which are 16 tokens."""
    folder = tiny_model(family)
    plain, model = model_of(folder, None), model_of(folder, SCHEME)
    whole = window_of(model)
    steps, cache = logits_of(model, (TOKENS[:, :20], TOKENS[:, 20:25], *TOKENS[:, 25:].split(1, 1)))
    torch.testing.assert_close(steps, whole, rtol=1e-5, atol=1e-6)
    assert all(isinstance(layer, KiviLayer) and layer.get_seq_length() == 44 for layer in cache.layers)
    expected, dense = logits_of(plain, (TOKENS,))
    assert float((whole - expected).norm() / expected.norm()) > 1e-3
    dense_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers)
    assert sum(layer.nbytes for layer in cache.layers) < 0.7 * dense_bytes


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_all_stays_to_the_bit_within_the_residual(family: str, tiny_model: TinyModel) -> None:
    folder = tiny_model(family)
    model = model_of(folder, KiviScheme(group=16, residual=44))
    assert torch.equal(window_of(model), window_of(model_of(folder, None)))


def test_padding_on_the_left_is_not_seen(tiny_model: TinyModel) -> None:
    """Within the residual a padded prompt goes on as the prompt alone; past it, with the cache as without."""
    folder = tiny_model("llama")
    padded = torch.cat([torch.ones(1, 5, dtype=torch.int64), TOKENS[:1, :20]], 1)
    prompts, mask = torch.cat([padded, TOKENS[1:, :25]]), torch.ones(2, 25, dtype=torch.int64)
    mask[0, :5] = 0
    more: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    wide = model_of(folder, KiviScheme(group=16, residual=64))
    alone = wide.generate(TOKENS[:1, :20], **more)
    assert torch.equal(wide.generate(prompts, attention_mask=mask, **more)[:1, 5:], alone)
    model = model_of(folder, SCHEME)
    written = model.generate(prompts, attention_mask=mask, **more)
    again = model.generate(prompts, attention_mask=mask, use_cache=False, **more)
    assert torch.equal(written, again) and written.shape == (2, 37)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_generate_keeps_codes_and_searches_with_beams(family: str, tiny_model: TinyModel) -> None:
    model = model_of(tiny_model(family), SCHEME)
    more: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    out = model.generate(TOKENS, return_dict_in_generate=True, **more)
    assert all(isinstance(layer, KiviLayer) and layer.nbytes > 0 for layer in out.past_key_values.layers)
    beams = model.generate(TOKENS, num_beams=3, **more)
    assert torch.equal(beams, model.generate(TOKENS, num_beams=3, use_cache=False, **more))


def test_a_prompt_may_come_in_one_cache_and_go_on(tiny_model: TinyModel) -> None:
    model = model_of(tiny_model("llama"), SCHEME)
    cache = DynamicCache()
    with torch.no_grad():
        model(TOKENS[:, :30], past_key_values=cache)
        out = model(TOKENS[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(out, window_of(model)[:, 30:], rtol=1e-5, atol=1e-6)
    cache.reset()
    assert cache.get_seq_length() == 0
    with pytest.raises(QtoolError, match="a quantized cache cannot take tokens back"):
        cache.crop(-1)


def test_caches_of_another_kind_are_refused(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    model = model_of(folder, SCHEME)
    with pytest.raises(QtoolError, match="the cache given to it is of StaticLayer; leave cache_implementation away"):
        model.generate(TOKENS, max_new_tokens=2, cache_implementation="static")
    _, filled = logits_of(model_of(folder, None), (TOKENS,))
    with pytest.raises(QtoolError, match="the cache given to it is already filled; .* a new DynamicCache or none"):
        model(TOKENS, past_key_values=filled)


def test_a_cache_is_quantized_once_and_needs_sdpa(tiny_model: TinyModel) -> None:
    model = model_of(tiny_model("llama"), SCHEME)
    attention = model.model.layers[0].self_attn
    with pytest.raises(QtoolError, match="its cache is quantized already; quantize it once"):
        quantize_by_kivi(attention, SCHEME)
    attention.config._attn_implementation_internal = "eager"
    assert "its attention runs as eager, must run as sdpa" in str(misfit(attention))


@pytest.mark.parametrize("autocast", [False, True])
def test_gradients_reach_what_made_the_keys(autocast: bool, tiny_model: TinyModel) -> None:
    """Training after it goes on: every linear of an attention has a gradient, finite and not zero."""
    model = model_of(tiny_model("llama"), SCHEME)
    linears = [getattr(model.model.layers[0].self_attn, f"{name}_proj").weight.requires_grad_(True) for name in "qkvo"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(TOKENS, use_cache=False).logits
    logits.float().square().mean().backward()
    assert all(bool(torch.isfinite(weight.grad).all()) and float(weight.grad.norm()) > 0 for weight in linears)


def test_inspection_says_that_there_are_no_weights_to_see(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    names = ModelHandle(ModelOptions(path=str(folder))).attention_names()
    for index, name in enumerate(names):
        save_changes(tmp_path / "changes" / f"block_{index:03d}.safetensors", {name: SCHEME})
    handle = ModelHandle(ModelOptions(path=str(folder)), (tmp_path / "changes",))
    eager, hidden = EagerAttention(handle, 44), handle.embed(TOKENS)
    assert "returns no attention weights" in str(eager.weights(handle.block(0), hidden[:1]))


def test_an_attention_that_changes_what_it_cached_is_told(tiny_model: TinyModel) -> None:
    model = model_of(tiny_model("llama"), SCHEME)
    attention = model.model.layers[1].self_attn
    forward, update = attention.forward, "past_key_values"

    class Scaled:
        def __init__(self, cache: Any) -> None:
            self.cache = cache

        def update(self, *args: Any) -> tuple[Tensor, Tensor]:
            k, v = self.cache.update(*args)
            return 2 * k, v

    attention.forward = lambda *args, **kwargs: forward(*args, **kwargs | {update: Scaled(kwargs[update])})
    with pytest.raises(QtoolError, match="does not read the keys and values that it cached as they are"):
        window_of(model)
