"""Laws of the methods that make a model smaller: what they choose can be cut, is what they said, and is chosen alike twice.

They are checked on a two-block Mixtral of random weights, in float32, which has all that can go: blocks, heads, neurons, hidden
channels, experts.
"""

from collections.abc import Callable
from typing import Any

import torch

from qtool.calibration.importance import Importance
from qtool.laws.model import sample_options, sample_tokens, tiny_checkpoint
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, shape_of_model, smaller
from qtool.options import ModelOptions
from qtool.registry import Method

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}


def with_cut(method: Method, check: Callable[[ModelHandle, Cut, Any], None]) -> None:
    """Hand the model, what the method keeps of it and the method's options to `check`."""
    with tiny_checkpoint("Mixtral", **MIXTURE) as folder:
        model = ModelHandle(ModelOptions(path=str(folder), device="cpu"))
        options = sample_options(method)
        importance = Importance(model, sample_tokens(), divergence=lambda cut: float(cut.shape.neurons))
        check(model, method.run(importance, options, lambda text: None), options)


def what_stays_is_in_order(method: Method) -> None:
    """Blocks and units ascend, are there, and are as many as the shape says; those merged share nothing out twice."""

    def check(model: ModelHandle, cut: Cut, options: Any) -> None:
        old = shape_of_model(model)
        assert list(cut.blocks) == sorted(set(cut.blocks)), f"blocks {cut.blocks}"
        assert len(cut.blocks) == cut.shape.blocks and max(cut.blocks) < old.blocks, f"blocks {cut.blocks}"
        for name, units in cut.kept.items():
            axis = name.partition(":")[0]
            assert torch.equal(units, units.unique()), f"{name}: {units.tolist()} are not ascending"
            assert len(units) == getattr(cut.shape, axis), f"{name}: {len(units)} stay, must be {getattr(cut.shape, axis)}"
            assert int(units.max()) < getattr(old, axis), f"{name}: there is no unit {int(units.max())}"
        for name, merge in cut.merges.items():
            assert torch.equal(merge.into.unique(), cut.kept[name]), f"{name}: merged into {merge.into.tolist()}"
            sums = torch.zeros(old.experts, dtype=torch.float64).index_add(0, merge.into, merge.shares)[cut.kept[name]]
            torch.testing.assert_close(sums, torch.ones_like(sums), msg=f"{name}: shares add up to {sums.tolist()}")
            neurons = torch.arange(old.neurons).expand_as(merge.orders)
            assert torch.equal(merge.orders.sort(1).values, neurons), f"{name}: an order leaves neurons out"

    with_cut(method, check)


def the_smaller_model_is_no_larger_than_planned(method: Method) -> None:
    """It has fewer parameters than before, and no more than the shape that the method told beforehand."""

    def check(model: ModelHandle, cut: Cut, options: Any) -> None:
        assert method.shape is not None, f"{method.key} does not tell the shape beforehand"
        planned: Shape = method.shape(model, options)
        least, most = smaller(model, cut.shape).n_parameters(), smaller(model, planned).n_parameters()
        assert least <= most < model.n_parameters(), f"{least} parameters, planned {most}, before {model.n_parameters()}"

    with_cut(method, check)


def what_goes_could_as_well_be_zero(method: Method) -> None:
    """Every block of the smaller model computes what the block does with all that goes set to zero."""

    def check(model: ModelHandle, cut: Cut, options: Any) -> None:
        cutter, hidden = Cutter(model, cut), model.embed(sample_tokens()[:1])
        for index in range(model.n_blocks):
            block = model.block(index)
            if index in cut.blocks:
                cutter.try_block(block, cut.blocks.index(index), hidden)
            hidden = block.forward(hidden)
        with model.outer():
            cutter.try_outer(sample_tokens()[:1], hidden)

    with_cut(method, check)


def choosing_what_stays_is_deterministic(method: Method) -> None:
    """Two runs choose the same."""
    found: list[dict[str, torch.Tensor]] = []
    for _ in range(2):
        with_cut(method, lambda model, cut, options: found.append(cut.to_tensors()))
    assert found[0].keys() == found[1].keys(), "two runs choose in other places"
    assert all(torch.equal(units, found[1][name]) for name, units in found[0].items()), "two runs choose other units"
