"""A linear that rotates its input computes what it did, and everything else meets the rotated input."""

import copy

import torch
from torch import Tensor, nn

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import carry_rotation, rotate_back, rotate_input, rotate_rows, signs_of
from qtool.linalg.hadamard import random_signs


def rotated_linear(n: int) -> tuple[nn.Linear, nn.Linear, Tensor]:
    """A linear, one that rotates its input and computes the same, and the signs [in]."""
    torch.manual_seed(0)
    plain = nn.Linear(n, 5, dtype=torch.float64)
    turned, signs = copy.deepcopy(plain), random_signs(n, torch.Generator().manual_seed(1))
    turned.weight = nn.Parameter(rotate_rows(plain.weight.detach(), signs))
    rotate_input(turned, signs)
    return plain, turned, signs


def test_weights_and_inputs_rotated_alike_give_what_was_before() -> None:
    for n in (16, 12, 6):  # six has no Hadamard matrix: three blocks of two
        plain, turned, signs = rotated_linear(n)
        x = torch.randn(2, 3, n, dtype=torch.float64)
        assert torch.allclose(turned(x), plain(x)) and not torch.allclose(turned.weight, plain.weight)
        assert torch.allclose(rotate_back(turned.weight.detach(), signs), plain.weight)


def test_observers_meet_the_rotated_input() -> None:
    _, turned, signs = rotated_linear(16)
    seen: list[Tensor] = []
    turned.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.zeros(1, 16, dtype=torch.float64)
    x[0, 3] = 4.0
    turned(x)
    assert torch.allclose(seen[0].abs(), torch.ones(1, 16, dtype=torch.float64))  # one outlier of 4, in 16 channels


def test_a_layer_that_takes_its_place_rotates_too_and_copies_keep_the_rotation() -> None:
    _, turned, signs = rotated_linear(16)
    x = torch.randn(3, 16, dtype=torch.float64)
    layer = QuantLinear(quantize(turned.weight.detach().float(), Scheme.model_validate("w8a16").weights), turned.bias)
    before = layer(rotate_rows(x, signs))
    carry_rotation(turned, layer)
    carry_rotation(turned, layer)  # once is enough
    assert torch.equal(layer(x), before) and torch.equal(copy.deepcopy(layer)(x), before)
    found = signs_of(layer)
    assert found is not None and torch.equal(found, signs.to(torch.int8))
    assert "rotation_signs" not in layer.state_dict()  # written by its own name, see model/own_layout.py
    carry_rotation(nn.Linear(16, 5), other := nn.Linear(16, 5))
    assert signs_of(other) is None
