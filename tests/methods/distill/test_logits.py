"""The distillation loss is the KL divergence, in value and in gradient."""

import pytest
import torch

from qtool.methods.distill.logits import LogitsOptions, logits


def test_the_value_is_that_of_the_definition() -> None:
    student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (t / 2).softmax(0), (s / 2).softmax(0)
        expected += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)) * 4 / 2  # T squared, two tokens
    assert float(logits(student, teacher, LogitsOptions(temperature=2.0))) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_difference_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 5, 7, generator=generator, requires_grad=True),
        torch.randn(2, 5, 7, generator=generator),
    )
    T = 3.0
    logits(student, teacher, LogitsOptions(temperature=T)).backward()
    expected = T * ((student.detach() / T).softmax(-1) - (teacher / T).softmax(-1)) / 10  # 10 tokens
    assert torch.allclose(student.grad, expected, atol=1e-6)  # type: ignore[arg-type]


def test_one_token_and_equal_models_cost_nothing() -> None:
    x = torch.randn(1, 1, 4)
    assert float(logits(x, x, LogitsOptions())) == pytest.approx(0.0, abs=1e-7)
