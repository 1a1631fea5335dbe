"""Work: what a step has done to one unit, and how far the result is from what was there."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.model.store import Changes


@dataclass
class Work:
    """What one unit (a block, or what stands outside the blocks) has come to."""

    changes: Changes
    linears: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)

    def note(self, where: str) -> Callable[[str], None]:
        return lambda text: self.fallbacks.append(f"{where}: {text}")


def errors(before: Tensor, after: Tensor, stats: LayerStats | None) -> dict[str, float | None]:
    """SQNR of the weights in dB, and the relative squared error of the outputs over the calibration tokens."""
    D = after.to(before.device) - before
    noise, signal = float(D.square().sum()), float(before.square().sum())
    sqnr = 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else None
    relative = None
    if stats is not None and stats.has_hessian and stats.n_tokens:
        H = stats.hessian()
        power = float(((before @ H) * before).sum())
        relative = float(((D @ H) * D).sum()) / power if power > 0 else None
    return {"sqnr_db": sqnr, "relative_output_error": relative}
