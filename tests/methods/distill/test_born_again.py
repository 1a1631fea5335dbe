"""Born-Again's two treatments do to the teacher's prediction what the paper says."""

import pytest
import torch
import torch.nn.functional as F

from qtool.methods.distill.born_again import confidence_weighted, permuted


def test_the_weights_of_cwtm_are_the_teachers_confidence_and_sum_to_one() -> None:
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, 7, generator=random)
    labels = torch.tensor([[3, 0, 6, 2, -100]])
    p = teacher[0, :4].softmax(-1).max(-1).values
    by_hand = sum(w * F.cross_entropy(s, y) for w, s, y in zip(p / p.sum(), student[0], labels[0], strict=False))
    assert float(confidence_weighted(student, teacher, labels)) == pytest.approx(float(by_hand), rel=1e-5)
    even = torch.zeros_like(teacher)
    plain = F.cross_entropy(student[0, :4], labels[0, :4])
    assert float(confidence_weighted(student, even, labels)) == pytest.approx(float(plain), rel=1e-5)


def test_dkpp_keeps_the_largest_and_all_values() -> None:
    p = torch.randn(6, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    found = permuted(p, torch.Generator().manual_seed(1))
    assert torch.equal(found.argmax(-1), p.argmax(-1))
    assert torch.equal(found.max(-1).values, p.max(-1).values)
    assert torch.equal(found.sort(-1).values, p.sort(-1).values)
    assert not torch.equal(found, p)
    assert not torch.equal(found, permuted(p, torch.Generator().manual_seed(2)))


def test_every_order_of_the_others_is_as_likely() -> None:
    p = torch.tensor([0.1, 0.6, 0.2, 0.1001]).repeat(6000, 1)
    first = permuted(p, torch.Generator().manual_seed(0))[:, 0]
    counts = [int((first == value).sum()) for value in (0.1, 0.2, 0.1001)]
    assert min(counts) > 1850 and max(counts) < 2150  # 2000 ± 4 standard deviations of 37
