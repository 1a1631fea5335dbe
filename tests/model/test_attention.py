"""Attention weights of one block are those that transformers' own eager forward of the whole model has."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.model.attention import EagerAttention
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

LENGTH = 24  # longer than the sliding windows of 16


def tokens() -> Tensor:
    return torch.randint(2, 4096, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def test_every_family_gives_the_weights_that_its_whole_model_has(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        expected = plain(tokens()[1:], output_attentions=True, use_cache=False).attentions
    model = ModelHandle(ModelOptions(path=str(folder)))
    before = model.model.config._attn_implementation
    attention = EagerAttention(model, LENGTH)
    hidden = model.embed(tokens())
    for block in model.blocks():
        found = attention.weights(block, hidden[1:])
        assert not isinstance(found, str), found
        torch.testing.assert_close(torch.cat(found), expected[block.index][0], rtol=1e-4, atol=1e-6)
        hidden = block.forward(hidden)
    assert model.model.config._attn_implementation == before


def test_several_windows_have_the_weights_of_each_alone_and_gradients_reach_them(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    one, two, hidden = EagerAttention(model, LENGTH), EagerAttention(model, LENGTH, 2), model.embed(tokens())
    block = model.block(0)
    assert block.model is model
    x = hidden.requires_grad_()
    out, (weights,) = two.forward(block, x)
    torch.testing.assert_close(out, block.call(x))
    for place in range(2):
        (alone,) = one.weights(block, x[place : place + 1])
        torch.testing.assert_close(weights[place], alone)
    (gradient,) = torch.autograd.grad(weights.square().sum(), x)
    assert bool(gradient.any())


class Silent(nn.Module):
    """In place of attention: changes nothing and returns no weights."""

    def forward(self, hidden_states: Tensor, **rest: object) -> tuple[Tensor, None]:
        return hidden_states, None


def test_a_block_without_weights_says_so(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    attention, hidden = EagerAttention(model, LENGTH), model.embed(tokens())
    block = model.block(0)
    block.module.self_attn = Silent()
    assert attention.weights(block, hidden[:1]) == "its forward returns no attention weights, even where attention is eager"


class Other(nn.Module):
    """In place of attention: eager or not makes a difference."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config

    def forward(self, hidden_states: Tensor, **rest: object) -> tuple[Tensor, Tensor]:
        n = hidden_states.shape[1]
        sign = -1 if self.config._attn_implementation == "eager" else 1  # type: ignore[attr-defined]
        return sign * hidden_states, torch.eye(n).expand(1, 4, n, n)


def test_weights_that_are_not_those_in_use_are_not_taken(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    attention, hidden = EagerAttention(model, LENGTH), model.embed(tokens())
    block = model.block(0)
    block.module.self_attn = Other(block.module.self_attn.config)
    found = attention.weights(block, hidden[:1])
    assert isinstance(found, str) and "gives another output" in found
