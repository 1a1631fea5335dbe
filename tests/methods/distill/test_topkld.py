"""TopKLD is forward KL where all tokens are among the likeliest, and reverse KL where none is."""

import pytest
import torch

from qtool.formats.target import Target
from qtool.linalg.divergence import kl
from qtool.methods.distill.topkld import TopkldOptions, topkld


def test_all_tokens_give_forward_kl() -> None:
    student, teacher = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    found = topkld(student, Target(teacher), teacher.argmax(-1), TopkldOptions(k=9))
    assert float(found) == pytest.approx(float(kl(teacher, student).mean()), rel=1e-5)


def test_both_parts_are_those_of_the_definition() -> None:
    student, teacher = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(1))
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    order = p.argsort(descending=True)
    K, rest = order[:2], order[2:]
    forward = (p[K] * (p[K] / q[K]).log() - p[K] + q[K]).sum()
    reverse = (q[rest] * (q[rest] / p[rest]).log() - q[rest] + p[rest]).sum()
    found = topkld(student, Target(teacher), teacher.argmax(-1), TopkldOptions(k=2, lam=0.5))
    assert float(found) == pytest.approx(float(forward + 0.5 * reverse), rel=1e-5)
