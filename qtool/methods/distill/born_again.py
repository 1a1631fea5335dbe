"""Born-Again: students of one shape, generation after generation, each taught by the one before it.

    generation 1 learns from the original, generation i from generation i - 1; each begins where the first began
    kd    KL(p ‖ q)    p the teacher's, q the student's prediction [tokens, vocab]
    cwtm  sum_s w_s CE(q_s, y_s),  w_s = max_j p_sj / sum_u max_j p_uj        y the text's next tokens
    dkpp  CE(q, p'),   p' is p with all probabilities but the largest permuted anew, token by token
Source: Furlanello et al. 2018, arXiv:1805.04770, section 3.2, equations 10 and 11. Differs: a generation begins
at the compressed model's weights, unless start: random draws them as the paper does; generations are not averaged.
For: start: random, where a generation more may still gain; cwtm and dkpp tell what of distillation matters.
Costs: `generations` trainings, and one more model in memory.
"""

import copy
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.target import Target
from qtool.linalg.divergence import distillation_loss
from qtool.model.course import Course, Trainee, random_of
from qtool.options import TrainingOptions
from qtool.registry import Method


class BornAgainOptions(TrainingOptions):
    """How many generations, and what they learn from."""

    generations: int = Field(2, ge=1, description="trainings one after the other; `steps` is of each")
    learn: Literal["kd", "cwtm", "dkpp"] = Field(
        "kd", description="kd: all the teacher says; cwtm: the text, weighted by its confidence; dkpp: its first choice's share"
    )


def confidence_weighted(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """CWTM of logits [..., vocab] and labels [...]; positions without a label (below zero) count nothing."""
    valid = labels >= 0
    weights = teacher.float().softmax(-1).amax(-1)[valid]  # [tokens]
    cost = torch.nn.functional.cross_entropy(student.float()[valid], labels[valid], reduction="none")  # [tokens]
    return (weights / weights.sum() * cost).sum()


def permuted(p: Tensor, random: torch.Generator) -> Tensor:
    """DKPP of probabilities [tokens, vocab]: the largest stays where it is, the others change places."""
    keys = torch.rand(p.shape, generator=random).to(p.device)
    first = p.argmax(-1, keepdim=True)  # [tokens, 1]
    others = keys.scatter(-1, first, 2.0).argsort(-1)[:, :-1]  # [tokens, vocab - 1], places in a random order
    places = torch.ones_like(p, dtype=torch.bool).scatter(-1, first, False).nonzero()[:, 1].view_as(others)  # in rising order
    return p.scatter(-1, places, p.gather(-1, others))


def born_again(trainee: Trainee, options: BornAgainOptions) -> Course:
    """One phase for each generation."""
    if options.learn == "dkpp" and options.top_k is not None:
        raise QtoolError("distill/born_again: dkpp permutes all probabilities; leave top_k away")
    if options.generations > 1 and options.cache is not None:
        raise QtoolError("distill/born_again: cache keeps the original's predictions, and later generations learn from others")
    student = trainee.student
    state = {name: value.detach().clone() for name, value in student.state_dict().items()} if options.generations > 1 else {}
    random = torch.Generator()

    def before_step(step: int) -> None:
        random.set_state(random_of(trainee.seed, step).get_state())

    def between(phase: int) -> None:
        for name, value in student.state_dict().items():
            state[name].copy_(value)

    def begin(phase: int) -> None:
        if phase:
            teacher = copy.deepcopy(student).requires_grad_(False)
            teacher.load_state_dict(state)
            trainee.teach(teacher)

    def loss(logits: Tensor, target: Target, labels: Tensor) -> Tensor:
        if options.learn == "kd":
            return distillation_loss(logits, target, options.temperature)
        if options.learn == "cwtm":
            return confidence_weighted(logits, target.logits, labels)
        p = permuted((target.logits.float() / options.temperature).softmax(-1).flatten(0, -2), random)  # [tokens, vocab]
        q = (logits.float() / options.temperature).log_softmax(-1).flatten(0, -2)
        return -(options.temperature**2) * (p * q).sum(-1).mean()

    return Course(before_step=before_step, loss=loss, state=state, phases=options.generations, between=between, begin=begin)


METHOD = Method(run=born_again, options=BornAgainOptions, scope="course")
