"""Train the compressed model to give the original's next-token distribution.

    L = T² mean over tokens of  sum_v p_v (log p_v - log q_v),    p = softmax(teacher / T),  q = softmax(student / T)
    teacher, student [tokens, vocab] logits
The teacher is the model that the recipe names; text labels are not used. Zeros that pruning made stay zero. The scales of
quantized layers learn, and with code_lr their codes too; with generate the teacher writes more text to train on, which at
two bits keeps the student from learning the calibration text by heart.
Source: Hinton et al. 2015, arXiv:1503.02531, section 2; forward KL alone as in Minitron, arXiv:2407.14679, section 3.
For: after quantizing or pruning, the largest gain of all at two and three bits; tunes scales, norms, embeddings.
Costs: training: 16 bytes a parameter and the original beside it.
"""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.options import TrainingOptions
from qtool.registry import Method


class LogitsOptions(TrainingOptions):
    """The softness of the target, and how to train."""

    temperature: float = Field(1.0, gt=0, le=100, description="divides both models' logits")


def logits(student: Tensor, teacher: Tensor, options: LogitsOptions) -> Tensor:
    """Scalar loss in nats per token of student and teacher [..., vocab]; zero where they agree."""
    T = options.temperature
    p = F.log_softmax(teacher.float() / T, dim=-1).flatten(0, -2)  # [tokens, vocab]
    q = F.log_softmax(student.float() / T, dim=-1).flatten(0, -2)
    return T**2 * F.kl_div(q, p, reduction="batchmean", log_target=True)


METHOD = Method(run=logits, options=LogitsOptions, scope="training")
