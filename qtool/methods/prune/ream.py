"""REAM: merge the experts of a mixture in groups, each around one of those that add most to its output.

    centers: the `keep` experts of greatest S;  by falling S each takes in, up to `group` with itself, the most similar of
    the experts that are left          S_e = mean over tokens t routed to e of  p_e(t) ‖f_e(t)‖₂, as in prune/experts
    W_c = sum over e of its group of  S_e / (sum of S) · P_e W_e            P_e: e's neurons in the order of the center's
    P_e = argmin over permutations of  sum over i of ‖a_c,i - a_e,P(i)‖ + ‖w_c,i - w_e,P(i)‖
    a_e,i [tokens] what neuron i of e gives, w_e,i [3 · hidden] its weights, both of norm 1; similarity: calibration/mixture.py
The router chooses among the centers, by their rows. A block is merged before the next is looked at.
Source: Jha et al. 2026, arXiv:2604.04356 (REAM), and its authors' code. Differs: neurons are compared by all their weights,
not by 64 principal components of them; an expert that no token came to has no share in its group.
For: mixtures whose experts do not fit into memory; one shot, without training. Beside prune/experts it is not measured.
Costs: two passes over the text, in one of which all experts run on all tokens; an assignment of neurons³ for each expert that
goes; writing the smaller model.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.calibration.importance import Importance, most
from qtool.calibration.mixture import Mixture
from qtool.errors import QtoolError
from qtool.linalg.assignment import cheapest_partners
from qtool.model.cutting import Cut, Merge
from qtool.model.handle import ModelHandle
from qtool.model.shape import Shape, check_sizes, check_smaller, shape_of_model
from qtool.options import Options
from qtool.registry import Method


class ReamOptions(Options):
    """How many experts stay, and how many may become one."""

    keep: int = Field(ge=1, description="experts of a block that are left")
    group: int = Field(16, ge=2, description="most experts that become one; the closer to all, the more stay as they are")


def ream(importance: Importance, options: ReamOptions, note: Callable[[str], None]) -> Cut:
    """The centers, and what is merged into each, of every block; an expert that no token came to is noted."""
    shape, groups = shape_after(importance.model, options), dict[str, list[list[int]]]()
    cut = Cut(shape, tuple(range(shape.blocks)), facts={"groups": groups})
    for name, mixture in importance.mixtures(cut):
        S = mixture.saliency.scores()  # [experts]
        cut.kept[name] = most(S, options.keep)
        into = group(S, mixture.similarity(), cut.kept[name], options.group)
        cut.merges[name] = Merge(into, shares(S, into), orders(mixture, into))
        place = name.partition(":")[2]
        groups[place] = [cut.merges[name].members(center) for center in cut.kept[name].tolist()]
        if idle := (mixture.saliency.tokens == 0).nonzero().flatten().tolist():
            note(f"{place}: no calibration token came to expert {', '.join(map(str, idle))}; they have no share in a merge")
    return cut


def group(S: Tensor, similarity: Tensor, centers: Tensor, most_of_one: int) -> Tensor:
    """The center [experts] that each expert is merged into; a center's is itself. S [experts], centers ascending."""
    into = torch.full((len(S),), -1)
    into[centers] = centers
    for center in centers[S[centers].argsort(descending=True, stable=True)].tolist():
        nearest = similarity[center].argsort(descending=True, stable=True)
        into[nearest[into[nearest] < 0][: most_of_one - 1]] = center
    assert bool((into >= 0).all()), "shape_after lets no groups through that are too small"
    return into


def shares(S: Tensor, into: Tensor) -> Tensor:
    """S_e by the sum of S of its group [experts], float64; where that is zero the center has all."""
    sums = torch.zeros_like(S).index_add_(0, into, S)[into]
    return torch.where(sums > 0, S / sums, (into == torch.arange(len(S))).double())


def orders(mixture: Mixture, into: Tensor) -> Tensor:
    """Of every expert its neurons in the order of its center's [experts, neurons]."""
    n_neurons = len(mixture.weights(0))
    found = torch.arange(n_neurons).repeat(len(into), 1)
    for expert, center in enumerate(into.tolist()):
        if expert != center:
            found[expert] = order(mixture, expert, center)
    return found


def order(mixture: Mixture, expert: int, center: int) -> Tensor:
    """The neuron of `expert` for each neuron of `center` [neurons], least distance in sum."""
    looks = (mixture.activations, mixture.weights)
    pairs = [(F.normalize(look(center), dim=-1), F.normalize(look(expert), dim=-1)) for look in looks]
    cost = sum((torch.cdist(a, b) for a, b in pairs), start=torch.zeros(()))  # [neurons, neurons]
    return cheapest_partners(cost)


def shape_after(model: ModelHandle, options: ReamOptions) -> Shape:
    """The model's shape with fewer experts; raises QtoolError where it is no mixture, or groups cannot hold all experts."""
    old = shape_of_model(model)
    shape = replace(old, experts=options.keep)
    check_sizes(shape, old, model)
    check_smaller(shape, old)
    if options.keep * options.group < old.experts:
        least = -(-old.experts // options.keep)
        what = f"{options.keep} groups of {options.group} hold less than the {old.experts} experts"
        raise QtoolError(f"{what}; group {least} or more")
    return shape


METHOD = Method(run=ream, options=ReamOptions, scope="shape", needs=("inputs",), shape=shape_after)
