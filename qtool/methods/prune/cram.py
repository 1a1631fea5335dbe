"""CrAM+: train so that pruning the result in one go, with no training after it, costs little.

    g = dL(w),   w' = w + rho g,   C(w') its largest weights alone,   g~ = dL(C(w')) on C's places,   step along g + g~
    C: over all chosen linears together the share of a sparsity drawn anew in each step, or with patterns an N:M of them
The last of the method is the pruning itself, one shot to `sparsity` or `pattern`, after which the model is sparse.
Source: Peste et al. 2022, arXiv:2207.14200 (CrAM+, with sparse gradients). Differs: AdamW in place of SGD; the loss
is the distance to the original's predictions; no statistics of batch norms to correct.
For: one model that serves dense, or pruned to several sparsities later; steps=0 is one-shot magnitude pruning.
Costs: training at twice the time of a plain step, and one more copy of weights and gradients: 24 bytes a parameter.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.formats.sparsity import SparsitySelection, choose, smallest
from qtool.model.course import Backward, Course, Trainee, random_of
from qtool.model.linear import weight_of
from qtool.model.wiring import oriented
from qtool.options import TrainingOptions
from qtool.registry import Method


class CramOptions(SparsitySelection, TrainingOptions):
    """How far the step up goes, and what is dropped there."""

    rho: float = Field(0.05, ge=0, description="length of the step up, in gradients")
    sparsities: tuple[float, ...] = Field(
        (0.5, 0.7, 0.9), description="shares of zeros, one of which each step draws; without effect where a pattern is stated"
    )


def largest_of_all(weights: list[nn.Parameter], sparsity: float) -> list[Tensor]:
    """Masks of the weights that stay where round(sparsity · all) of the smallest go, all matrices together."""
    scores = torch.cat([w.abs().flatten() for w in weights])
    kept = ~smallest(scores, round(sparsity * len(scores)))
    return [part.view_as(w) for part, w in zip(kept.split([w.numel() for w in weights]), weights, strict=True)]


def cram(trainee: Trainee, options: CramOptions) -> Course:
    """Two gradients in each step; the chosen linears are pruned once all steps are done."""
    layers = {name: trainee.student.get_submodule(name) for name in trainee.linears}
    chosen = [layer.get_parameter("weight") for layer in layers.values()]
    every = [p for p in trainee.student.parameters() if p.is_floating_point()]

    def masks_of(step: int) -> list[Tensor]:
        if options.pattern is not None:
            return [oriented(layer, ~choose(weight_of(layer).abs(), options)) for layer in layers.values()]
        drawn = int(torch.randint(len(options.sparsities), (1,), generator=random_of(trainee.seed, step)))
        return largest_of_all(chosen, options.sparsities[drawn])

    def gradients(step: int, backward: Backward) -> float:
        total = backward()
        with torch.no_grad():
            w = [p.clone() for p in every]
            g = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in every]
            for p, up in zip(every, g, strict=True):
                p.add_(up, alpha=options.rho)
                p.grad = None
            masks = masks_of(step)
            for p, mask in zip(chosen, masks, strict=True):
                p.mul_(mask)
        backward()
        with torch.no_grad():
            for p, mask in zip(chosen, masks, strict=True):
                if p.grad is not None:
                    p.grad.mul_(mask)
            for p, before, up in zip(every, w, g, strict=True):
                p.copy_(before)
                p.grad = up if p.grad is None else p.grad.add_(up)
        return total

    @torch.no_grad()
    def finish() -> dict[str, str]:
        words = {}
        for name, layer in layers.items():
            W = weight_of(layer)  # [out, in]
            W.masked_fill_(choose(W.abs(), options), 0)
            layer.get_parameter("weight").data = oriented(layer, W)
            words[name] = f"sparse {float((W == 0).float().mean()):.2f}"
        return words

    return Course(gradients=gradients, finish=finish)


METHOD = Method(run=cram, options=CramOptions, scope="course")
