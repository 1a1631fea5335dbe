"""The strict pydantic base of every options model, and the choice of modules by name pattern."""

import fnmatch
import re
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, Field

from qtool.errors import QtoolError


class Options(BaseModel):
    """Subclass per method; give every field a range and a description."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingOptions(Options):
    """Options of a method that the training driver runs."""

    steps: int = Field(200, ge=0, description="optimizer steps")
    batch: int = Field(8, ge=1, description="windows in one optimizer step")
    accumulate: int = Field(1, ge=1, description="forward passes that one optimizer step is split into")
    lr: float = Field(1e-4, gt=0, le=1, description="peak learning rate of AdamW")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps with a rising rate; then cosine to zero")
    clip: float = Field(1.0, gt=0, description="largest norm of the gradient")
    checkpoint_every: int = Field(50, ge=1, description="steps between checkpoints that a killed run goes on from")


class Selection(Options):
    """Options of a method that works on the model's linears."""

    ignore: tuple[str, ...] = Field(("lm_head",), description="name patterns of linears to leave as they are")

    def is_ignored(self, name: str) -> bool:
        return any(matches(name, pattern) for pattern in self.ignore)

    def patterns(self) -> tuple[str, ...]:
        """Every pattern the user wrote; each must match something."""
        return self.ignore if "ignore" in self.model_fields_set else ()


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits: `re:` and a regular expression, or a glob over its last or all dotted parts."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def require_matches(where: str, patterns: Iterable[str], names: list[str]) -> None:
    """Raise QtoolError for the first pattern that matches no name."""
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise QtoolError(f'{where}: pattern "{pattern}" matches no linear; the model has {shown}')
