"""Generation: the likeliest tokens of transformers' own loop, texts that end where they end, and figures of speed."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifact import Metric, Sample
from qtool.calibration.tokens import read_tokens
from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme
from qtool.methods.evaluate.generation import METHOD, GenerationOptions, generation, until_end
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import KiviLayer
from qtool.model.store import save_changes
from qtool.options import ModelOptions

PROMPTS = GenerationOptions(source="demo:test", samples=2, length=16, tokens=10)


def test_it_writes_the_likeliest_tokens_and_measures_them() -> None:
    model = ModelHandle(ModelOptions(path="demo", dtype="float32"))
    found = generation(model, model, PROMPTS, 0)
    samples = [one for one in found if isinstance(one, Sample)]
    metrics = {one.name: one for one in found if isinstance(one, Metric)}
    prompts = read_tokens(PROMPTS, model.tokenizer, 0)
    with model.materialized() as module, torch.no_grad():
        for prompt, sample in zip(prompts, samples, strict=True):
            ids = prompt[None]
            for _ in range(10):  # no cache, one token at a time
                ids = torch.cat([ids, module(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            assert sample.prompt == model.tokenizer.decode(prompt)
            assert sample.text == model.tokenizer.decode(until_end(model, ids[0, 16:]))
    assert set(metrics) == set(METHOD.measures or ())
    assert all(math.isfinite(one.value) and one.value > 0 for one in metrics.values())
    tensors = sum(p.numel() * 4 for p in model.model.parameters())
    assert metrics["model_memory"].value * 2**30 == pytest.approx(tensors, rel=0.01)  # rotary tables beside the weights
    assert len(metrics["tokens_per_second"].parts or ()) == 2 and metrics["tokens_per_second"].higher_is_better is True


def test_memory_and_texts_are_those_of_the_packed_cache_that_generate_fills(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    scheme = KiviScheme(group=16, residual=8, sinks=2)
    options = ModelOptions(path=str(tiny_model("llama")))
    for index in range(2):
        name = f"model.layers.{index}.self_attn"
        save_changes(tmp_path / "changes" / f"block_{index:03d}.safetensors", {name: scheme})
    plain, packed = ModelHandle(options), ModelHandle(options, (tmp_path / "changes",))
    prompts = GenerationOptions(source="demo:test", samples=1, length=48, tokens=8)
    held = []
    for model in (plain, packed):
        found = generation(model, plain, prompts, 0)
        (memory,) = [one.value for one in found if isinstance(one, Metric) and one.name == "cache_memory"]
        (sample,) = [one for one in found if isinstance(one, Sample)]
        prompt = read_tokens(prompts, model.tokenizer, 0)
        with model.materialized() as module:
            out = module.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True,
            )  # fmt: skip
        assert sample.text == model.tokenizer.decode(until_end(model, out.sequences[0, 48:]))
        tensors = [part for layer in out.past_key_values.layers for part in tensors_of(layer)]
        assert memory * 2**30 == sum(part.numel() * part.element_size() for part in tensors)
        held.append(memory * 2**30)
    assert held[0] == 2 * 2 * 2 * 55 * 16 * 4  # blocks, keys and values, heads, tokens, channels, bytes
    # Of 55 tokens two are sinks and at least eight late, as they are; the others take two bits, and a float16 scale and zero
    # for 16 numbers. Keys wait until 16 have gathered: 32 tokens are packed of them, of values 45.
    numbers = 2 * 2 * 16 * (32 + 45)
    assert held[1] == numbers * 2 / 8 + numbers / 16 * 4 + 2 * 2 * 16 * 4 * (55 - 32 + 55 - 45)


def tensors_of(layer: Any) -> list[torch.Tensor]:
    """What a layer of a cache keeps of its tokens."""
    if isinstance(layer, KiviLayer):
        return [part for held in (layer.cache._k, layer.cache._v) if held is not None for part in held.tensors()]
    return [layer.keys, layer.values]


def test_a_text_ends_before_the_token_that_ends_it() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    end = model.tokenizer.eos_token_id
    assert until_end(model, torch.tensor([5, 6, end, 7, end])).tolist() == [5, 6]
    assert until_end(model, torch.tensor([5, 6])).tolist() == [5, 6]


def test_texts_longer_than_the_model_takes_are_refused() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="length 16 and 500 written tokens are more than the model's 512 positions"):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), PROMPTS.model_copy(update={"tokens": 500}))
