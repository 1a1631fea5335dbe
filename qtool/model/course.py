"""Course: what a method of scope course does to a student while the one training driver trains it.

A method is `run(trainee, options) -> Course`: it may put other layers in place of linears, and says in functions what happens
around a step. What changes from step to step lies in parameters and buffers of the student, in `extra`, or in `state`, so that
a run that was killed goes on with the same bits; what is random is drawn by `random_of(seed, step)`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.formats.scheme import Scheme
from qtool.formats.target import Target
from qtool.layers.rotated_input import carry_rotation
from qtool.layers.trained_linear import TrainedLinear, trained_linears
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.model.wiring import oriented

Backward = Callable[[], float]  # one batch forward and back: adds to the gradients, returns the loss


@dataclass(frozen=True)
class Trainee:
    """The student in float32, the original, and the names of dense linears that the options choose."""

    student: PreTrainedModel
    teacher: PreTrainedModel | None
    blocks: tuple[list[nn.Module], list[nn.Module]]  # of both
    linears: tuple[str, ...]
    steps: int
    seed: int
    note: Callable[[str], None]
    teach: Callable[[nn.Module], None]  # from now on another model is the teacher
    held_out: Tensor  # windows [samples, length] that nothing trains on
    windows: Tensor  # windows [samples, length] to train on
    model: ModelHandle  # what the student was made of

    def replace(self, make: Callable[[Tensor], nn.Module]) -> dict[str, nn.Module]:
        """Let `make`, of weights [out, in], give the form of every chosen linear; returns the forms by name."""
        forms = {}
        for name in self.linears:
            layer = self.student.get_submodule(name)
            forms[name] = make(weight_of(layer))
            layer.get_parameter("weight").data = torch.empty(0)  # until `merge`
            put(self.student, name, TrainedLinear(getattr(layer, "bias", None), forms[name]))
        return forms


def _leave(*_: Any) -> None:
    return None


def whole_logits(student: nn.Module, rows: Tensor) -> Tensor:
    """Logits [batch, length, vocab] of the student for tokens [batch, length]."""
    logits: Tensor = student(rows, use_cache=False).logits
    return logits


@dataclass(frozen=True)
class Course:
    """What happens around a step; every part that is left away does nothing."""

    before_step: Callable[[int], None] = _leave
    gradients: Callable[[int, Backward], float] = lambda step, backward: backward()
    logits: Callable[[nn.Module, Tensor], Tensor] = whole_logits  # of the student, or a part of it, for tokens [batch, length]
    loss: Callable[[Tensor, Target, Tensor], Tensor] | None = None  # of the student's logits [..., vocab], the target and
    # labels [...]; None: forward KL
    penalty: Callable[[], Tensor | None] = _leave  # added to the loss of every forward
    after_step: Callable[[int], None] = _leave
    masks: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # weights that are False there stay zero
    trained: tuple[nn.Parameter, ...] | None = None  # None: all of the student's
    extra: nn.Module | None = None  # learns beside the student and is forgotten afterwards
    state: dict[str, Tensor] = field(default_factory=dict)  # changed in place
    phases: int = 1  # trainings from the same start, one after the other
    between: Callable[[int], None] = _leave  # before phase 1, 2, ..., with the student as the phase before has left it
    begin: Callable[[int], None] = _leave  # at every phase's beginning, and where a run goes on in it
    share: Callable[[], float | None] = _leave  # of the text's own tokens in the loss, where it is not the options'
    finish: Callable[[], dict[str, str]] = dict  # once the student is trained: what linears have become, in words, by name
    schemes: dict[str, Scheme] = field(default_factory=dict)  # of linears that `finish` quantizes


@torch.no_grad()
def merge(student: nn.Module, before: dict[str, nn.Module]) -> None:
    """Put the linears that stood `before`, by name, back in place of trained ones, with the weights these came to."""
    for name, layer in list(trained_linears(student)):
        linear = before[name]
        linear.get_parameter("weight").data = oriented(linear, layer.weight_values())
        put(student, name, linear)


def random_of(seed: int, step: int) -> torch.Generator:
    """The draws of one step, the same whenever it is carried out."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


def put(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Let `layer` stand at a full name; it rotates its input where what stood there did."""
    carry_rotation(model.get_submodule(name), layer)
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, layer)
