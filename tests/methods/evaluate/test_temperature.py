"""Temperatures: greedy at zero, the original's loss of what was written, repetitions counted by hand, pairs of draws."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.calibration.tokens import read_tokens
from qtool.errors import QtoolError
from qtool.methods.evaluate.temperature import METHOD, TemperatureOptions, repetitions, temperature, written_losses
from qtool.model.handle import ModelHandle
from qtool.model.sampling import continued
from qtool.options import ModelOptions

PROMPTS = TemperatureOptions(source="demo:test", samples=3, length=16, tokens=12, temperatures=(0.0, 0.7, 2.0))


def test_at_zero_it_writes_what_generate_does_and_hotter_is_less_likely() -> None:
    model = ModelHandle(ModelOptions(path="demo", dtype="float32"))
    prompts = read_tokens(PROMPTS, model.tokenizer, 0)
    with model.materialized() as module:
        ours = continued(module, prompts, 28, 0.0, torch.Generator())
        theirs = module.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, min_new_tokens=12, do_sample=False
        )
    assert torch.equal(ours, theirs)
    parts = {one.part: one.value for one in temperature(model, model, PROMPTS, 0) if one.name == "written_loss"}
    assert parts["temperature: 0"] < parts["temperature: 0.7"] < parts["temperature: 2"]
    assert parts[None] == pytest.approx(sum(parts[f"temperature: {t}"] for t in ("0", "0.7", "2")) / 3)


def test_the_originals_loss_of_written_tokens_is_the_definition() -> None:
    model = ModelHandle(ModelOptions(path="demo", dtype="float32"))
    windows = read_tokens(PROMPTS, model.tokenizer, 0)
    found = written_losses(model, windows, 10)
    with model.materialized() as module, torch.no_grad():
        log_p = module(windows).logits.log_softmax(-1)
    for index, window in enumerate(windows):
        expected = -sum(float(log_p[index, t - 1, window[t]]) for t in range(10, 16)) / 6
        assert float(found[index]) == pytest.approx(expected, rel=1e-4)


def test_both_models_draw_with_the_same_numbers(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    folder = tiny_model("llama")
    original, same = (ModelHandle(ModelOptions(path=str(folder))) for _ in range(2))
    first, second = temperature(original, original, PROMPTS, 0), temperature(same, original, PROMPTS, 0)
    assert first == second
    rounded = temperature(quantized(folder, "w2a16g32"), original, PROMPTS, 0)
    assert rounded[0].value != first[0].value


def test_repetitions_are_runs_of_four_that_stood_before() -> None:
    rows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [1, 1, 1, 1, 1, 1, 1, 1], [1, 2, 3, 4, 5, 6, 7, 8]])
    assert repetitions(rows).tolist() == pytest.approx([1 / 5, 4 / 5, 0])


@pytest.mark.parametrize(
    ("update", "refused"),
    [
        ({"temperatures": (0.5, -1.0)}, "temperatures holds -1; must be 0 or more"),
        ({"tokens": 500}, "the model's 512 positions"),
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(update: dict[str, object], refused: str) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match=refused):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), PROMPTS.model_copy(update=update))
