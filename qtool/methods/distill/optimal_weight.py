"""Self-distillation with the best share of the text's own tokens, found from two trainings instead of a search.

    L = a CE(q, y) + (1 - a) KL(p ‖ q)    p the teacher's prediction, q the student's [tokens, vocab], y the text's next tokens
    phase 1  a = 1 gives predictions A,   phase 2  a = 0 gives B,  on windows that are held out
    a* = <Y - B, A - B> / ‖A - B‖²,  kept within 0 and 1;  phase 3 trains with a*        Y [tokens, vocab] y as one-hot rows
Source: Borup and Andersen 2021, arXiv:2102.13088: for kernel ridge regression predictions are linear in
a, and a* is the best. Differs: networks are not, so that a* is a guess there; squares are of probabilities.
For: students whose teacher is not much better than the text, such as a model's own earlier self.
Costs: three trainings, and one more model in memory.
"""

import copy

import torch
from torch import Tensor, nn

from qtool.errors import QtoolError
from qtool.linalg.half_products import mixed_precision
from qtool.model.course import Course, Trainee
from qtool.options import TrainingOptions
from qtool.registry import Method


def best_share(along: float, length: float) -> float:
    """a* of <Y - B, A - B> and ‖A - B‖², within 0 and 1; 1 where A and B are the same."""
    return min(1.0, max(0.0, along / length)) if length > 0 else 1.0


@torch.no_grad()
def inner_products(A: nn.Module, B: nn.Module, windows: Tensor, device: torch.device) -> tuple[float, float]:
    """<Y - B, A - B> and ‖A - B‖² over windows [samples, length], by the predictions of two models."""
    along = length = 0.0
    for window in windows.split(1):
        rows = window.to(device)
        with mixed_precision(device):
            a, b = (model(rows, use_cache=False).logits[0, :-1].float().softmax(-1) for model in (A, B))
        D = a - b  # [tokens, vocab]
        along += float(D.gather(1, rows[0, 1:, None]).sum() - (b * D).sum())
        length += float(D.square().sum())
    return along, length


def optimal_weight(trainee: Trainee, options: TrainingOptions) -> Course:
    """Three phases: the text alone, the teacher alone, both in the best shares."""
    if not options.validation:
        raise QtoolError("distill/optimal_weight finds the share on windows that are held out; set validation, such as 16")
    if options.labels:
        raise QtoolError("distill/optimal_weight finds the share of labels itself; leave labels away")
    student = trainee.student
    state = {name: value.detach().clone() for name, value in student.state_dict().items()}
    share, phase = torch.ones((), dtype=torch.float64), 0
    state["the share of the text"] = share

    def between(following: int) -> None:
        if following == 1:
            for name, value in student.state_dict().items():
                state[name].copy_(value)
        else:
            A = copy.deepcopy(student)
            A.load_state_dict({name: value for name, value in state.items() if value is not share})
            share.fill_(best_share(*inner_products(A, student, trainee.held_out, student.device)))
            trainee.note(f"share of the text's own tokens: {float(share):.4f}")

    def begin(current: int) -> None:
        nonlocal phase
        phase = current

    return Course(share=lambda: (1.0, 0.0, float(share))[phase], state=state, phases=3, between=between, begin=begin)


METHOD = Method(run=optimal_weight, options=TrainingOptions, scope="course")
