"""Text that the model writes: its own draws, from BOS, as likely as it says."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.errors import QtoolError
from qtool.methods.calibrate.self_generated import METHOD, SelfGeneratedOptions, self_generated
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


def loss_of(model: ModelHandle, tokens: torch.Tensor) -> float:
    """Nats a token of the model on windows."""
    with model.materialized() as module, torch.no_grad():
        log_p = module(tokens).logits[:, :-1].float().log_softmax(-1)
    return float(-log_p.gather(-1, tokens[:, 1:, None]).mean())


def test_it_writes_what_it_finds_likely_and_colder_is_likelier() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    warm, cold = (self_generated(model, SelfGeneratedOptions(samples=4, length=48, temperature=t), 0) for t in (1.0, 0.3))
    assert warm.shape == (4, 48) and bool((warm[:, 0] == model.tokenizer.bos_token_id).all())
    assert len({tuple(window) for window in warm.tolist()}) == 4
    assert loss_of(model, cold) < loss_of(model, warm) < math.log(4096) - 2  # chance would lose log 4096


def test_draws_follow_the_models_distribution(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", initializer_range=0.5)
    model = ModelHandle(ModelOptions(path=str(folder)))
    written = self_generated(model, SelfGeneratedOptions(samples=2000, length=2), 0)
    with model.materialized() as module, torch.no_grad():
        p = module(torch.tensor([[0]])).logits[0, -1].softmax(-1)
    for token in p.topk(3).indices.tolist():
        found = float((written[:, 1] == token).double().mean())
        assert found == pytest.approx(float(p[token]), abs=5 * math.sqrt(float(p[token]) / 2000))


def test_without_a_bos_token_windows_begin_anywhere(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    model.tokenizer.bos_token = None
    assert len(set(self_generated(model, SelfGeneratedOptions(samples=8, length=2), 0)[:, 0].tolist())) > 4


def test_windows_longer_than_the_model_takes_are_refused() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="calibrate/self_generated: length 513 is more than"):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), SelfGeneratedOptions(length=513))
