"""KL divergence from the original: zero for itself, the definition for others, larger with fewer bits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.artifact import Metric
from qtool.calibration.tokens import read_tokens
from qtool.errors import QtoolError
from qtool.methods.evaluate.kl_divergence import METHOD, KlOptions, kl_divergence
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = KlOptions(source="demo:test", samples=9, length=48)  # nine: two batches of unequal size


def whole(metrics: list[Metric]) -> list[Metric]:
    """Those of all the text."""
    return [metric for metric in metrics if metric.part is None]


def test_the_original_is_at_distance_zero_from_itself() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    divergence, agreement, _ = whole(kl_divergence(model, model, TEXT, seed=0))
    assert (divergence.value, divergence.stderr, divergence.unit) == (0.0, 0.0, "nats/token")
    assert (agreement.value, agreement.stderr, agreement.unit) == (1.0, 0.0, "fraction")
    assert divergence.parts is None  # nothing to be compared with


def test_a_second_handle_of_the_original_is_at_distance_zero_too() -> None:
    options = ModelOptions(path="demo")
    divergence, agreement, _ = whole(kl_divergence(ModelHandle(options), ModelHandle(options), TEXT, seed=0))
    assert (divergence.value, agreement.value) == (0.0, 1.0)


def test_it_is_the_definition(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    folder = tiny_model("llama")
    original, model = ModelHandle(ModelOptions(path=str(folder))), quantized(folder, "w3a16g32")
    divergence, agreement, _ = whole(kl_divergence(model, original, TEXT, seed=0))
    tokens = read_tokens(TEXT, model.tokenizer, 0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), model.materialized() as rounded:
        p = plain(tokens).logits[:, :-1].double().log_softmax(-1)
        q = rounded(tokens).logits[:, :-1].double().log_softmax(-1)
    windows = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean(-1)  # [samples]
    assert divergence.value == pytest.approx(float(windows.mean()), rel=1e-5)  # float32 log-softmax against float64
    assert divergence.stderr == pytest.approx(float(windows.std()) / 3, rel=1e-4)
    same = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    assert agreement.value == pytest.approx(same, rel=1e-12)  # a mean of means over windows of one length


def test_fewer_bits_are_further_away(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    original = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    values = []
    for bits in (8, 4, 2):
        model = quantized(tiny_model("llama", name=f"w{bits}"), f"w{bits}a16g32")
        values.append(kl_divergence(model, original, TEXT, seed=0)[0].value)
    assert 0 < values[0] < values[1] < values[2]


def test_one_window_has_no_standard_error() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    divergence, agreement, _ = whole(kl_divergence(model, model, TEXT.model_copy(update={"samples": 1}), seed=0))
    assert (divergence.stderr, agreement.stderr) == (None, None)


def test_windows_longer_than_the_model_takes_are_refused_before_any_work() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="^evaluate/kl_divergence: length 513 is more than the model's 512 positions"):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), TEXT.model_copy(update={"length": 513}))


def test_agreement_and_positions_are_as_defined(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    folder = tiny_model("llama")
    original, model = ModelHandle(ModelOptions(path=str(folder))), quantized(folder, "w3a16g32")
    metrics = {(one.name, one.part): one.value for one in kl_divergence(model, original, TEXT, seed=0)}
    tokens = read_tokens(TEXT, model.tokenizer, 0)
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad(), model.materialized() as rounded:
        p, q = plain(tokens).logits[:, :-1].double().log_softmax(-1), rounded(tokens).logits[:, :-1].double().log_softmax(-1)
    shared = [
        len(set(a.topk(5).indices.tolist()) & set(b.topk(5).indices.tolist())) / 5
        for a, b in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True)
    ]
    # Two tokens of almost the same probability may change places between float32 and float64.
    assert metrics["top5_agreement", None] == pytest.approx(sum(shared) / len(shared), abs=1e-3)
    divergences = (p.exp() * (p - q)).sum(-1)  # [samples, 47], the predictions of positions 1 to 47
    assert metrics["kl_divergence", "positions: 1-15"] == pytest.approx(float(divergences[:, :15].mean()), rel=1e-5)
    assert metrics["kl_divergence", "positions: 16-47"] == pytest.approx(float(divergences[:, 15:].mean()), rel=1e-5)
    assert ("kl_divergence", "positions: 64-255") not in metrics
