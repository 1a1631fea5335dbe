"""Perplexity: agrees with a plain transformers loop; its errors follow from the windows."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.calibration.tokens import read_tokens
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.errors import QtoolError
from qtool.methods.evaluate.perplexity import METHOD, perplexity, window_losses
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = WindowOptions(source="demo:test", samples=9, length=48)  # nine: two batches of unequal size


def plain_losses(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """Loss of every window [samples], by transformers and the definition alone."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    means = []
    for window in tokens:
        with torch.no_grad():
            log_p = model(window[None]).logits[0].float().log_softmax(-1)  # [length, vocab]
        means.append(-sum(float(log_p[t - 1, window[t]]) for t in range(1, len(window))) / (len(window) - 1))
    return torch.tensor(means, dtype=torch.float64)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_it_agrees_with_a_plain_transformers_loop(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    model = ModelHandle(ModelOptions(path=str(folder)))
    [metric, *_] = perplexity(model, model, TEXT, seed=0)
    expected = math.exp(plain_losses(folder, read_tokens(TEXT, model.tokenizer, 0)).mean())
    assert metric.value == pytest.approx(expected, rel=1e-6)  # the same windows, float32 log-softmax on both sides
    assert (metric.name, metric.dataset, metric.unit) == ("perplexity", "demo:test", "ppl")


def test_it_agrees_with_a_plain_transformers_loop_on_the_demo_model() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    options = WindowOptions(source="demo:test", samples=8, length=128)
    [metric, *_] = perplexity(model, model, options, seed=0)
    tokens = read_tokens(options, model.tokenizer, 0)
    plain = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    with torch.no_grad():  # one batch, as the handle runs it: bf16 sums depend on the batch
        log_p = plain(tokens).logits[:, :-1].float().log_softmax(-1)
    losses = -log_p.gather(-1, tokens[:, 1:, None]).double()
    assert metric.value == pytest.approx(math.exp(losses.mean()), rel=1e-6)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(plain.lm_head.weight)
    plain.save_pretrained(folder)
    model = ModelHandle(ModelOptions(path=str(folder)))
    [metric, *_] = perplexity(model, model, TEXT, seed=0)
    assert metric.value == pytest.approx(4096, rel=1e-6)  # float32 log of 4096
    assert metric.stderr == pytest.approx(0, abs=1e-9)


def test_the_change_is_paired_window_by_window(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    folder = tiny_model("llama")
    original, model = ModelHandle(ModelOptions(path=str(folder))), quantized(folder, "w4a16g32")
    value, change, _ = perplexity(model, original, TEXT, seed=0)
    tokens = read_tokens(TEXT, model.tokenizer, 0)
    ours, theirs = window_losses(model, read_windows(TEXT, model.tokenizer, 0)), plain_losses(folder, tokens).tolist()
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = sum(differences) / 9
    deviation = math.sqrt(sum((d - mean) ** 2 for d in differences) / 8)
    assert change.value == pytest.approx(math.exp(mean) - 1, rel=1e-4)  # a small difference of float32 losses
    assert change.stderr == pytest.approx(math.exp(mean) * deviation / 3, rel=1e-3)
    assert (change.name, change.unit) == ("perplexity_change", "fraction")
    [before, _] = perplexity(original, original, TEXT, seed=0)
    assert value.value / before.value - 1 == pytest.approx(change.value, rel=1e-9)  # the same floats, regrouped


def test_one_window_has_no_standard_error() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    [metric, *_] = perplexity(model, model, TEXT.model_copy(update={"samples": 1}), seed=0)
    assert metric.stderr is None


def test_windows_come_in_file_order_whatever_the_seed() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    assert perplexity(model, model, TEXT, seed=0) == perplexity(model, model, TEXT, seed=1)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_windows_end_where_the_table_of_positions_does(family: str, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model(family, max_position_embeddings=48))))
    assert METHOD.check is not None
    METHOD.check(model, TEXT)
    [metric, *_] = perplexity(model, model, TEXT, seed=0)
    assert math.isfinite(metric.value)
    longer = TEXT.model_copy(update={"length": 49})
    with pytest.raises(QtoolError, match="^evaluate/perplexity: length 49 is more than the model's 48 positions"):
        METHOD.check(model, longer)
    with pytest.raises(IndexError):  # what the check spares the user
        perplexity(model, model, longer, seed=0)


def test_a_text_that_is_too_short_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("def f(): pass\n")
    options = WindowOptions(source=str(tmp_path / "short.txt"))
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="gives 0 windows"):
        METHOD.check(ModelHandle(ModelOptions(path="demo")), options)


def test_sliding_windows_predict_each_token_once_after_what_stands_before_it(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model = ModelHandle(ModelOptions(path=str(folder)))
    text = folder / "text.txt"
    text.write_text("import os\n\n\ndef first(path):\n    return os.listdir(path)[0]\n" * 3)
    options = WindowOptions(source=str(text), length=24, stride=9)
    [metric, *_] = perplexity(model, model, options, seed=0)
    ids = model.tokenizer(text.read_text())["input_ids"]
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, begun, reached = 0.0, 0, 1
    while reached < len(ids):  # the loop of transformers' guide, its last window moved back to full length
        end = min(begun + 24, len(ids))
        with torch.no_grad():
            log_p = plain(torch.tensor([ids[end - 24 : end]])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[t - 1 - (end - 24), ids[t]]) for t in range(max(reached, end - 24 + 1), end))
        begun, reached = begun + 9, end
    assert metric.value == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)  # float32 sums of other shapes


def test_bits_per_byte_counts_the_text_that_is_predicted(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model = ModelHandle(ModelOptions(path=str(folder)))
    text = folder / "text.txt"
    text.write_text("naïve = 'ünïcödé ✓'\n" * 20, encoding="utf-8")
    options = WindowOptions(source=str(text), length=16)
    windows = read_windows(options, model.tokenizer, 0)
    value, bits = perplexity(model, model, options, seed=0)
    predicted = [model.tokenizer.decode(window[1:]) for window in windows.tokens]
    assert windows.n_bytes is not None
    # Windows that begin or end within a character hold bytes that decode to a replacement mark.
    n_bytes = sum(len(text.replace("\ufffd", "").encode()) for text in predicted)
    assert abs(sum(windows.n_bytes) - n_bytes) <= 4 * len(predicted)
    nats = math.log(value.value) * 15 * len(predicted)
    assert bits.value == pytest.approx(nats / math.log(2) / sum(windows.n_bytes), rel=1e-9)


def test_domains_have_figures_of_their_own_and_windows_keep_to_one(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    import json

    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    rows = [{"text": text * 30, "kind": kind} for text, kind in (("import os\n", "code"), ("Of the sea. ", "prose")) * 2]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = WindowOptions(source=str(tmp_path / "two.jsonl"), domain="kind", length=16, samples=3)
    found = {(one.name, one.part): one for one in perplexity(model, model, options, seed=0)}
    code, prose = (found["perplexity", f"domain: {kind}"].value for kind in ("code", "prose"))
    assert found["perplexity", None].value == pytest.approx(math.sqrt(code * prose), rel=1e-9)  # as many windows of each
    windows = read_windows(options, model.tokenizer, 0)
    assert windows.domains == ["code"] * 3 + ["prose"] * 3
    assert all("sea" not in model.tokenizer.decode(window) for window in windows.tokens[:3])
    with pytest.raises(QtoolError, match="kind code, gives .* windows, 99 windows of 16 tokens are asked for"):
        read_windows(options.model_copy(update={"samples": 99}), model.tokenizer, 0)
