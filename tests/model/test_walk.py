"""A walk stops every batch at every linear asked for, lets it be changed there, and ends where a plain forward ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.model.handle import Block, ModelHandle
from qtool.model.walk import Walk
from qtool.model.wiring import find_groups
from qtool.options import ModelOptions

SAMPLES = 20  # two whole batches and a short one


def first_block(folder: Path) -> tuple[Block, Tensor]:
    """The block and its inputs [samples, length, hidden]."""
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    tokens = torch.randint(2, 4096, (SAMPLES, 12), generator=torch.Generator().manual_seed(0))
    hidden = model.embed(tokens)
    return model.block(0), hidden


def double(block: Block, name: str) -> None:
    weight = block.get(name).get_parameter("weight")
    weight.data = 2 * weight.data


class Inputs:
    """Keeps what `observe` hands over."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        self.seen.append(x.clone())


def test_every_family_walks_to_the_output_of_a_plain_forward(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model(family))
    groups = [group.linears for group in find_groups(block, hidden[:1])]
    expected = block.forward(hidden)
    inputs = {names[0]: Inputs() for names in groups}
    block.observe(hidden, inputs)
    with Walk(block, hidden, [names[0] for names in groups]) as walk:
        stops = [(name, [x.clone() for x in batches]) for name, batches in walk]
        assert torch.equal(walk.finish(), expected)
    assert [name for name, _ in stops] == [names[0] for names in groups]
    for name, batches in stops:
        assert all(torch.equal(a, b) for a, b in zip(batches, inputs[name].seen, strict=True)), name


def test_later_stops_see_what_earlier_linears_became(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    block, hidden = first_block(folder)
    stops = [f"{block.name}.{name}" for name in ("self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")]
    seen = {}
    with Walk(block, hidden, stops) as walk:
        for name, batches in walk:
            seen[name] = torch.cat(batches)
            double(block, name)
        output = walk.finish()

    plain, hidden = first_block(folder)
    for name in stops:  # the same changes, each followed by a pass of its own
        observer = Inputs()
        plain.observe(hidden, {name: observer})
        assert torch.equal(torch.cat(observer.seen), seen[name]), name
        double(plain, name)
    assert torch.equal(plain.forward(hidden), output)


def test_a_layer_put_in_a_linears_place_is_the_one_that_runs(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    name = f"{block.name}.mlp.down_proj"
    with Walk(block, hidden, [name]) as walk:
        for _ in walk:
            silent = nn.Linear(128, 64, bias=False)
            nn.init.zeros_(silent.weight)
            block.module.get_submodule("mlp").register_module("down_proj", silent)
        output = walk.finish()
    assert torch.equal(output, block.forward(first_block(tiny_model("llama"))[1]))
    assert "forward" not in vars(silent)


class Fork(nn.Module):
    """In place of an MLP: `a` for batches that `chosen` tells, `b` for all, in either order."""

    def __init__(self, chosen: Callable[[Tensor], bool], a_first: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self._chosen, self._a_first = chosen, a_first

    def forward(self, x: Tensor) -> Tensor:
        if not self._chosen(x):
            return self.b(x)
        return self.b(self.a(x)) if self._a_first(x) else self.a(self.b(x))


def is_whole(x: Tensor) -> bool:
    return len(x) == 8


def test_batches_that_leave_a_linear_out_wait_for_the_others(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    block.module.mlp = Fork(chosen=lambda x: not is_whole(x), a_first=lambda x: True)  # only the last batch calls a
    stops = [f"{block.name}.mlp.{name}" for name in ("a", "b")]
    with Walk(block, hidden.clone(), stops) as walk:
        counts = {name: [len(batch) for batch in batches] for name, batches in walk}
        output = walk.finish()
    assert counts == {stops[0]: [4], stops[1]: [8, 8, 4]}
    assert torch.equal(output, block.forward(hidden))


def test_a_linear_that_no_batch_calls_is_no_stop(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    block.module.mlp = Fork(chosen=lambda x: False, a_first=lambda x: True)
    with Walk(block, hidden, [f"{block.name}.mlp.{name}" for name in ("a", "b")]) as walk:
        assert [name for name, _ in walk] == [f"{block.name}.mlp.b"]


def test_linears_called_in_another_order_by_some_batches_are_refused(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    block.module.mlp = Fork(chosen=lambda x: True, a_first=is_whole)
    with pytest.raises(QtoolError, match=r"mlp\.a is called out of turn.*true_sequential: false"):
        with Walk(block, hidden, [f"{block.name}.mlp.{name}" for name in ("a", "b")]) as walk:
            for _ in walk:
                pass


def test_a_walk_that_is_given_up_leaves_the_block_as_it_was(tiny_model: Callable[..., Path]) -> None:
    block, hidden = first_block(tiny_model("llama"))
    expected = block.forward(hidden)
    with pytest.raises(KeyboardInterrupt):
        with Walk(block, hidden, list(block.linears())) as walk:
            next(iter(walk))
            raise KeyboardInterrupt
    assert not any("forward" in vars(linear) for linear in block.linears().values())
    assert torch.equal(block.forward(hidden), expected)
