"""Train the compressed model to give the original's next-token distribution.

    forward  L = T² mean over tokens of KL(p ‖ q),  KL(p ‖ q) = sum_v p_v (log p_v - log q_v)        reverse  KL(q ‖ p)
    jsd      b KL(p ‖ m) + (1 - b) KL(q ‖ m),  m = b p + (1 - b) q
    p = softmax(teacher / T),  q = softmax(student / T)    teacher, student [tokens, vocab] logits
With top_k the k likeliest of p count each by itself and the rest as one outcome, see formats/target.py. The teacher is the
model that the recipe names; text labels are not used, unless `labels` gives their cross-entropy a share. Zeros that pruning
made stay zero. The scales of quantized layers learn, and with code_lr their codes too; with generate the teacher writes more
text to train on, which at two bits keeps the student from learning the calibration text by heart.
Source: Hinton et al. 2015, arXiv:1503.02531, section 2; forward KL alone as in Minitron, arXiv:2407.14679; jsd:
Agarwal et al. 2023, arXiv:2306.13649 (GKD).
For: after quantizing or pruning, the largest gain of all at two and three bits; tunes scales, norms, embeddings.
Costs: training: 16 bytes a parameter and the original beside it.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.formats.target import Target, log_distributions
from qtool.linalg.divergence import distillation_loss
from qtool.options import TrainingOptions
from qtool.registry import Method


class LogitsOptions(TrainingOptions):
    """Which divergence, and how to train."""

    divergence: Literal["forward", "reverse", "jsd"] = Field(
        "forward",
        description="forward: cover all that the teacher says; reverse: say nothing that it does not; jsd: between the two",
    )
    beta: float = Field(0.5, gt=0, lt=1, description="of jsd: the teacher's share of the mixture")


def logits(student: Tensor, target: Target, labels: Tensor, options: LogitsOptions) -> Tensor:
    """Scalar loss in nats per token of logits [..., vocab]; zero where they agree. labels [...] are not looked at."""
    T = options.temperature
    if options.divergence == "forward":
        return distillation_loss(student, target, T)
    q, p = log_distributions(student, target, T)  # [tokens, outcomes]
    if options.divergence == "reverse":
        return T**2 * F.kl_div(p, q, reduction="batchmean", log_target=True)
    share = torch.tensor([options.beta, 1 - options.beta], device=p.device).log()  # [2]
    m = torch.logsumexp(torch.stack([p + share[0], q + share[1]]), dim=0)  # [tokens, outcomes]
    toward_p, toward_q = (F.kl_div(m, one, reduction="batchmean", log_target=True) for one in (p, q))
    return T**2 * (options.beta * toward_p + (1 - options.beta) * toward_q)


METHOD = Method(run=logits, options=LogitsOptions, scope="training")
