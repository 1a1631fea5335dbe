"""How sparse each linear becomes where all of them share what they lose together.

    erk        1 - its density by linalg/layerwise_density.py
    magnitude  the share of its |w| below t, t so that round(sparsity · all) weights of all chosen linears are below it
Non-negative float32 numbers order as the integers that their bits are, so t is found to the bit in two passes, by counts of
the upper and then of the lower 16 bits, whatever the model's size. Of weights equal to t those of earlier linears go.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from qtool.formats.sparsity import SharedSparsity, count
from qtool.linalg.layerwise_density import erk_densities
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of

HALF = 16  # bits counted in a pass


def shares_of(model: ModelHandle, options: SharedSparsity) -> dict[str, float]:
    """The sparsity of every chosen linear by name; none where it is the one that the options state."""
    names = [name for name in model.linear_names() if not options.is_ignored(name)]
    if options.densities == "erk":
        densities = erk_densities({name: model.linear_shape(name) for name in names}, 1 - options.sparsity)
        return {name: 1 - density for name, density in densities.items()}
    return shares_below_one_threshold(model, names, options.sparsity) if options.densities == "magnitude" else {}


def shares_below_one_threshold(model: ModelHandle, names: list[str], sparsity: float) -> dict[str, float]:
    """The part of each linear's weights that are among the round(sparsity · all) smallest of all linears'."""
    sizes = {name: model.linear_shape(name)[0] * model.linear_shape(name)[1] for name in names}
    left = count(sparsity, sum(sizes.values()))
    upper, lower = (torch.zeros(1 << HALF, dtype=torch.int64) for _ in range(2))  # how many weights have these bits
    for _, bits in magnitudes(model, names):
        upper += torch.bincount(bits >> HALF, minlength=1 << HALF).cpu()
    top, left = place_of(upper, left)
    for _, bits in magnitudes(model, names):
        lower += torch.bincount(bits[bits >> HALF == top] & (1 << HALF) - 1, minlength=1 << HALF).cpu()
    low, left = place_of(lower, left)
    threshold, found = (top << HALF) + low, {}
    for name, bits in magnitudes(model, names):
        n_equal = min(left, int((bits == threshold).sum()))
        found[name] = (int((bits < threshold).sum()) + n_equal) / sizes[name]
        left -= n_equal
    return found


def place_of(counts: Tensor, n: int) -> tuple[int, int]:
    """The bin that holds the smallest number but n, and how many of its numbers are among the n smallest."""
    sums = counts.cumsum(0)
    place = int((sums <= n).sum())
    return place, n - (int(sums[place - 1]) if place else 0)


def magnitudes(model: ModelHandle, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Every linear's |w| as the integers that their float32 bits are [out · in], in the model's order."""
    for block in model.blocks():
        for name, layer in block.linears().items():
            if name in names:
                yield name, weight_of(layer).abs().flatten().view(torch.int32)
    outside = [name for name in names if not name.startswith(f"{model.blocks_name}.")]
    if outside:
        with model.outer():
            for name in outside:
                yield name, weight_of(model.model.get_submodule(name)).abs().flatten().view(torch.int32)
