"""SpinQuant: learn the rotations of the residual stream and of the heads' values by what the rounded model predicts.

    min over R_1, R_2   L(tokens; the model rotated by them, its weights and inputs rounded)      R Rᵀ = I
    x <- x R_1,  v <- v R_2     x [tokens, hidden]    v [tokens, head_dim] of one head    L cross-entropy of the next token
R_1 [hidden, hidden] is one for all, R_2 [head_dim, head_dim] one for each block. They start as random Hadamard matrices and
move by Cayley SGD (linalg/stiefel.py), which keeps them orthogonal; gradients pass straight through every rounding, and the
weights stay. In the end they are folded as transform/hadamard folds its own, and the model computes what it did.
The rotations of the lowest loss seen are kept, those of the start among them. Where norms subtract the mean, R_1 keeps it.
Source: Liu et al. 2024, arXiv:2405.16406, section 3. Differs: queries and keys are not rotated; `online` rotates o_proj's input
too. Li et al. 2020, arXiv:2002.01113 for the steps.
For: four-bit inputs, where rotations by chance differ; after it quantize/gptq, with rounds: inputs here.
Costs: gradients through the whole model in memory, in float32, `steps` times `batch` windows.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.formats.rotations import LearnedRotations, added_online, bytes_online
from qtool.linalg.hadamard import random_signs, spreading_rotation
from qtool.linalg.stiefel import CayleySGD
from qtool.model.handle import ModelHandle
from qtool.model.rotated_network import RotatedNetwork, learn
from qtool.model.rotation import Places, Rotations
from qtool.registry import Method

MOMENTUM = 0.9


class SpinQuantOptions(LearnedRotations):
    """What the model will be rounded to, and how to learn."""

    lr: float = Field(1.5, gt=0, le=100, description="length of a step at first, falling to zero; 1.5 is the paper's")


def spinquant(
    places: Places, network: RotatedNetwork, options: SpinQuantOptions, seed: int, note: Callable[[str], None]
) -> Rotations:
    """The best rotations seen; raises QtoolError where the model does not allow any."""
    places.check_residual()
    places.note_heads(note)
    random = torch.Generator().manual_seed(seed)
    matrices = [spreading_rotation(places.hidden, places.keeps_mean, random)]
    matrices += [spreading_rotation(size, False, random) for _, size in places.heads.values()]
    matrices = [R.to(network.device).requires_grad_() for R in matrices]
    inputs = {name: random_signs(n, random) for name, n in places.inputs.items()} if options.online else {}
    optimizer = CayleySGD(matrices, MOMENTUM, [places.keeps_mean, *(False for _ in places.heads)])

    def rotations() -> Rotations:
        heads = zip(places.heads.items(), matrices[1:], strict=True)
        return Rotations(matrices[0], {name: R.expand(n, size, size) for (name, (n, size)), R in heads}, inputs)

    def loss(rows: Tensor) -> Tensor:
        logits, tokens = network.logits(rotations(), options, rows), network.windows(rows)  # [batch, length, vocab]
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())

    def update(gradients: Sequence[Tensor], step: int) -> None:
        optimizer.step(gradients, options.lr * (1 - step / options.steps))

    losses = learn(matrices, loss, update, network, options, seed)
    if losses[0] == min(losses) and options.steps:
        note("no step lowered the loss of the rounded model; the rotations are those of the start")
    return rotations().detached(losses)


def check(model: ModelHandle, options: SpinQuantOptions) -> None:
    """Raise QtoolError where nothing would be rounded, or the cache cannot be."""
    options.check_rounding("transform/spinquant")
    if options.cache is not None:
        model.check_kivi(options.cache, "transform/spinquant")


def parts_head(options: SpinQuantOptions) -> bool:
    """The last norm's gain and the rotation go into the head alone."""
    return True


METHOD = Method(
    run=spinquant,
    options=SpinQuantOptions,
    scope="model",
    needs=("inputs",),
    check=check,
    adds=added_online,
    added_bytes=bytes_online,
    parts_head=parts_head,
)
