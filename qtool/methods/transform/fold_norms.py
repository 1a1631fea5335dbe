"""Move every norm's gain into the linears that read it, so that the norm only normalizes.

    gain_j <- 1,    W[:, j] <- W[:, j] gain_j        gain [in] of the norm    W [out, in] of each linear that it feeds
Rotations need this, and weights see the scale of their true input. The last norm, which feeds the head, stays.
Source: Ashkboos et al. 2024, arXiv:2401.15024, section 3.1 (the same fold opens QuaRot, arXiv:2404.00456, section 4).
Differs: a bias of a LayerNorm is divided by the gain and stays in the norm.
For: before rotations and other transforms that need norms without a gain.
Costs: seconds, no calibration.
"""

from collections.abc import Callable
from typing import cast

from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.model.architectures import gain_offset
from qtool.model.handle import Block
from qtool.model.linear import is_linear
from qtool.model.wiring import Edits, Scaling, scale_edits
from qtool.options import Options
from qtool.registry import Method


class FoldNormsOptions(Options):
    """No options."""


def fold_norms(
    block: Block,
    scalings: list[Scaling],
    stats: dict[str, LayerStats],
    options: FoldNormsOptions,
    note: Callable[[str], None],
) -> Edits:
    """Edits that set every gain of the block to 1; a gain that holds a zero stays and is noted."""
    edits: Edits = {}
    for scaling in scalings:
        norm = block.get(scaling.source)
        if is_linear(norm):
            continue
        gain = cast(Tensor, norm.weight).float() + gain_offset(norm)
        if (gain == 0).any():
            note(f"{scaling.source} has a gain of zero, which cannot be divided out; left as it is")
            continue
        scale_edits(block, scaling, gain, edits)
    return edits


METHOD = Method(run=fold_norms, options=FoldNormsOptions, scope="block")
