"""REAP: leave out the experts of a mixture that add least to its output.

    S_e = mean over the tokens t routed to e of  p_e(t) ‖f_e(t)‖₂      p_e the router's weight, f_e the expert's output
The `keep` experts of greatest S stay in every block, and the router chooses among them alone.
Source: Lasby et al. 2025, arXiv:2510.13999 (REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression). Differs:
nothing.
For: mixtures whose experts do not fit into memory; one shot, without training.
Costs: one pass over the text, and writing the smaller model.
"""

from collections.abc import Callable
from dataclasses import replace

from pydantic import Field

from qtool.calibration.importance import Importance, most
from qtool.model.cutting import Cut
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, check_sizes, check_smaller, shape_of_model
from qtool.options import Options
from qtool.registry import Method


class ExpertsOptions(Options):
    """How many experts stay."""

    keep: int = Field(ge=1, description="experts of a block that stay")


def experts(importance: Importance, options: ExpertsOptions, note: Callable[[str], None]) -> Cut:
    """The experts that stay, of every block; an expert that no token came to is noted."""
    kept, facts = {}, {}
    for name, seen in importance.of_experts().items():
        scores = seen.scores()
        kept[name] = most(scores, options.keep)
        facts[name.partition(":")[2]] = [round(score, 6) for score in scores.tolist()]
        if idle := (seen.tokens == 0).nonzero().flatten().tolist():
            note(f"{name.partition(':')[2]}: no calibration token came to expert {', '.join(map(str, idle))}; they go first")
    shape = shape_after(importance.model, options)
    return Cut(shape, tuple(range(shape.blocks)), kept, facts={"saliency": facts})


def shape_after(model: ModelHandle, options: ExpertsOptions) -> Shape:
    """The model's shape with fewer experts; raises QtoolError where it is no mixture, or too few would stay."""
    old = shape_of_model(model)
    shape = replace(old, experts=options.keep)
    check_sizes(shape, old, model)
    check_smaller(shape, old)
    return shape


METHOD = Method(run=experts, options=ExpertsOptions, scope="shape", needs=("inputs",), shape=shape_after)
