"""Rotations: what is stored of one that runs online, and the options of transforms that learn them.

x <- (x D) H / √n        D the diagonal of signs [n], ±1 in int8; H follows from n, see linalg/hadamard.py
"""

from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.options import Options


@dataclass(frozen=True)
class InputRotation:
    """What a linear does to its input before it multiplies: signs [in]."""

    signs: Tensor


class OnlineOption(Options):
    """The option of a transform whose rotations may stay, as layers."""

    online: bool = Field(
        False,
        description="also the inputs of down_proj and o_proj, by Hadamard matrices that stay, while the model runs; only "
        "export/qtool holds that",
    )


def added_online(options: OnlineOption) -> str:
    """What exports must hold beside weights."""
    return "rotations of inputs" if options.online else ""


def bytes_online(options: OnlineOption, out: int, columns: int) -> int:
    """Signs of one linear, where it is one whose input rotates."""
    return columns if options.online else 0


class LearnedRotations(SchemeSelection, OnlineOption):
    """Options of a transform that learns rotations: what the quantize step that follows will round, and how to learn."""

    rounds: Literal["both", "inputs", "weights"] = Field(
        "both", description="what is rounded while rotations learn; inputs where GPTQ follows, which sees to the weights itself"
    )
    cache: KiviScheme | None = Field(
        None, description="how the key/value cache is rounded while rotations learn: options of the quantize/kivi that follows"
    )
    steps: int = Field(100, ge=0, description="updates")
    batch: int = Field(8, ge=1, description="windows in one update")

    @property
    def schemes(self) -> list[Scheme]:
        """All that linears are rounded to."""
        return [scheme for scheme in (self.scheme, *self.modules.values()) if isinstance(scheme, Scheme)]

    def check_rounding(self, where: str) -> None:
        """Raise QtoolError, which begins with `where`, if nothing would be rounded."""
        rounds_weights = self.rounds != "inputs" or self.scheme == "search"
        if not rounds_weights and self.cache is None and all(one.activations is None for one in self.schemes):
            raise QtoolError(f"{where}: rounds is inputs, but the scheme rounds none, as w4a4 would; set rounds: weights")
