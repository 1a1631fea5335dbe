"""Divergence: how far next-token distributions move, measured and predicted from gradients.

    KL(p ‖ q) = sum_v p_v (log p_v - log q_v)    p, q [positions, vocab], of the model as it was and as it is
    KL(p_θ ‖ p_θ+δ) = ½ δᵀ F δ + O(δ³),   F = E[g gᵀ],  g = gradient by θ of log p_θ(y),  y drawn from p_θ itself
For changes D [out, in] of a linear with gradient G [out, in] of  sum over positions t of log p_θ(y_t):
    mean over positions of KL = E[(sum over rows and columns of G D)²] / (2 positions)
                              ~ E[sum over rows of (sum over columns of G D)²] / (2 positions)
Why rows apart: rounding errors of two output channels are not correlated, and the products that this leaves out vanish in
the mean; what they would add to the estimate is noise.
Why the sum over positions: each y_t is drawn by itself and has a mean gradient of zero, so products of two positions' gradients
vanish in the mean, and one backward pass does for all.
Source: Kullback and Leibler 1951, doi:10.1214/aoms/1177729694; Fisher information of a network's own draws: Kunstner et al.
2019, arXiv:1905.12558, section 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.formats.target import Target, log_distributions


def distillation_loss(student: Tensor, target: Target, temperature: float) -> Tensor:
    """T² KL(p ‖ q) in nats per token of a student's logits [..., vocab]: p the target's, q the student's, both at T."""
    q, p = log_distributions(student, target, temperature)  # [tokens, outcomes]
    return temperature**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


def kl(original: Tensor, changed: Tensor) -> Tensor:
    """KL in nats [...] of the distributions of logits [..., vocab], in float32."""
    p, q = original.float().log_softmax(-1), changed.float().log_softmax(-1)  # [..., vocab]
    return (p.exp() * (p - q)).sum(-1)


def kl_of_largest(original: Tensor, changed: Tensor, k: int) -> Tensor:
    """KL in nats [...] of logits [..., vocab] over the k that are largest in `original`, both made to sum to 1 there."""
    places = original.topk(min(k, original.shape[-1]), -1).indices  # [..., k]
    return kl(original.gather(-1, places), changed.gather(-1, places))


def log_likelihood_of_draws(logits: Tensor, random: torch.Generator) -> Tensor:
    """sum over positions t of log p(y_t), y_t drawn from p, of logits [positions, vocab]; gradients reach the logits."""
    log_p = logits.float().log_softmax(-1)  # [positions, vocab]
    drawn = torch.multinomial(log_p.detach().exp().cpu(), 1, generator=random)  # [positions, 1]
    return log_p.gather(1, drawn.to(log_p.device)).sum()


def squared_product(G: Tensor, D: Tensor) -> float:
    """sum over rows of (sum over columns of G D)², of G, D [out, in]: one window's part of 2 positions · KL."""
    return float((G * D).sum(1).square().sum())
