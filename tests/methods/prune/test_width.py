"""Width pruning against scores summed in loops over plain transformers' activations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.calibration.importance import Importance, UnitScores, head_partners, kept_units
from qtool.errors import QtoolError
from qtool.methods.prune.width import WidthOptions, shape_after, width
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


@pytest.fixture
def handle(tiny_model: Callable[..., Path]) -> Callable[..., ModelHandle]:
    return lambda family, **fields: ModelHandle(ModelOptions(path=str(tiny_model(family, **fields))))


@torch.no_grad()
def test_scores_are_means_over_tokens_and_norms_over_windows(handle: Callable[..., ModelHandle], windows: Tensor) -> None:
    model = handle("llama")
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    seen: dict[str, Tensor] = {}
    for name, module in plain.named_modules():
        if name.endswith(("down_proj", "o_proj")):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args[0]}))
        elif name.endswith("norm"):
            module.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    plain(windows)

    def aggregate(values: Tensor) -> Tensor:  # [windows, length, units]
        total = torch.zeros(values.shape[-1])
        for window in values:
            total += sum(token.abs() for token in window).div(len(window)) ** 2
        return total.sqrt()

    scores = Importance(model, windows).of_units(["neurons", "heads", "hidden"])
    assert len(scores) == 5  # two blocks' neurons, two blocks' heads, one choice of channels
    for block in range(2):
        layer = f"model.layers.{block}"
        neurons = aggregate(seen[f"{layer}.mlp.down_proj"])
        torch.testing.assert_close(scores[f"neurons:{layer}.mlp"].float(), neurons, rtol=1e-5, atol=1e-6)
        heads = aggregate(seen[f"{layer}.self_attn.o_proj"].unflatten(-1, (4, 16)).norm(dim=-1))
        torch.testing.assert_close(scores[f"heads:{layer}"].float(), heads, rtol=1e-5, atol=1e-6)
    channels = sum(aggregate(out) for name, out in seen.items() if name.endswith("norm"))
    torch.testing.assert_close(scores["hidden:"].float(), channels, rtol=1e-5, atol=1e-6)


def test_whole_groups_go_first_then_heads_of_those_that_stay(handle: Callable[..., ModelHandle]) -> None:
    model = handle("llama", num_attention_heads=8, num_key_value_heads=4, head_dim=8)
    scores = {"heads:model.layers.0": torch.tensor([1.0, 2, 9, 0, 4, 5, 3, 3])}  # groups of two: norms 2.2, 9, 6.4, 4.2
    kept = kept_units(model, scores, shape_after(model, WidthOptions(heads=2, kv_heads=2)))
    assert kept["kv_heads:model.layers.0"].tolist() == [1, 2]
    assert kept["heads:model.layers.0"].tolist() == [2, 5]


def test_expert_neurons_are_chosen_expert_by_expert(handle: Callable[..., ModelHandle], windows: Tensor) -> None:
    cut = width(Importance(handle("mixtral"), windows), WidthOptions(neurons=50), lambda text: None)
    names = [name for name in cut.kept if name.startswith("neurons:model.layers.0.mlp.experts.")]
    assert len(names) == 4 and len({tuple(cut.kept[name].tolist()) for name in names}) == 4


def test_the_last_head_that_stays_takes_on_the_best_that_goes() -> None:
    scores = torch.tensor([5.0, 1, 4, 3, 2, 6])  # by rank: 5, 0, 2, 3 stay; 4, 1 go
    partners = head_partners(scores, torch.tensor([0, 2, 3, 5]), 1)
    assert partners.tolist() == [-1, 1, 4, -1]
    grouped = head_partners(scores, torch.tensor([0, 2, 4, 5]), 2)  # 1 goes from the first three, 3 from the last
    assert grouped.tolist() == [-1, 1, 3, -1]


def test_an_expert_without_tokens_has_scores_of_zero() -> None:
    scores = UnitScores(3)
    scores.update(torch.empty(0, 3))
    assert scores.scores().tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"neurons": 129}, "129 neurons are to stay of 128; use 1 to 128"),
        ({}, {"neurons": 128}, "nothing is to go"),
        ({}, {"kv_heads": 1}, "2 heads share a key/value head, more than that cannot stay of a group"),
        ({"num_key_value_heads": 4}, {"heads": 2, "kv_heads": 1}, "each head has keys and values of its own"),
    ],
)
def test_sizes_that_cannot_be_are_refused(
    fields: dict[str, int], options: dict[str, int], message: str, handle: Callable[..., ModelHandle]
) -> None:
    with pytest.raises(QtoolError, match=message):
        shape_after(handle("llama", **fields), WidthOptions(**options))


def test_a_step_without_a_size_is_a_mistake() -> None:
    with pytest.raises(ValidationError, match="states no size"):
        WidthOptions()
    with pytest.raises(ValidationError, match="head_residual adds to heads"):
        WidthOptions(neurons=4, head_residual=True)
