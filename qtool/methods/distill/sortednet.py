"""SortedNet: a model and smaller ones within it, the first units of its own, trained together as one checkpoint.

    each step: `draws` models m, the whole one with chance `full`, else one of the `submodels`, all alike;  one update along
    the mean over m of  dL(m(x), target)    m's weights are the leading parts of the whole one's, so that gradients reach those
Every sub-model is an ordinary smaller model: `qtool export RUN --format safetensors --submodel NAME` cuts it out.
Source: Valipour et al. 2023, arXiv:2309.00255 (SortedNet): nested sub-models, drawn at random, whose gradients accumulate.
Differs: the loss is the distance to the original's predictions, where `labels` does not ask for the text's; the chance of the
whole model is an option; gradients are averaged.
For: one training for a family of sizes; one size alone is better trained by itself. Widths of a trained model, whose neurons
come in no order, need more steps than its depth.
Costs: training: 20 bytes a parameter and the original beside it, `draws` passes a step. What is measured is the whole model.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.model.course import Backward, Course, Trainee, random_of, whole_logits
from qtool.model.cutting import Cutter
from qtool.model.handle import ModelHandle
from qtool.model.submodels import cutter_of
from qtool.options import Submodels, TrainingOptions
from qtool.registry import Method


class SortednetOptions(Submodels, TrainingOptions):
    """Which models train, and how often each."""

    full: float = Field(0.25, ge=0, le=1, description="chance that a draw is the whole model; the others share the rest alike")
    draws: int = Field(1, ge=1, description="models drawn in each step, whose gradients are averaged")


def cutters_of(model: ModelHandle, options: SortednetOptions) -> list[Cutter]:
    """What cuts each sub-model; raises QtoolError where the model takes none such."""
    if options.recompute:
        raise QtoolError("distill/sortednet: activations of sub-models are not computed again; leave recompute away")
    found = []
    for name, sizes in options.submodels.items():
        try:
            found.append(cutter_of(model, sizes))
        except QtoolError as error:
            raise QtoolError(f"distill/sortednet: submodels: {name}: {error}") from error
    return found


def check(model: ModelHandle, options: SortednetOptions) -> None:
    """Raise QtoolError, before any work, for what `cutters_of` would."""
    cutters_of(model, options)


def drawn_at(step: int, seed: int, n_submodels: int, options: SortednetOptions) -> list[int | None]:
    """Numbers of the sub-models of one step; None stands for the whole model."""
    random = random_of(seed, step)
    chances = torch.rand(options.draws, generator=random).tolist()
    numbers = torch.randint(n_submodels, (options.draws,), generator=random).tolist()
    return [None if chance < options.full else number for chance, number in zip(chances, numbers, strict=True)]


def logits_of(cutter: Cutter, student: nn.Module, rows: Tensor) -> Tensor:
    """Logits [batch, length, vocab] of a sub-model of the student for rows [batch, length]."""
    found = torch.func.functional_call(
        cutter.target.model, cutter.parameters_of(student), (rows,), {"use_cache": False}, tie_weights=False
    )
    logits: Tensor = found.logits
    return logits


def sortednet(trainee: Trainee, options: SortednetOptions) -> Course:
    """Gradients of the models drawn, in place of the whole model's alone."""
    cutters = cutters_of(trainee.model, options)
    for cutter in cutters:
        cutter.target.model.float()  # its buffers; it has no weights of its own
    parameters = [p for p in trainee.student.parameters() if p.is_floating_point()]
    current: int | None = None

    def logits(student: nn.Module, rows: Tensor) -> Tensor:
        return whole_logits(student, rows) if current is None else logits_of(cutters[current], student, rows)

    def gradients(step: int, backward: Backward) -> float:
        nonlocal current
        total, sums = 0.0, [torch.zeros_like(p) for p in parameters]
        for number in drawn_at(step, trainee.seed, len(cutters), options):
            current = number
            total += backward() / options.draws
            for p, summed in zip(parameters, sums, strict=True):
                if p.grad is not None:
                    summed.add_(p.grad, alpha=1 / options.draws)
                    p.grad = None
        current = None
        for p, summed in zip(parameters, sums, strict=True):
            p.grad = summed
        return total

    return Course(gradients=gradients, logits=logits)


METHOD = Method(run=sortednet, options=SortednetOptions, scope="course", check=check)
