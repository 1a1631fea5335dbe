"""OSTQuant: learn rotations and channels' scales together, by how far the rounded model's predictions move.

    min over R, S   KL_k(p, q)       p, q of the model as it was and as it is, rotated, scaled and rounded
    x <- x R_res,  v <- (v / S_ov) R_ov,  u <- u / S_ud      x [tokens, hidden]    v of one head    u what down_proj reads
    k <- k S_qk,  q <- q / S_qk                              k, q of one head, before their positions turn them
R_res is one for all; R_ov one for each key/value head, S_ov, S_ud [channels] and S_qk [rotary pairs, both channels alike] of
each block, wherever a scale passes from one linear to the next, as found by trial; S_qk where `cache` is rounded, since rows of
weights have scales of their own and it would change nothing else. KL_k takes the k tokens that the model as it was finds
likeliest, both distributions made to sum to 1 over them. All of it is folded in the end, as transform/hadamard folds, and the
model computes what it did.
WOMI starts it: R = V Hᵀ / √n with V the eigenvectors of the weights that read x, so that all channels have the same variance.
Rotations move by Cayley Adam (linalg/stiefel.py), log S by Adam; the best values seen are kept, the start among them. QSUR
(linalg/qsur.py) of the linears' inputs, before and after, stands with the step in results.json.
Source: Hu et al. 2025, arXiv:2501.13987. Differs: log S learns, so that S stays positive; norms' outputs are not scaled; rates
are those of the text, for log S a third, as the paper states two; Cayley Adam for Riemannian Adam.
For: four-bit inputs; where a few channels within heads or of down_proj's input stand out, more than spinquant.
Costs: gradients through the whole model in memory, in float32, and its own predictions, `steps` times `batch` windows.
"""

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.rotations import LearnedRotations, added_online, bytes_online
from qtool.linalg.divergence import kl_of_largest
from qtool.linalg.hadamard import levelling_rotation, random_signs
from qtool.linalg.qsur import qsur
from qtool.linalg.stiefel import CayleyAdam
from qtool.model.handle import ModelHandle
from qtool.model.rotated_network import RotatedNetwork, learn
from qtool.model.rotation import Places, Rotations
from qtool.registry import Method

LOOKED_AT = 4  # windows whose inputs QSUR is taken of
LARGEST_LOG_SCALE = math.log(100)  # either way, so that no channel is divided away


class OstQuantOptions(LearnedRotations):
    """What the model will be rounded to, and how to learn."""

    k: int = Field(1000, ge=2, description="likeliest tokens that the loss looks at")
    lr: float = Field(0.02, gt=0, le=10, description="of the rotations at first, a step of their entries; falls by a cosine")
    scale_lr: float = Field(0.01, gt=0, le=1, description="of log S at first")


def ostquant(
    places: Places, network: RotatedNetwork, options: OstQuantOptions, seed: int, note: Callable[[str], None]
) -> Rotations:
    """The best rotations and scales seen; raises QtoolError where the model does not allow any."""
    places.check_residual()
    places.note_heads(note)
    if options.cache is not None:
        places.note_keys(note)
    random = torch.Generator().manual_seed(seed)
    matrices = [levelling_rotation(network.reading_covariance().cpu(), places.keeps_mean, random)]
    for Sigmas in network.reading_of_heads().values():
        matrices.append(torch.stack([levelling_rotation(Sigma.cpu(), False, random) for Sigma in Sigmas]))
    matrices = [R.to(network.device).requires_grad_() for R in matrices]
    n_scales = (*places.scales.values(), *places.keys.values())
    logs = [torch.zeros(n, dtype=torch.float64, device=network.device).requires_grad_() for n in n_scales]
    inputs = {name: random_signs(n, random) for name, n in places.inputs.items()} if options.online else {}
    cayley = CayleyAdam(matrices, [places.keeps_mean, *(False for _ in places.heads)])
    adam = None if not logs else torch.optim.Adam(logs, lr=options.scale_lr)

    def rotations() -> Rotations:
        heads = dict(zip(places.heads, matrices[1:], strict=True))
        S = [log.exp() for log in logs]
        scales = dict(zip(places.scales, S[: len(places.scales)], strict=True))
        keys = dict(zip(places.keys, S[len(places.scales) :], strict=True))
        return Rotations(matrices[0], heads, inputs, scales, keys)

    def loss(rows: Tensor) -> Tensor:
        return kl_of_largest(network.original_logits(rows), network.logits(rotations(), options, rows), options.k).mean()

    def update(gradients: Sequence[Tensor], step: int) -> None:
        share = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        cayley.step(gradients[: len(matrices)], options.lr * share)
        if adam is not None:
            for log, gradient in zip(logs, gradients[len(matrices) :], strict=True):
                log.grad = gradient
            adam.param_groups[0]["lr"] = options.scale_lr * share
            adam.step()
            with torch.no_grad():
                for log in logs:
                    log.clamp_(-LARGEST_LOG_SCALE, LARGEST_LOG_SCALE)

    losses = learn([*matrices, *logs], loss, update, network, options, seed)
    if losses[0] == min(losses) and options.steps:
        note("no step lowered the loss of the rounded model; the rotations are those of the start")
    found = rotations().detached(losses)
    return found.judged(mean_qsur(network, Rotations(), options), mean_qsur(network, found, options))


def mean_qsur(network: RotatedNetwork, rotations: Rotations, options: OstQuantOptions) -> float:
    """QSUR of the inputs of linears that will be rounded, the mean over them; with Rotations(), of the model as it was."""
    rows = torch.arange(min(LOOKED_AT, network.n_windows))
    found = [qsur(moment) for moment in network.input_moments(rotations, options, rows).values()]
    known = [value for value in found if value is not None]
    return sum(known) / max(len(known), 1)


def check(model: ModelHandle, options: OstQuantOptions) -> None:
    """Raise QtoolError where nothing would be rounded, or the cache cannot be."""
    options.check_rounding("transform/ostquant")
    if options.cache is not None:
        model.check_kivi(options.cache, "transform/ostquant")


def parts_head(options: OstQuantOptions) -> bool:
    """The last norm's gain and the rotation go into the head alone."""
    return True


METHOD = Method(
    run=ostquant,
    options=OstQuantOptions,
    scope="model",
    needs=("inputs",),
    check=check,
    adds=added_online,
    added_bytes=bytes_online,
    parts_head=parts_head,
)
