"""Gradual pruning: a model that trains while the share of its smallest weights that are zero rises to what is asked.

    s_t = s (1 - (1 - (t - t_0) / (n dt))³)    at t = t_0, t_0 + dt, ..., t_0 + n dt;  s_t = 0 before,  s after
    mask of a linear: the s_t · in smallest |w| of each output, or with a pattern N:M min(M - N, round(s_t M)) of M neighbours
    W [out, in]    masked weights are zero, and no gradient reaches them
Source: Zhu and Gupta 2017, arXiv:1710.01878, equation 1. Differs: starts dense (s_i = 0), compares within each
output as qtool's other pruners do, and with a pattern drops a neighbour at a time.
For: high sparsity where there is time to train; every pruned weight's part is taken over before the next goes.
Costs: training: 16 bytes a parameter and the original beside it; one sort of each matrix every `every` steps.
"""

from pydantic import Field

from qtool.formats.sparsity import SparsitySelection, choose, smallest
from qtool.model.course import Course, Trainee
from qtool.model.linear import weight_of
from qtool.model.wiring import oriented
from qtool.options import TrainingOptions
from qtool.registry import Method


class GradualOptions(SparsitySelection, TrainingOptions):
    """What becomes zero, and when."""

    begin: float = Field(0.0, ge=0, lt=1, description="share of the steps before the first weight goes")
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which all are gone; the rest of them train on")
    every: int = Field(10, ge=1, description="steps between two rises")


def share_at(step: int, steps: int, options: GradualOptions) -> float:
    """How much of the final sparsity a step has, from 0 to 1, rising in cubes."""
    first = round(options.begin * steps)
    n = max(1, round((options.end - options.begin) * steps) // options.every)
    risen = min(n, max(0, step - first) // options.every)
    return 1 - (1 - risen / n) ** 3


def gradual(trainee: Trainee, options: GradualOptions) -> Course:
    """Masks of the chosen linears' weights, taken anew at every rise; a weight that is gone stays zero until then."""
    layers = {name: trainee.student.get_submodule(name) for name in trainee.linears}
    masks = {name: layer.get_parameter("weight").detach() == layer.get_parameter("weight") for name, layer in layers.items()}
    pattern = options.keep_of()

    def before_step(step: int) -> None:
        last = step + 1 == trainee.steps  # however few steps there are, the last begins with all that is asked
        share = 1.0 if last else share_at(step, trainee.steps, options)
        if not last and step and share == share_at(step - 1, trainee.steps, options):
            return
        for name, layer in layers.items():
            scores = weight_of(layer).abs()  # [out, in]
            if pattern is None:
                gone = choose(scores, options.model_copy(update={"sparsity": options.sparsity * share}))
            else:
                keep, of = pattern
                choose(scores[:1], options)  # raises where columns do not divide
                n_gone = round((of - keep) * share)
                gone = smallest(scores.unflatten(1, (-1, of)), n_gone).flatten(1)
            masks[name].copy_(oriented(layer, ~gone))
            layer.get_parameter("weight").data.mul_(masks[name])

    return Course(
        before_step=before_step,
        masks={layer.get_parameter("weight"): masks[name] for name, layer in layers.items()},
        state=masks,
        finish=lambda: {name: f"sparse {1 - float(mask.float().mean()):.2f}" for name, mask in masks.items()},
    )


METHOD = Method(run=gradual, options=GradualOptions, scope="course")
