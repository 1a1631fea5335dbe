"""Learned codes: at first the layer itself, gradients by the straight-through rule, a code changes half a step away."""

from dataclasses import replace

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


@pytest.mark.parametrize(("word", "rate"), [("w2a16g32-asym", 0.05), ("w3a16g32", 0.05), ("nf4g32", 0.005)])
def test_codes_that_were_moved_come_back(word: str, rate: float) -> None:
    """The layer that gives the outputs is known: gradient descent on them finds each of its codes again."""
    layer, random = layer_of(word), torch.Generator().manual_seed(2)
    grid, codes = layer.scheme.grid, layer.qt.codes
    is_moved = torch.rand(codes.shape, generator=random) < 0.1
    up = (codes.int() + 1).clamp(max=grid.low + grid.n_levels - 1).to(codes.dtype)
    moved = QuantLinear(replace(layer.qt, codes=torch.where(is_moved, up, codes)), layer.bias)
    learned = LearnedCodes(moved)
    inputs = torch.randn(512, 64, generator=random)  # [tokens, in]
    optimizer = torch.optim.AdamW([learned.places], lr=rate, weight_decay=0.0)
    assert not torch.equal(learned.quantized().qt.codes, codes)
    for _ in range(100):
        loss = (learned(inputs) - layer(inputs)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(learned.quantized().qt.codes, codes)
