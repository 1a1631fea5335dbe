"""QuantLinear is an integer kernel's arithmetic: products of codes in int64, scales and zero points in float64 afterwards.

    y[t, o] = sum over groups g of  s_x[t, g] s_w[o, g] (sum of q_x q_w - z_x sum of q_w - z_w sum of q_x + n z_x z_w)
What the simulation adds is rounding of float32: of each decoded factor once, of each product once, and of a sum of n products.
"""

import pytest
import torch
from torch import Tensor

from qtool.formats.inputs import fit_inputs, grouped_inputs
from qtool.formats.scheme import ActivationScheme, Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear

IN, OUT, TOKENS = 192, 20, 9
WEIGHTS = ("w8", "w4", "w2", "w8g64-asym", "w4g32", "w4g64-asym", "w2g32-asym", "w4-asym")
INPUTS = ("int8", "int6", "int4", "int2", "int8asym", "int6asym", "int4asym", "int8g32", "int4asymg64", "int4g16")


def by_integers(layer: QuantLinear, x: Tensor, scheme: ActivationScheme) -> tuple[Tensor, Tensor]:
    """y [tokens, out] of x [tokens, in] from codes alone, float64; and the sums of the products' magnitudes."""
    wide = grouped_inputs(x, scheme)  # [tokens, groups, group]
    params = fit_inputs(wide, scheme)
    q_x = scheme.grid.encode(wide, params).long().flatten(1)  # [tokens, in]
    q_w = layer.qt.codes.long()  # [out, in]
    size = min(scheme.group or IN, layer.scheme.group or IN)  # channels that share every scale

    def each(parameter: Tensor | None, group: int | None) -> Tensor:
        """A parameter [..., groups] spread over the pieces [..., in / size]."""
        whole = torch.zeros(1, 1) if parameter is None else parameter
        return whole.double().repeat_interleave((group or IN) // size, -1) if parameter is not None else whole.double()

    s_x = each(params.scale.squeeze(-1), scheme.group)
    z_x = each(None if params.zero is None else params.zero.squeeze(-1), scheme.group)
    s_w, z_w = each(layer.qt.scale.float(), layer.scheme.group), each(layer.qt.zero, layer.scheme.group)
    pieces_x, pieces_w = q_x.unflatten(1, (-1, size)), q_w.unflatten(1, (-1, size))  # [..., pieces, size]
    products = torch.einsum("tps,ops->top", pieces_x, pieces_w).double()  # [tokens, out, pieces], exact
    sums_x, sums_w = pieces_x.sum(-1).double()[:, None], pieces_w.sum(-1).double()[None]
    z_x, z_w = z_x[:, None], z_w[None]
    centred = products - z_x * sums_w - z_w * sums_x + size * z_x * z_w
    y = (centred * s_x[:, None] * s_w[None]).sum(-1) + layer.bias.double()  # type: ignore[union-attr]
    snapped = scheme.grid.decode(q_x.view(wide.shape).float(), params).flatten(1).double()  # [tokens, in]
    magnitudes = snapped.abs() @ layer.qt.dequantize().double().abs().T + layer.bias.double().abs()  # type: ignore[union-attr]
    return y, magnitudes


@pytest.mark.parametrize("word", INPUTS)
@pytest.mark.parametrize("short", WEIGHTS)
def test_the_simulation_is_integer_arithmetic_but_for_sums_in_float32(short: str, word: str) -> None:
    random = torch.Generator().manual_seed(1)
    full = Scheme.model_validate(f"{short}-a{word}")
    assert full.activations is not None
    W, bias = torch.randn(OUT, IN, generator=random), torch.randn(OUT, generator=random)
    layer = QuantLinear(quantize(W, full.weights), bias, full.activations)
    x = torch.randn(TOKENS, IN, generator=random) * torch.logspace(-2, 2, TOKENS).view(-1, 1) + 0.3
    expected, magnitudes = by_integers(layer, x, full.activations)
    # Two decoded factors and their product are rounded once each, by 2^-24; a sum of n terms in any order at most n - 1 times.
    room = (IN + 3) * 2.0**-24 * magnitudes
    assert bool(((layer(x).double() - expected).abs() <= room).all())
    # The bound is no licence: one code off by one in one place breaks it.
    moved = layer.qt.codes.clone()
    moved[0, 0] += 1 if int(moved[0, 0]) < layer.scheme.grid.high else -1
    layer.codes = moved
    assert bool(((layer(x).double() - expected).abs() > room)[:, 0].any())
