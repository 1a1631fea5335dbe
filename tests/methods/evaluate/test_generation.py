"""Generation: the likeliest tokens of transformers' own loop, texts that end where they end, and figures of speed."""

import math

import pytest
import torch

from qtool.artifact import Metric, Sample
from qtool.calibration.tokens import read_tokens
from qtool.errors import QtoolError
from qtool.methods.evaluate.generation import METHOD, GenerationOptions, generation, until_end
from qtool.model.handle import ModelHandle
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


def test_a_text_ends_before_the_token_that_ends_it() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    end = model.tokenizer.eos_token_id
    assert until_end(model, torch.tensor([5, 6, end, 7, end])).tolist() == [5, 6]
    assert until_end(model, torch.tensor([5, 6])).tolist() == [5, 6]


def test_texts_longer_than_the_model_takes_are_refused() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="length 16 and 500 written tokens are more than the model's 512 positions"):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), PROMPTS.model_copy(update={"tokens": 500}))
