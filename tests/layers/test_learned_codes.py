"""Learned codes: at first the layer itself, gradients by the straight-through rule, a code changes half a step away."""

import pytest
import torch

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.learned_codes import LearnedCodes
from qtool.layers.quant_linear import QuantLinear

X = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))  # [tokens, in]


def layer_of(word: str) -> QuantLinear:
    scheme = Scheme.model_validate(word)
    W = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))  # [out, in]
    return QuantLinear(quantize(W, scheme.weights), torch.ones(8), scheme.activations)


@pytest.mark.parametrize(
    "word", ["w2a16g32", "w3a16g32-asym", "w4a16-asymf16", "w4a8g32", "nf4g32", "nvfp4", "mxfp4", "power4g32"]
)
def test_at_first_it_computes_what_the_layer_did_and_becomes_it_again(word: str) -> None:
    layer = layer_of(word)
    learned = LearnedCodes(layer)
    assert torch.equal(learned(X), layer(X))
    back = learned.quantized()
    for name, part in layer.qt.parts().items():
        assert torch.equal(back.qt.parts()[name].float(), part.float()), name
    assert torch.equal(back(X), layer(X))


def test_gradients_pass_straight_through() -> None:
    """dL/dplace = scale · dL/dW^, worked by hand for the sum of the outputs."""
    learned = LearnedCodes(layer_of("w3a16g32-asym"))
    learned(X).sum().backward()
    assert learned.places.grad is not None
    dW = X.sum(0).expand(8, 64).view(8, 2, 32)  # [out, groups, group]
    torch.testing.assert_close(learned.places.grad, dW * learned.scale.detach().float().unsqueeze(-1))


@pytest.mark.parametrize(("step", "changes"), [(0.49, 0), (0.51, 1), (1.6, 2), (9.0, 3)])
def test_a_code_changes_once_its_place_has_moved_half_a_step(step: float, changes: int) -> None:
    layer = layer_of("w3a16g32-asym")
    learned = LearnedCodes(layer)
    place = (layer.qt.codes == 4).nonzero()[0]
    with torch.no_grad():
        learned.places[place[0], place[1] // 32, place[1] % 32] += step
    difference = learned.quantized().qt.codes.int() - layer.qt.codes.int()
    assert difference[place[0], place[1]] == changes  # of codes up to 7
    assert difference.abs().sum() == changes
