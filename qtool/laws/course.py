"""Laws of the methods that work on a student while it trains: masks, factors, rounded weights, teachers that change.

They are checked on a two-block Llama of random weights, in float32, trained for a few steps on random tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.formats.target import Target
from qtool.laws.model import sample_options, sample_tokens, tiny_checkpoint
from qtool.linalg.divergence import distillation_loss
from qtool.model.course import Course, Trainee, merge
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions
from qtool.registry import Method

STEPS = 4
STATED: dict[str, Any] = {  # that the few steps see all that happens
    "steps": STEPS, "every": 1, "validation": 1, "scheme": "w4a16g32", "temperature": 2.0, "end": 0.5, "rank": 4, "stages": 2,
    "keep": 0.5, "drop": 0.3,
}  # fmt: skip


@dataclass
class Trial:
    """A student in training, as the driver has it."""

    student: nn.Module
    teacher: nn.Module
    linears: tuple[str, ...]
    course: Course
    before: dict[str, nn.Module]
    optimizer: torch.optim.Optimizer

    def carry_out(self, phase: int, steps: range) -> None:
        """The steps of one phase on two windows each; float32 throughout."""
        self.course.begin(phase)
        rows = sample_tokens()[:2]  # [batch, length]
        labels = torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], -100)], dim=1)
        for step in steps:
            self.course.before_step(step)
            self.course.gradients(step, lambda: self.backward(rows, labels))
            for p, mask in self.course.masks.items():
                if p.grad is not None:
                    p.grad.mul_(mask)
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                for p, mask in self.course.masks.items():
                    p.mul_(mask)
            self.course.after_step(step)

    def backward(self, rows: Tensor, labels: Tensor) -> float:
        with torch.no_grad():
            target = Target(self.teacher(rows, use_cache=False).logits)
        logits = self.course.logits(self.student, rows)
        loss = distillation_loss(logits, target, 1.0) if self.course.loss is None else self.course.loss(logits, target, labels)
        penalty = self.course.penalty()
        (loss if penalty is None else loss + penalty).backward()
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        extra = {} if self.course.extra is None else self.course.extra.state_dict()
        parts = {"student": self.student.state_dict(), "state": self.course.state, "extra": extra}
        kept: dict[str, Any] = {part: {k: v.clone() for k, v in found.items()} for part, found in parts.items()}
        return kept | {"optimizer": {k: {n: v.clone() for n, v in s.items()} for k, s in self._moments().items()}}

    def restore(self, kept: dict[str, Any]) -> None:
        self.student.load_state_dict(kept["student"])
        for name, value in self.course.state.items():
            value.copy_(kept["state"][name])
        if self.course.extra is not None:
            self.course.extra.load_state_dict(kept["extra"])
        state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": kept["optimizer"], "param_groups": state["param_groups"]})

    def _moments(self) -> dict[int, dict[str, Tensor]]:
        return dict(self.optimizer.state_dict()["state"])

    def weights(self) -> dict[str, Tensor]:
        """The chosen linears' weights [out, in], once `finish` and `merge` are through."""
        self.course.finish()
        merge(self.student, self.before)
        return {name: weight_of(self.student.get_submodule(name)) for name in self.linears}

    def logits(self) -> Tensor:
        with torch.no_grad():
            found: Tensor = self.student(sample_tokens(), use_cache=False).logits
        return found


@contextmanager
def in_training(method: Method, folder: Path, **stated: object) -> Iterator[Trial]:
    """A student right before its first step."""
    chosen = {name: value for name, value in STATED.items() if name in method.options.model_fields}
    options = sample_options(method, **chosen | stated)
    models = [ModelHandle(ModelOptions(path=str(folder), dtype="float32", device="cpu")) for _ in range(2)]
    with models[0].materialized() as student, models[1].materialized() as teacher:
        taught: list[nn.Module] = [teacher]
        before = dict(student.named_modules())
        linears = tuple(name for name in models[0].linear_names() if name != "lm_head")
        trainee = Trainee(
            student, teacher, (models[0].block_modules(), models[1].block_modules()), linears, STEPS, 0,
            lambda text: None, taught.append, sample_tokens()[2:], sample_tokens()[:2], models[0],
        )  # fmt: skip
        course: Course = method.run(trainee, options)
        extra = [] if course.extra is None else list(course.extra.parameters())
        for p in student.parameters():
            p.requires_grad_(course.trained is None)
        trained = list(student.parameters()) if course.trained is None else list(course.trained)
        for p in trained:
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW([*trained, *extra], lr=1e-3, weight_decay=0.0)
        yield Trial(student, teacher, linears, course, before, optimizer)


def training_ends_as_sparse_as_asked(method: Method) -> None:
    """Of all chosen weights half are zero after the last step, and with a pattern two of every four neighbours."""
    patterns: tuple[dict[str, object], ...] = (
        ({},) if "pattern" not in method.options.model_fields else ({}, {"pattern": "2:4"})
    )
    for stated in patterns:
        with tiny_checkpoint() as folder, in_training(method, folder, **stated) as trial:
            trial.carry_out(0, range(STEPS))
            weights = trial.weights()
        n_zero, n = sum(int((W == 0).sum()) for W in weights.values()), sum(W.numel() for W in weights.values())
        assert abs(n_zero - n / 2) <= len(weights) / 2, f"{n_zero} of {n} weights are zero"  # each may round once
        for name, W in weights.items() if stated else ():
            assert bool(((W.view(-1, 4) == 0).sum(1) == 2).all()), f"{name}: not every four neighbours have two zeros"


def what_trained_is_what_is_kept(method: Method) -> None:
    """The model computes the same once ordinary linears stand again where something trained."""
    with tiny_checkpoint() as folder, in_training(method, folder) as trial:
        trial.carry_out(0, range(STEPS))
        trained = trial.logits()
        trial.weights()
        kept = trial.logits()
    error = float((kept - trained).norm() / trained.norm())
    assert error <= 1e-4, f"logits of the result are {error:.1e} away from those that trained"  # sums in another order


def training_goes_on_with_the_same_bits(method: Method) -> None:
    """Two steps, all that is kept taken up by another student, and two more are four steps; and every run gives the same."""
    with tiny_checkpoint() as folder:
        with in_training(method, folder) as whole:
            whole.carry_out(0, range(STEPS))
            expected = whole.weights()
        with in_training(method, folder) as first:
            first.carry_out(0, range(STEPS // 2))
            kept = first.state()
        with in_training(method, folder) as second:
            second.restore(kept)
            second.carry_out(0, range(STEPS // 2, STEPS))
            found = second.weights()
    for name, W in expected.items():
        assert torch.equal(W, found[name]), f"{name} is not what it is without a stop"
