"""Target: what a teacher predicts at each position, all logits or the likeliest tokens with what the others sum to.

    all      p = softmax(teacher / T)                                  [..., vocab]
    largest  p_i of the k likeliest tokens, and 1 - sum p_i of the rest  [..., k + 1]
Why a bucket for the rest: a divergence of the buckets is never more than that of the whole distributions (Cover and Thomas,
Elements of Information Theory, theorem 2.8.1), is zero where they agree, and tells the student how much to leave to others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Target:
    """Logits [..., vocab]; or those of `tokens` [..., k], with logs of the sums of all and of the rest, at a temperature."""

    logits: Tensor
    tokens: Tensor | None = None
    total: Tensor | None = None
    rest: Tensor | None = None


def largest(logits: Tensor, k: int | None, temperature: float) -> Target:
    """The k likeliest of logits [..., vocab]; all of them where k is None or no fewer."""
    if k is None or k >= logits.shape[-1]:
        return Target(logits)
    values, tokens = logits.topk(k, dim=-1)  # [..., k]
    wide = logits.float() / temperature
    return Target(values, tokens, wide.logsumexp(-1), wide.scatter(-1, tokens, -torch.inf).logsumexp(-1))


def log_distributions(student: Tensor, target: Target, temperature: float) -> tuple[Tensor, Tensor]:
    """log q of the student's logits [..., vocab] and log p of the target, both float32 [tokens, outcomes]."""
    if target.tokens is None or target.total is None or target.rest is None:
        p = (target.logits.float() / temperature).log_softmax(-1)
        q = (student.float() / temperature).log_softmax(-1)
    else:
        total, rest = target.total.unsqueeze(-1), target.rest.unsqueeze(-1)  # [..., 1]
        p = torch.cat([target.logits.float() / temperature - total, rest - total], dim=-1)  # [..., k + 1]
        wide = student.float() / temperature
        others = wide.scatter(-1, target.tokens, -torch.inf).logsumexp(-1, keepdim=True)  # [..., 1]
        q = torch.cat([wide.gather(-1, target.tokens), others], dim=-1) - wide.logsumexp(-1, keepdim=True)
    return q.flatten(0, -2), p.flatten(0, -2)
