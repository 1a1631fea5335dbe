"""RoundedLinear: starts as rounding to nearest, learns by gradients taken by hand, and ends on the grid."""

import pytest
import torch

from qtool.formats.scheme import ActivationScheme, Scheme
from qtool.formats.tensor import quantize, to_groups
from qtool.layers.quant_linear import snap_inputs
from qtool.layers.rounded_linear import RoundedLinear, group_values, soft_snap_inputs

SCHEMES = ["w4a16g16", "w2a16g16-asym", "w3a16", "nf4g16", "mxfp4", "nvfp4"]


def weights() -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("short", SCHEMES)
def test_it_starts_as_rounding_to_nearest(short: str) -> None:
    scheme = Scheme.model_validate(short)
    layer, plain = RoundedLinear(weights(), None, scheme), quantize(weights(), scheme.weights)
    found = layer.quantized()
    assert torch.equal(found.codes, plain.codes) and torch.equal(found.scale, plain.scale)
    # The straight-through sum soft + (hard - soft) ends in the last digit of float32.
    assert torch.allclose(layer.weight_values(), plain.dequantize(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("short", SCHEMES)
def test_what_it_computes_with_is_what_it_comes_to(short: str) -> None:
    scheme, random = Scheme.model_validate(short), torch.Generator().manual_seed(1)
    V = torch.rand(to_groups(weights(), scheme.weights).shape, generator=random) - 0.5  # [out, groups, group]
    alpha, beta = (0.5 + 0.5 * torch.rand(V[..., :1].shape, generator=random) for _ in range(2))  # [out, groups, 1]
    layer = RoundedLinear(weights(), torch.ones(6), scheme, alpha, beta, V)
    x = torch.randn(4, 32, generator=random)
    # As above, summed over 32 products.
    assert torch.allclose(layer(x), x @ layer.quantized().dequantize().T + 1, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_v_is_the_scale_times_that_of_the_weight_inside_the_range() -> None:
    W = torch.tensor([[0.1, -0.4, 0.9, 0.2]])
    scheme = Scheme.model_validate({"weights": {"bits": 3, "scale_dtype": "float32"}})
    # The range is [-0.2, 0.45], the scale -0.45 / 4.5, as the largest value is positive: 0.9 is clipped to the level -4,
    # and -0.4 to 3.
    alpha, beta = (group_values(W, scheme, 0.5).requires_grad_() for _ in range(2))
    V = torch.zeros(1, 1, 4, requires_grad=True)
    W.requires_grad_()
    layer = RoundedLinear(W, None, scheme, alpha, beta, V)
    passed = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (layer.weight_values() * passed).sum().backward()
    scale = -0.45 / 4.5
    assert V.grad is not None and alpha.grad is not None and beta.grad is not None and W.grad is not None
    assert V.grad.flatten().tolist() == pytest.approx([1 * scale, 0.0, 0.0, 4 * scale])
    # d W^ / d scale = level - W / scale inside, level where clipped; d scale / d alpha = -max W / 4.5
    inside = [round(w / scale) - w / scale for w in (0.1, 0.2)]
    expected = (1 * inside[0] + 2 * 3 + 3 * -4 + 4 * inside[1]) * -0.9 / 4.5
    assert float(alpha.grad) == pytest.approx(expected, rel=1e-4)
    assert float(beta.grad) == 0.0  # the other end is the larger one
    # d W^ / d W = 1 inside, 0 where clipped; the largest weight also carries the scale, d scale / d max W = -0.5 / 4.5
    by_scale = expected / 0.9 * 0.5
    assert W.grad.flatten().tolist() == pytest.approx([1.0, 0.0, by_scale, 4.0], rel=1e-4)


def test_codes_differ_from_rounding_by_at_most_one_while_ranges_stay() -> None:
    scheme = Scheme.model_validate("w4a16g16-asym")
    V = torch.rand(6, 2, 16, generator=torch.Generator().manual_seed(1)) - 0.5  # [out, groups, group]
    layer = RoundedLinear(weights(), None, scheme, V=V)
    difference = layer.quantized().codes.int() - quantize(weights(), scheme.weights).codes.int()
    assert difference.abs().max() == 1


def test_an_all_zero_group_stays_zero_whatever_is_learned() -> None:
    W = weights()
    W[:, :16] = 0.0
    layer = RoundedLinear(W, None, Scheme.model_validate("w4a16g16-asym"), alpha=0.0, beta=0.0)
    assert layer.quantized().dequantize().isfinite().all()
    assert torch.equal(layer.quantized().dequantize()[:, :16], torch.zeros(6, 16))


def test_inputs_are_rounded_per_token_and_the_gradient_shrinks_the_largest() -> None:
    """x^ = scale level, scale = max |x| / 7.5; d x^ / d scale = level - x / scale, or the level where clipped."""
    scheme = ActivationScheme(bits=4)
    x = torch.tensor([[0.3, -3.0, 1.1], [0.02, 0.5, -0.9]], requires_grad=True)
    found, scale = soft_snap_inputs(x, scheme), torch.tensor([[3.0], [0.9]]) / 7.5
    assert torch.allclose(found, snap_inputs(x.detach(), scheme), atol=1e-6)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    level, ratio = found.detach() / scale, x.detach() / scale
    clipped = (ratio < -8) | (ratio > 7)
    by_scale = torch.where(clipped, level, level - ratio).sum(1)  # d sum / d scale of each token
    expected = (~clipped).float()
    expected[0, 1] -= by_scale[0] / 7.5  # max |x| is -x there
    expected[1, 2] -= by_scale[1] / 7.5
    assert torch.allclose(gradient, expected, atol=1e-5)
