"""The distillation loss is the KL divergence, in value and in gradient."""

import pytest
import torch

from qtool.formats.target import Target, largest
from qtool.methods.distill.logits import LogitsOptions, logits

NONE = torch.empty(0, dtype=torch.int64)  # labels, which this loss does not look at


def test_the_value_is_that_of_the_definition() -> None:
    student = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]])
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (t / 2).softmax(0), (s / 2).softmax(0)
        expected += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True)) * 4 / 2  # T squared, two tokens
    assert float(logits(student, Target(teacher), NONE, LogitsOptions(temperature=2.0))) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_difference_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 5, 7, generator=generator, requires_grad=True),
        torch.randn(2, 5, 7, generator=generator),
    )
    T = 3.0
    logits(student, Target(teacher), NONE, LogitsOptions(temperature=T)).backward()
    expected = T * ((student.detach() / T).softmax(-1) - (teacher / T).softmax(-1)) / 10  # 10 tokens
    assert torch.allclose(student.grad, expected, atol=1e-6)  # type: ignore[arg-type]


def test_one_token_and_equal_models_cost_nothing() -> None:
    x = torch.randn(1, 1, 4)
    assert float(logits(x, Target(x), NONE, LogitsOptions())) == pytest.approx(0.0, abs=1e-7)


def by_hand(student: torch.Tensor, teacher: torch.Tensor, divergence: str, beta: float, T: float) -> float:
    """Mean over tokens of T² times the divergence, from probabilities."""
    total = 0.0
    for s, t in zip(student.double(), teacher.double(), strict=True):
        p, q = (t / T).softmax(0), (s / T).softmax(0)
        m = beta * p + (1 - beta) * q
        kl = {"forward": (p, q), "reverse": (q, p)}
        if divergence == "jsd":
            found = beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()
        else:
            a, b = kl[divergence]
            found = (a * (a / b).log()).sum()
        total += float(found) * T**2 / len(student)
    return total


@pytest.mark.parametrize(("divergence", "beta"), [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.5), ("jsd", 0.1)])
def test_each_divergence_is_that_of_its_definition(divergence: str, beta: float) -> None:
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(0))
    options = LogitsOptions.model_validate({"divergence": divergence, "beta": beta, "temperature": 1.5})
    found = float(logits(student, Target(teacher), NONE, options))
    assert found == pytest.approx(by_hand(student, teacher, divergence, beta, 1.5), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_the_likeliest_tokens_and_one_bucket_are_the_divergence_of_that_coarser_outcome(divergence: str) -> None:
    student, teacher = torch.randn(2, 4, 9, generator=torch.Generator().manual_seed(1))
    options = LogitsOptions.model_validate({"divergence": divergence, "top_k": 3})
    found = float(logits(student, largest(teacher, 3, 1.0), NONE, options))
    places = teacher.topk(3).indices
    p, q = teacher.softmax(-1), student.softmax(-1)
    coarse = [torch.cat([x.gather(1, places), 1 - x.gather(1, places).sum(1, keepdim=True)], 1).log() for x in (q, p)]
    assert found == pytest.approx(by_hand(coarse[0], coarse[1], divergence, 0.5, 1.0), rel=1e-4)
    assert found < float(logits(student, Target(teacher), NONE, options))  # a bucket hides what differs inside it


def test_as_many_tokens_as_there_are_leave_nothing_out() -> None:
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    assert largest(x, 5, 1.0).tokens is None and largest(x, 4, 1.0).tokens is not None
