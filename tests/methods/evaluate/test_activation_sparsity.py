"""Activation sparsity: zeros alone at p = 0, more where more may be lost, and a loss that keeps to the budget."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.calibration.windows import read_windows
from qtool.errors import QtoolError
from qtool.methods.evaluate.activation_sparsity import (
    Neurons,
    SparsityOptions,
    activation_sparsity,
    find_neurons,
    hooked,
    mean_loss,
    sparse_pass,
)
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = SparsityOptions(source="demo:test", samples=3, length=48)


def sparsity(model: ModelHandle, percent: float) -> float:
    found = activation_sparsity(model, model, TEXT.model_copy(update={"percent": percent}), 0)
    assert [one.name for one in found if one.part is None] == ["activation_sparsity", "cett"]
    return found[0].value


def test_more_is_left_out_where_more_may_be_lost_and_the_budget_is_kept() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    values = [sparsity(model, percent) for percent in (0, 1, 10)]
    assert values[0] < 1e-3 < values[1] < values[2] < 1  # SiLU makes hardly a zero
    found = {one.name: one.value for one in activation_sparsity(model, model, TEXT, 0) if one.part is None}
    tokens = read_windows(TEXT, model.tokenizer, 0).tokens
    with model.materialized() as module, torch.no_grad():
        neurons = find_neurons(model)
        with hooked(neurons, lambda one, a: one.tabulate(a)):
            dense = mean_loss(module, tokens, model.device)
        within, _ = sparse_pass(module, tokens, neurons, found["cett"], model.device)
        beyond, _ = sparse_pass(module, tokens, neurons, found["cett"] + 0.02, model.device)
    assert math.exp(within - dense) <= 1.01 < math.exp(beyond - dense)


def test_zeros_of_a_relu_model_count_at_no_loss(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("opt"))))
    counted = []
    with model.materialized() as module, torch.no_grad():
        for one in find_neurons(model):
            one.linear.register_forward_pre_hook(lambda _, args: counted.append((args[0] == 0).double().mean()))
        module(read_windows(TEXT, model.tokenizer, 0).tokens)
    zeros = float(torch.stack(counted).mean())
    assert 0.2 < zeros < 0.8
    assert sparsity(model, 0) == pytest.approx(zeros, abs=1e-3)  # batches of other shapes round some sums to the other side


def test_the_tables_error_is_the_definition() -> None:
    random = torch.Generator().manual_seed(0)
    W, a = torch.randn(6, 10, generator=random), torch.randn(50, 10, generator=random)
    one = Neurons(torch.nn.Identity(), W.norm(dim=0), W)
    one.tabulate(a[:20])
    one.tabulate(a[20:])
    assert one.thresholds is not None
    t = float(one.thresholds[9])
    expected = 0.0
    for row in a:
        left = sum((row[i] * W[:, i] for i in range(10) if abs(row[i]) * W[:, i].norm() < t), torch.zeros(6))
        expected += float(left.norm() / (W @ row).norm()) / 50
    assert float(one.error[9] / one.n_tokens) == pytest.approx(expected, rel=1e-5)
    assert one.threshold(expected) == pytest.approx(t, rel=1e-4)
    assert one.threshold(0.0) == 0.0 and one.threshold(99.0) == float(one.thresholds[-1])


def test_mixtures_are_refused(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("mixtral"))))
    with pytest.raises(QtoolError, match="block 0 has 4 linears from a feed-forward layer's neurons"):
        activation_sparsity(model, model, TEXT, 0)
