"""TopKLD (experimental): forward KL over the teacher's likeliest tokens, reverse KL over all the others.

    L = sum over i in K of p_i (log p_i - log q_i)  +  lam sum over i not in K of q_i (log q_i - log p_i)
    K the `k` likeliest tokens of p    p = softmax(teacher / T), q = softmax(student / T) [tokens, vocab];  times T²
Source: Ding et al. 2025, arXiv:2501.06218 (Dissecting Bit-Level Scaling Laws in Quantizing Vision Generative Models). Differs:
the paper's formula could not be had. Abstract and reviews tell that it balances "explicit" with "implicit knowledge" beside
forward and reverse KL, with a top-K parameter: this is a reading of that, whose figures are not the paper's.
For: comparisons at three bits and below; distill/logits is the plain choice.
Costs: training: 16 bytes a parameter and the original beside it.
"""

from pydantic import Field
from torch import Tensor

from qtool.formats.target import Target, log_distributions
from qtool.options import TrainingOptions
from qtool.registry import Method


class TopkldOptions(TrainingOptions):
    """Where the two parts meet."""

    k: int = Field(64, ge=1, description="tokens of the forward part")
    lam: float = Field(1.0, ge=0, description="weight of the reverse part")


def topkld(student: Tensor, target: Target, labels: Tensor, options: TopkldOptions) -> Tensor:
    """Scalar loss in nats per token of logits [..., vocab]; labels [...] are not looked at.

    The parts alone could fall below zero, as neither is of two distributions; the masses' difference, which completes each
    to a divergence of measures, is added to both.
    """
    q, p = log_distributions(student, target, options.temperature)  # [tokens, outcomes]
    places = p.topk(min(options.k, p.shape[-1]), dim=-1).indices  # [tokens, k]
    p_k, q_k = p.gather(-1, places), q.gather(-1, places)
    forward = (p_k.exp() * (p_k - q_k) - p_k.exp() + q_k.exp()).sum(-1)
    whole = q.exp() * (q - p) - q.exp() + p.exp()  # [tokens, outcomes]
    reverse = whole.sum(-1) - whole.gather(-1, places).sum(-1)
    return options.temperature**2 * (forward + options.lam * reverse).mean()


METHOD = Method(run=topkld, options=TopkldOptions, scope="training")
