"""Depth pruning against scores worked by hand and cosines taken one token at a time."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.calibration.importance import Importance
from qtool.errors import QtoolError
from qtool.methods.prune.depth import DepthOptions, blocks_to_keep, shape_after
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


def test_all_at_once_drops_the_blocks_of_least_score() -> None:
    worth = {0: 0.9, 1: 0.2, 2: 0.5, 3: 0.1, 4: 0.8}
    kept, seen = blocks_to_keep(5, lambda left: torch.tensor([worth[b] for b in left]), DepthOptions(drop=2))
    assert kept == [0, 2, 4] and len(seen) == 1


def test_one_after_the_other_scores_those_left_anew() -> None:
    """Blocks 1 and 2 do the same: each is worth little beside the other, and much alone."""

    def score(left: list[int]) -> Tensor:
        worth = {0: 0.9, 1: 0.1, 2: 0.2, 3: 0.4}
        if 1 not in left or 2 not in left:
            worth |= {1: 0.7, 2: 0.7}
        return torch.tensor([worth[b] for b in left])

    assert blocks_to_keep(4, score, DepthOptions(drop=2))[0] == [0, 3]
    assert blocks_to_keep(4, score, DepthOptions(drop=2, iterative=True))[0] == [0, 2]


def test_of_equal_scores_the_earlier_block_stays() -> None:
    assert blocks_to_keep(3, lambda left: torch.ones(len(left)), DepthOptions(drop=1))[0] == [0, 1]


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(tiny_model("llama", num_hidden_layers=3))))


@torch.no_grad()
def test_influence_is_the_cosine_of_every_token_taken_one_by_one(model: ModelHandle, windows: Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    states = list(plain(windows, output_hidden_states=True).hidden_states)
    last: list[Tensor] = []
    plain.model.norm.register_forward_pre_hook(lambda module, args: last.append(args[0]))
    plain(windows)
    states[-1] = last[0]  # transformers gives the last state after the norm
    for block, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before.flatten(0, 1), after.flatten(0, 1), strict=True)]
        found = Importance(model, windows).influence([0, 1, 2])[block]
        assert float(found) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


@torch.no_grad()
def test_a_block_that_only_passes_on_has_no_influence(tiny_model: Callable[..., Path], windows: Tensor) -> None:
    folder = tiny_model("llama", num_hidden_layers=3)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for linear in (plain.model.layers[1].self_attn.o_proj, plain.model.layers[1].mlp.down_proj):
        linear.weight.zero_()
    plain.save_pretrained(folder)
    importance = Importance(ModelHandle(ModelOptions(path=str(folder))), windows)
    influence = importance.influence([0, 1, 2])
    assert float(influence[1]) == pytest.approx(0, abs=1e-12) and float(influence.min()) == float(influence[1])
    losses = importance.losses_without([0, 1, 2])
    expected = float(plain(windows, labels=windows).loss)  # windows of one length: the mean of means is the mean
    assert float(losses[1]) == pytest.approx(expected, rel=1e-6)


@torch.no_grad()
def test_the_loss_without_a_block_leaves_out_those_that_are_gone_already(model: ModelHandle, windows: Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    layers = plain.model.layers
    losses = Importance(model, windows).losses_without([0, 2])
    for place, stays in enumerate((2, 0)):
        plain.model.layers = torch.nn.ModuleList([layers[stays]])
        plain.config.num_hidden_layers = 1
        expected = float(plain(windows, labels=windows, use_cache=False).loss)
        assert float(losses[place]) == pytest.approx(expected, rel=1e-6)


def test_one_block_at_least_stays(model: ModelHandle) -> None:
    with pytest.raises(QtoolError, match="0 blocks are to stay of 3; use 1 to 3"):
        shape_after(model, DepthOptions(drop=3))
