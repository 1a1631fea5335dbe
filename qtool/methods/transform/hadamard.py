"""QuaRot: rotate the residual stream and each head's values by Hadamard matrices, so that no channel is an outlier.

    x <- x Q,  v <- v R        x [tokens, hidden]    v [tokens, head_dim] of one head
    Q = D H / √hidden,  R = D H / √head_dim        H Hadamard, D a diagonal of random signs
An outlier in one channel becomes 1/√hidden of itself in all. The rotations are folded into the weights in float64, with
every norm's gain, the last one's too, so that the model computes the same, is plain afterwards and fits every export (see
model/rotation.py); embedding and head that were one tensor become two. With `online`, the inputs of the linears that write to
the residual stream, such as down_proj and o_proj, are rotated too, while the model runs: only qtool's own export holds that.
Where norms subtract the mean (OPT, GPT-2, GPT-NeoX, Falcon), Q = H D Hᵀ / hidden with D_11 = 1, which keeps it; D is random
there in any case. Where no Hadamard matrix of a size is known (see linalg/hadamard.py), folded rotations are random
orthogonal ones and online ones work in blocks, which is noted.
Source: Ashkboos et al. 2024, arXiv:2404.00456, section 4. Differs: the rotation online before o_proj spans all of its input and
not the heads alone; values have random signs of their own in every block; queries and keys stay as they are.
For: before any scheme with four-bit inputs; of little use for weights alone.
Costs: no calibration, two passes over the weights, memory of three blocks in float64; online, a few operations for each input.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.rotations import OnlineOption, added_online, bytes_online
from qtool.linalg.hadamard import (
    hadamard_block,
    hadamard_rotation,
    mean_keeping_rotation,
    random_orthogonal,
    random_signs,
    small_factor,
)
from qtool.model.rotation import Places, Rotations
from qtool.registry import Method


class HadamardOptions(OnlineOption):
    """What is rotated."""

    residual: bool = Field(True, description="the residual stream: all inputs that come from norms")
    heads: bool = Field(True, description="each head's values: the inputs of o_proj, within a head")
    randomized: bool = Field(True, description="random signs; false: the Hadamard matrices themselves")


def hadamard(places: Places, options: HadamardOptions, seed: int, note: Callable[[str], None]) -> Rotations:
    """Rotations of everything that is asked for; raises QtoolError where the model does not allow one."""
    random = torch.Generator().manual_seed(seed)
    if not (options.residual or options.heads or options.online):
        raise QtoolError("nothing is left to rotate; set residual, heads or online to true")

    def rotation(n: int, what: str) -> Tensor:
        """[n, n] orthogonal, float64."""
        Q = hadamard_rotation(n, random_signs(n, random) if options.randomized else None)
        if Q is None:
            note(f"{what}: no Hadamard matrix of order {n} is known; a random orthogonal one takes its place")
            return random_orthogonal(n, random)
        return Q

    residual, heads, inputs = None, {}, {}
    if options.residual:
        places.check_residual()
        if places.keeps_mean:
            residual = mean_keeping_rotation(places.hidden, random)
        else:
            residual = rotation(places.hidden, "residual stream")
    if options.heads:
        places.check_heads()
        places.note_heads(note)
        for name, (n_heads, size) in places.heads.items():
            heads[name] = rotation(size, name).expand(n_heads, size, size)
    if options.online:
        for name, n in places.inputs.items():
            if small_factor(n) is None:
                note(f"{name}: no Hadamard matrix of order {n} is known; its input is rotated in blocks of {hadamard_block(n)}")
            inputs[name] = random_signs(n, random) if options.randomized else torch.ones(n, dtype=torch.float64)
    return Rotations(residual, heads, inputs)


def parts_head(options: HadamardOptions) -> bool:
    """The last norm's gain and the rotation go into the head alone."""
    return options.residual


METHOD = Method(
    run=hadamard,
    options=HadamardOptions,
    scope="model",
    adds=added_online,
    added_bytes=bytes_online,
    parts_head=parts_head,
)
