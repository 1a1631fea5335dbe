"""Distance of what a block gives from what it should: by size and by direction, and of its attention from another's.

    d(a, b) = mean (a - b)² - mean over tokens of log cos(a, b)      a, b [..., hidden]
    J(A, B) = KL(A ‖ B) + KL(B ‖ A) = sum over keys of (A - B) (log A - log B),  mean over queries    A, B [..., queries, keys]
Source: Zeng et al. 2024, arXiv:2408.08554 (ABQ-LLM), section 3.2. Differs: the logarithm is taken token by token.
"""

import torch.nn.functional as F
from torch import Tensor

LEAST_COS = 1e-4  # where log cos is cut off
LEAST_SHARE = 1e-6  # of attention, below which shares are all alike


def distance(a: Tensor, b: Tensor) -> Tensor:
    """d(a, b), a scalar."""
    return (a - b).square().mean() - F.cosine_similarity(a, b, dim=-1).clamp(min=LEAST_COS).log().mean()


def distance_from_both(out: Tensor, targets: Tensor, own: Tensor) -> Tensor:
    """How far out is from targets, f(x°), and from own, f(x), all [samples, length, hidden]; a scalar."""
    return distance(out.float(), targets.float()) + distance(out.float(), own.float())


def symmetric_kl(A: Tensor, B: Tensor) -> Tensor:
    """J(A, B), a scalar."""
    A, B = A.float().clamp(min=LEAST_SHARE), B.float().clamp(min=LEAST_SHARE)
    return ((A - B) * (A.log() - B.log())).sum(-1).mean()
