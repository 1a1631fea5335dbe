"""Points start at quantiles, take the nearest weights, and have the paper's gradients."""

import pytest
import torch

from qtool.methods.distill.differentiable_quantization import DifferentiableQuantizationOptions, Points


def made(W: torch.Tensor, bits: int = 2, bucket: int = 16) -> Points:
    return Points(W, DifferentiableQuantizationOptions(bits=bits, bucket=bucket))


def test_every_weight_takes_its_nearest_point_in_its_buckets_range() -> None:
    W = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))  # 36 weights: buckets of 16, 16 and 4
    form = made(W)
    flat, found = W.flatten(), form().detach().flatten()
    for start, stop in ((0, 16), (16, 32), (32, 36)):
        part = flat[start:stop]
        low, a = part.min(), part.max() - part.min()
        levels = form.p.detach() * a + low
        nearest = levels[(part[:, None] - levels).abs().argmin(1)]
        assert torch.allclose(found[start:stop], nearest, atol=1e-6)


def test_points_start_where_each_takes_as_many_weights() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    form = made(W, bits=3, bucket=256)
    counts = form.indices()[1].flatten().bincount(minlength=8)
    assert counts.sum() == 4096 and counts.min() > 300 and counts.max() < 800  # 512 each, but for the ends' wider reach
    assert 2.8 < form.entropy() <= 3


def test_the_gradient_of_a_point_sums_its_weights_by_their_buckets_scales() -> None:
    random = torch.Generator().manual_seed(1)
    W, G = torch.randn(2, 4, 8, generator=random)
    form = made(W)
    (form() * G).sum().backward()
    _, places = form.indices()
    a = W.flatten().view(2, 16).amax(1) - W.flatten().view(2, 16).amin(1)
    by_hand = torch.zeros(4)
    for bucket in range(2):
        for i in range(16):
            by_hand[places[bucket, i]] += a[bucket] * G.flatten()[bucket * 16 + i]
    assert torch.allclose(form.p.grad, by_hand, atol=1e-5)
    assert [name for name, _ in form.named_parameters()] == ["p"]


def test_a_bucket_of_equal_weights_keeps_them() -> None:
    W = torch.full((2, 8), 3.0)
    assert torch.allclose(made(W)(), W)
    assert made(W).entropy() == pytest.approx(0)
