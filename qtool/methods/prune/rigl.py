"""RigL and SET: a sparse model whose places move as it trains, the smallest weights giving way to new ones.

    every dt steps until the share `until` of them, in each linear:  drop the f_t n smallest |w| of its n weights,
    f_t = (drop / 2)(1 + cos(pi t / T));  grow as many among those that were zero: SET at random, RigL where |dL/dW| is largest
    T = until · steps    grown weights are zero at first, and their moments too
Densities of linears: uniform, or ERK, which leaves narrow matrices more (see linalg/layerwise_density.py).
Source: SET: Mocanu et al. 2018, arXiv:1707.04780; RigL: Evci et al. 2020, arXiv:1911.11134, Algorithm 1. Differs: SET also
takes RigL's falling drop share; at first the largest |w| stay, as a trained model begins here, or random ones are drawn.
For: a model sparse from the first step to the last; where no dense model is at hand, with start: random.
Costs: training: 16 bytes a parameter (masks save no memory here), one sort of each matrix every `every` steps.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.linalg.layerwise_density import erk_densities
from qtool.model.course import Backward, Course, Trainee, random_of
from qtool.model.linear import shape_of
from qtool.options import Selection, TrainingOptions
from qtool.registry import Method


class RiglOptions(Selection, TrainingOptions):
    """How sparse, and how places move."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of the chosen linears' weights that are zero, all together")
    grow: Literal["gradient", "random"] = Field("gradient", description="where weights come back: gradient, RigL; random, SET")
    densities: Literal["erk", "uniform"] = Field("erk", description="erk: narrow matrices stay denser; uniform: all alike")
    drop: float = Field(0.3, ge=0, le=1, description="share of a linear's weights that move at first; it falls as a cosine")
    every: int = Field(10, ge=1, description="steps between two moves; 100 in the papers, whose trainings are long")
    until: float = Field(0.75, gt=0, le=1, description="share of the steps after which places stay")


def move(W: Tensor, G: Tensor, mask: Tensor, n: int) -> Tensor:
    """The mask with the n smallest |W| of its places dropped and the n largest |G| outside it grown; all of one shape."""
    n = min(n, int((~mask).sum()))
    kept = mask.flatten().clone()
    dropped = W.abs().masked_fill(~mask, torch.inf).flatten().argsort(stable=True)[:n]
    grown = G.abs().masked_fill(mask, -1).flatten().argsort(stable=True, descending=True)[:n]
    kept[dropped] = False
    kept[grown] = True
    return kept.view_as(mask)


def rigl(trainee: Trainee, options: RiglOptions) -> Course:
    """Masks of the chosen linears' weights, which move as training goes on."""
    layers = {name: trainee.student.get_submodule(name) for name in trainee.linears}
    weights = {name: layer.get_parameter("weight") for name, layer in layers.items()}
    shapes = {name: shape_of(layer) for name, layer in layers.items()}
    density = 1 - options.sparsity
    share = erk_densities(shapes, density) if options.densities == "erk" else dict.fromkeys(shapes, density)
    masks = {}
    for name, w in weights.items():
        n = round(share[name] * w.numel())
        places = w.detach().abs().flatten().argsort(stable=True, descending=True)[:n]
        masks[name] = torch.zeros(w.numel(), dtype=torch.bool, device=w.device).index_fill_(0, places, True).view_as(w)
        w.data.mul_(masks[name])

    def gradients(step: int, backward: Backward) -> float:
        total = backward()
        last = options.until * trainee.steps
        if step and step % options.every == 0 and step < last:
            f = options.drop / 2 * (1 + math.cos(math.pi * step / last))
            random = random_of(trainee.seed, step)
            for name, w in weights.items():
                assert w.grad is not None, f"{name}: the loss depends on it"
                G = torch.rand(w.shape, generator=random).to(w.device) if options.grow == "random" else w.grad
                masks[name].copy_(move(w.detach(), G, masks[name], int(f * int(masks[name].sum()))))
                w.data.mul_(masks[name])
        return total

    return Course(
        gradients=gradients,
        masks={w: masks[name] for name, w in weights.items()},
        state=masks,
        finish=lambda: {name: f"sparse {1 - float(mask.float().mean()):.2f}" for name, mask in masks.items()},
    )


METHOD = Method(run=rigl, options=RiglOptions, scope="course")
