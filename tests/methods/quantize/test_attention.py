"""Attention in few bits: numbers one by one, the products of a whole model, stored and loaded, and what is refused."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import qtool
from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme
from qtool.layers.kivi_cache import View, attend
from qtool.methods.quantize.attention import AttentionOptions, attention
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import quantize_by_kivi, round_attention
from qtool.options import ModelOptions
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.plan import make_plan
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, parse

TinyModel = Callable[..., Path]
BOTH = "quantize/attention: {queries: int8, probabilities: int8}"
ROUNDING = AttentionRounding(queries="int8", probabilities="int8")
TOKENS = torch.randint(2, 4096, (2, 36), generator=torch.Generator().manual_seed(0))  # [samples, length]


def recipe_of(folder: Path, *steps: str) -> Recipe:
    return parse("\n".join([f"model: {folder}", "pipeline:", *(f"  - {step}" for step in steps)]), "r")


def test_queries_and_probabilities_worked_by_hand() -> None:
    """A query to 7.5 has steps of 1 in four bits; probabilities to 0.75 steps of 0.05, from 0 on."""
    q, A = torch.tensor([[7.5, -2.4, 0.6, -7.0]]), torch.tensor([[0.75, 0.13, 0.095, 0.0], [1.0, 0.0, 0.0, 0.0]])
    found_q, found_A = attention(q, A, AttentionOptions(queries="int4", probabilities="int4"))
    assert found_q.tolist() == [[7.0, -2.0, 1.0, -7.0]]
    torch.testing.assert_close(found_A, torch.tensor([[0.75, 0.15, 0.10, 0.0], [1.0, 0.0, 0.0, 0.0]]))


def rounded(numbers: list[float], low: int, high: int, steps: float) -> list[float]:
    """Whole numbers of a step that the largest magnitude has `steps` of, in float32, as ties are at the ends."""
    x = torch.tensor(numbers)
    step = x.abs().max() / steps
    return [float((one / step).round().clamp(low, high) * step) for one in x]


def test_the_products_are_those_of_rounded_rows_one_by_one() -> None:
    q, k, v = torch.randn(3, 2, 4, 20, 16, generator=torch.Generator().manual_seed(1)).unbind(0)
    k, v = k[:, :2], v[:, :2]
    found = attend(ROUNDING.round_queries(q), View.plain(k, v, 20), None, 0.25, 0.0, ROUNDING)
    expected = torch.empty(2, 20, 4, 16)
    for sample in range(2):
        for head in range(4):
            for t in range(20):
                query = torch.tensor(rounded(q[sample, head, t].tolist(), -128, 127, 127.5))
                scores = [0.25 * float(query @ key) for key in k[sample, head // 2, : t + 1]]
                weights = [math.exp(score - max(scores)) for score in scores]
                row = rounded([weight / sum(weights) for weight in weights], 0, 255, 255)
                mixed = [weight * value for weight, value in zip(row, v[sample, head // 2], strict=False)]
                expected[sample, t, head] = torch.stack(mixed).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits_of(model: Any, pieces: tuple[Tensor, ...], use_cache: bool) -> Tensor:
    past, found = None, []
    for piece in pieces:
        out = model(piece, past_key_values=past, use_cache=use_cache)
        past = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("with_kivi", [False, True], ids=["plain", "kivi"])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_tokens_one_by_one_are_the_window(family: str, with_kivi: bool, tiny_model: TinyModel) -> None:
    """Beside a cache that grows, one whose windows slide, and one of codes."""
    handle = ModelHandle(ModelOptions(path=str(tiny_model(family))))
    names, model = handle.attention_names(), handle.take().double()
    plain = logits_of(model, (TOKENS,), False)
    for name in names:
        round_attention(model.get_submodule(name), ROUNDING)
        if with_kivi:
            quantize_by_kivi(model.get_submodule(name), KiviScheme(group=16, residual=4))
    whole = logits_of(model, (TOKENS,), False)
    steps = logits_of(model, (TOKENS[:, :20], *TOKENS[:, 20:].split(1, 1)), True)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)
    assert not torch.equal(whole, plain)


def test_the_loaded_export_rounds_what_was_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, measured = tiny_model("llama"), "evaluate/perplexity: {source: demo:test, samples: 2, length: 40}"
    recipe = recipe_of(folder, BOTH, measured, "export/qtool: {}")
    assert make_plan(recipe).attention == str(ROUNDING) == "queries int8, probabilities int8"
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert results["model"]["attention"] == str(ROUNDING) and results["model"]["cache"] is None
    perplexity = {row["subject"]: row["value"] for row in results["metrics"] if row["name"] == "perplexity"}
    assert perplexity["compressed"] == perplexity["export:qtool"] != perplexity["original"]
    export = tmp_path / "run" / "exports" / "qtool"
    assert ModelHandle(ModelOptions(path=str(export))).rounding() == ROUNDING
    model = qtool.load(export)
    more: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(TOKENS, **more), model.generate(TOKENS, use_cache=False, **more))
    with pytest.raises(QtoolError, match="the model's attention has queries int8, probabilities int8 already"):
        check_recipe(recipe_of(export, BOTH))
    with pytest.raises(QtoolError, match="export/safetensors cannot hold an attention with queries int8"):
        check_recipe(recipe_of(export, "export/safetensors: {}"))


@pytest.mark.parametrize(
    ("family", "steps", "message"),
    [
        ("llama", ("quantize/rtn: {scheme: w4a16g32}", BOTH, "export/gguf: {}"), "cannot hold an attention that rounds"),
        ("llama", (BOTH, BOTH), "r:3 rounds attentions already; state all in one step"),
        ("llama", ("quantize/attention: {}",), "rounds nothing; state queries or probabilities"),
        ("llama", ("quantize/attention: {queries: int3}",), 'queries is "int3"; valid: int4'),
        ("falcon", (BOTH,), "does not go through transformers' AttentionInterface"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(
    family: str, steps: tuple[str, ...], message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(QtoolError, match=message):
        check_recipe(recipe_of(tiny_model(family), *steps))


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    q, A = torch.randn(3, 16, requires_grad=True), torch.rand(3, 8, requires_grad=True)
    (ROUNDING.round_queries(q).sum() + ROUNDING.round_probabilities(A).sum()).backward()
    assert q.grad is not None and torch.equal(q.grad, torch.ones_like(q))
    assert A.grad is not None and torch.equal(A.grad, torch.ones_like(A))
