"""Depth pruning: leave out the blocks that do least, by their influence (ShortGPT) or by the loss without them.

    influence_l = 1 - mean over tokens of cos(h_l, h_l+1)      loss_l = mean of -log p(token) of the model without block l
    h_l [hidden] what block l is fed    the `drop` blocks of least score go: all at once, or one after the other
Source: Men et al. 2024, arXiv:2403.03853 (ShortGPT); by loss: Muralidharan et al. 2024, arXiv:2407.14679 (Minitron),
section 2.2. Differs: `iterative` scores those that are left anew after each block that goes.
For: fewer blocks and so less time a token everywhere; quality falls faster than by width, so train after it.
Costs: one pass by influence, half of blocks² block passes by loss; times `drop` where iterative.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool.calibration.importance import Importance, most
from qtool.model.cutting import Cut
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, check_smaller, shape_of_model
from qtool.options import Options
from qtool.registry import Method


class DepthOptions(Options):
    """How many blocks go, and by what."""

    drop: int = Field(ge=1, description="blocks that go")
    score: Literal["influence", "loss"] = Field(
        "influence", description="what a block is worth: influence, how far it turns its input; loss, the text's without it"
    )
    iterative: bool = Field(False, description="one block after the other, those left scored anew; false, all at once")


def depth(importance: Importance, options: DepthOptions, note: Callable[[str], None]) -> Cut:
    """The blocks that stay, in their order."""
    score = importance.influence if options.score == "influence" else importance.losses_without
    shape = shape_after(importance.model, options)
    kept, scores = blocks_to_keep(importance.model.n_blocks, score, options)
    return Cut(shape, tuple(kept), facts={options.score: scores})


def blocks_to_keep(
    n_blocks: int, score: Callable[[list[int]], Tensor], options: DepthOptions
) -> tuple[list[int], list[dict[int, float]]]:
    """Blocks of greatest score, of equal scores the earlier one; and all scores, by block, each time that they were taken.

    `score`: of the blocks given, the others left out.
    """
    kept, seen = list(range(n_blocks)), []
    at_once = 1 if options.iterative else options.drop
    for _ in range(options.drop // at_once):
        scores = score(kept)  # [kept]
        seen.append(dict(zip(kept, scores.tolist(), strict=True)))
        kept = [kept[place] for place in most(scores, len(kept) - at_once)]
    return kept, seen


def shape_after(model: ModelHandle, options: DepthOptions) -> Shape:
    """The model's shape with fewer blocks; raises QtoolError where none would stay."""
    old = shape_of_model(model)
    shape = replace(old, blocks=old.blocks - options.drop)
    check_smaller(shape, old)
    return shape


METHOD = Method(run=depth, options=DepthOptions, scope="shape", needs=("inputs",), shape=shape_after)
