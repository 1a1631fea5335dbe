"""Preservation set: each order as plain loops over an ordinary model have it, turns, windows beside it, what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.errors import QtoolError
from qtool.methods.calibrate.preservation import (
    METHOD,
    PreservationOptions,
    diverse_order,
    preservation,
    saliency_and_margin,
    take_turns,
)
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = {"source": "demo:calibration", "length": 24}


def handle(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder), device="cpu"))


def pool_of(model: ModelHandle, candidates: int) -> torch.Tensor:
    return read_tokens(TextOptions.model_validate(TEXT), model.tokenizer, 0)[:candidates]


def test_saliency_and_margin_are_the_definitions(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    model = handle(folder)
    pool = pool_of(model, 5)
    saliency, margin = saliency_and_margin(model, pool)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, window in enumerate(pool):
        plain.zero_grad()
        out = plain(window[None], labels=window[None])
        out.loss.backward()
        total, count = 0.0, 0
        for name, w in plain.named_parameters():
            if "layers" in name and "norm" not in name:
                assert w.grad is not None
                total += float((w.detach() * w.grad).double().abs().sum())
                count += w.numel()
        assert float(saliency[index]) == pytest.approx(total / count, rel=1e-4)  # float32 sums in another order
        margins = []
        for row in out.logits[0, :-1].detach().double().softmax(-1).tolist():
            first, second = sorted(row)[-1:-3:-1]
            margins.append(first - second)
        assert float(margin[index]) == pytest.approx(sum(margins) / len(margins), rel=1e-4)
    assert len(set(saliency.tolist())) == 5


def test_weights_of_the_model_take_no_gradient_and_keep_their_bits(tiny_model: Callable[..., Path]) -> None:
    model = handle(tiny_model("llama", dtype="bfloat16"))
    pool = pool_of(model, 2)
    before = model.final_hidden(pool[:1]).clone()
    saliency_and_margin(model, pool)
    with model.materialized() as module:
        assert not any(p.requires_grad for p in module.parameters())
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert torch.equal(handle(model.folder).final_hidden(pool[:1]), before)


def test_an_expert_without_a_token_counts_as_zero(tiny_model: Callable[..., Path]) -> None:
    model = handle(tiny_model("mixtral"))
    saliency, _ = saliency_and_margin(model, pool_of(model, 1)[:, :2])  # two tokens cannot come to all experts of all blocks
    assert bool(torch.isfinite(saliency).all()) and float(saliency) > 0


def test_turns_pass_what_another_has_taken_and_orders_that_are_empty() -> None:
    assert take_turns([[0, 1, 2], [0, 3], [3, 4]], 5) == [0, 3, 4, 1, 2]
    assert take_turns([[5], [], [1, 2]], 2) == [5, 1]
    assert take_turns([[1], [1]], 3) == [1]


def test_diversity_takes_of_each_cluster_in_turn_the_nearest_to_its_centre() -> None:
    points = torch.tensor([[0.0, 1], [0, 0.1], [0, -1.4], [50, 0], [50, 3], [50, 4]])
    order = diverse_order(points, 2, 0)
    assert sorted(order) == list(range(6))
    left, right = [index for index in order if index < 3], [index for index in order if index > 2]
    assert left == [1, 0, 2] and right == [4, 5, 3]  # centres (0, -0.1) and (50, 2.33)
    assert [index < 3 for index in order[:2]] in ([True, False], [False, True])
    assert diverse_order(points, 1, 0)[0] == 0  # nearest to the middle of all, (25, 1.12)


def test_a_set_holds_the_first_of_each_order_and_stands_evenly_among_others(tiny_model: Callable[..., Path]) -> None:
    model = handle(tiny_model("llama"))
    pool = pool_of(model, 12)
    options = PreservationOptions.model_validate(TEXT | {"samples": 8, "preserved": 3, "candidates": 12, "clusters": 2})
    found = preservation(model, options, 0)
    saliency, margin = saliency_and_margin(model, pool)
    kept = found[options.places()]
    assert options.places().tolist() == [0, 2, 5]
    numbers = [pool.tolist().index(window) for window in found.tolist()]
    assert len(set(numbers)) == 8
    E = torch.nn.functional.normalize(model.final_hidden(pool).mean(1), dim=-1)
    expected: list[int] = []  # by three turns, the first of each order that is not yet there
    for order in (saliency.argsort(descending=True), margin.argsort(), torch.tensor(diverse_order(E, 2, 0))):
        expected.append(next(index for index in order.tolist() if index not in expected))
    assert kept.tolist() == pool[sorted(expected)].tolist()
    alone = preservation(model, options.model_copy(update={"samples": 3, "preserved": None}), 0)
    assert torch.equal(alone, kept)
    other = preservation(model, options, 1)
    assert not torch.equal(other, found)


def test_what_does_not_fit_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clusters is 4, must be no more than samples and candidates"):
        PreservationOptions.model_validate(TEXT | {"samples": 3, "clusters": 4})
    with pytest.raises(ValueError, match="preserved is 5, must be no more than samples, 3"):
        PreservationOptions.model_validate(TEXT | {"samples": 3, "preserved": 5, "clusters": 1})
    model = handle(tiny_model("llama"))
    assert METHOD.check is not None
    options = PreservationOptions.model_validate(TEXT | {"samples": 3, "clusters": 1})
    with pytest.raises(QtoolError, match="calibrate/preservation: length 513 is more than"):
        METHOD.check(model, options.model_copy(update={"length": 513}))
    (tmp_path / "short.txt").write_text("x = 1\n" * 40)
    short = options.model_copy(update={"source": str(tmp_path / "short.txt"), "samples": 99})
    with pytest.raises(QtoolError, match="gives a pool of .* windows of 24 tokens, 99 are to be chosen"):
        preservation(model, short, 0)
