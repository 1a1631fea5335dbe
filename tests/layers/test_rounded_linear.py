"""RoundedLinear: starts as rounding to nearest, learns by gradients taken by hand, and ends on the grid."""

import pytest
import torch

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.rounded_linear import RoundedLinear

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
    layer = RoundedLinear(weights(), torch.ones(6), Scheme.model_validate(short))
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.V.copy_(torch.rand(layer.V.shape, generator=random) - 0.5)
        layer.alpha.copy_(0.5 + 0.5 * torch.rand(layer.alpha.shape, generator=random))
        layer.beta.copy_(0.5 + 0.5 * torch.rand(layer.beta.shape, generator=random))
    x = torch.randn(4, 32, generator=random)
    # As above, summed over 32 products.
    assert torch.allclose(layer(x), x @ layer.quantized().dequantize().T + 1, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_v_is_the_scale_times_that_of_the_weight_inside_the_range() -> None:
    W = torch.tensor([[0.1, -0.4, 0.9, 0.2]])
    layer = RoundedLinear(W, None, Scheme.model_validate({"weights": {"bits": 3, "scale_dtype": "float32"}}))
    with torch.no_grad():
        layer.alpha.fill_(0.5)
        layer.beta.fill_(0.5)  # the range is [-0.2, 0.45], the scale 0.45 / 3.5: 0.9 and the level 3 beyond it are clipped
    passed = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    (layer.weight_values() * passed).sum().backward()
    scale = 0.45 / 3.5
    assert layer.V.grad is not None and layer.alpha.grad is not None and layer.beta.grad is not None
    assert layer.V.grad.flatten().tolist() == pytest.approx([1 * scale, 2 * scale, 0.0, 4 * scale])
    # d W^ / d scale = level - W / scale inside, level where clipped; d scale / d alpha = max W / 3.5
    inside = [round(w / scale) - w / scale for w in (0.1, -0.4, 0.2)]
    expected = (1 * inside[0] + 2 * inside[1] + 3 * 3 + 4 * inside[2]) * 0.9 / 3.5
    assert float(layer.alpha.grad) == pytest.approx(expected, rel=1e-4)
    assert float(layer.beta.grad) == 0.0  # the other end is the larger one


def test_codes_differ_from_rounding_by_at_most_one_while_ranges_stay() -> None:
    scheme = Scheme.model_validate("w4a16g16-asym")
    layer = RoundedLinear(weights(), None, scheme)
    with torch.no_grad():
        layer.V.copy_(10 * torch.randn(layer.V.shape, generator=torch.Generator().manual_seed(1)))
    layer.clamp()
    difference = layer.quantized().codes.int() - quantize(weights(), scheme.weights).codes.int()
    assert difference.abs().max() == 1


def test_an_all_zero_group_stays_zero_whatever_is_learned() -> None:
    W = weights()
    W[:, :16] = 0.0
    layer = RoundedLinear(W, None, Scheme.model_validate("w4a16g16-asym"))
    with torch.no_grad():
        layer.alpha.zero_()
        layer.beta.zero_()
    assert layer.quantized().dequantize().isfinite().all()
    assert torch.equal(layer.quantized().dequantize()[:, :16], torch.zeros(6, 16))
