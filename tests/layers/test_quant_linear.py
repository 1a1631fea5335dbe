"""QuantLinear: the output of its decoded weights, gradients that reach its scale, activations rounded per token."""

import copy

import pytest
import torch
import torch.nn.functional as F

from qtool.errors import QtoolError
from qtool.formats.integer import Params
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import ACTIVATION_PRESETS, ActivationScheme, Scheme, WeightScheme, input_fields
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear, snap_inputs

SCHEMES = ["w4a16g32", "w3a16g32-asym", "w4a16g32-asymf16", "w8a16"]


def layer(short: str, activations: ActivationScheme | None = None, dtype: torch.dtype = torch.float32) -> QuantLinear:
    random = torch.Generator().manual_seed(0)
    tensor = quantize(torch.randn(6, 96, generator=random), Scheme.model_validate(short).weights)
    return QuantLinear(tensor, torch.randn(6, generator=random).to(dtype), activations)


def inputs() -> torch.Tensor:
    return torch.randn(2, 5, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("short", SCHEMES)
def test_the_output_is_that_of_a_dense_linear_with_the_decoded_weights(short: str) -> None:
    quantized = layer(short)
    assert torch.equal(quantized(inputs()), F.linear(inputs(), quantized.qt.dequantize(), quantized.bias))


def test_it_works_in_the_dtype_of_its_input() -> None:
    quantized = layer("w4a16g32", dtype=torch.bfloat16)
    y = quantized(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    expected = F.linear(inputs(), quantized.qt.dequantize(), quantized.bias.float())
    # Inputs, weights, sum and bias are rounded to 8 bits each; terms add up like noise.
    assert float((y.float() - expected).norm() / expected.norm()) < 2 * 2**-8


@pytest.mark.parametrize("short", SCHEMES)
def test_the_tensor_it_was_made_of_comes_back(short: str) -> None:
    quantized = layer(short)
    tensor = quantized.qt
    assert tensor.shape == (quantized.out_features, quantized.in_features) == (6, 96)
    assert torch.equal(QuantLinear(tensor, None).qt.dequantize(), tensor.dequantize())


def test_a_layer_without_bias_adds_none() -> None:
    bare = QuantLinear(layer("w8a16").qt, None)
    assert bare.bias is None and torch.equal(bare(torch.zeros(1, 96)), torch.zeros(1, 6))


def test_gradients_reach_the_scale_and_the_input() -> None:
    quantized = layer("w4a16g32-asym")
    quantized.scale = torch.nn.Parameter(quantized.scale.float())
    x = inputs().requires_grad_()
    quantized(x).square().sum().backward()
    assert x.grad is not None and bool((x.grad != 0).any())
    step = 1e-3
    gradient = quantized.scale.grad
    assert gradient is not None
    moved = []
    for sign in (1, -1):
        other = copy.deepcopy(quantized)
        other.scale.data[2, 1] += sign * step
        moved.append(float(other(inputs()).detach().square().sum()))
    # Central differences of a quadratic are exact but for float32 sums.
    assert float(gradient[2, 1]) == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=2e-2)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_are_rounded_token_by_token(symmetric: bool) -> None:
    scheme = ActivationScheme(bits=4, symmetric=symmetric)
    x = inputs() * torch.tensor([1e-3, 1.0, 50.0, 7.0, 0.2]).view(1, 5, 1)
    snapped = snap_inputs(x, scheme)
    for sample in range(2):
        for token in range(5):
            alone = x[sample, token]
            assert torch.equal(snapped[sample, token], snap_inputs(alone, scheme))
            assert len(snapped[sample, token].unique()) <= 16
            span = float(alone.max().clamp(min=0) - alone.min().clamp(max=0))
            step = float(alone.abs().max()) / 7.5 if symmetric else span / 15
            # Half a step; rounding an asymmetric zero point may cost half a step more at one end.
            assert float((snapped[sample, token] - alone).abs().max()) <= step * (0.501 if symmetric else 1.001)


def test_nvfp4_inputs_are_rounded_as_a_tensor_of_their_own_would_be() -> None:
    """Each token has the float32 scale, and its groups the scales of eight bits, that weights [1, in] of its values have."""
    scheme = ActivationScheme.model_validate(ACTIVATION_PRESETS["nvfp4"])
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-30, 1, 50, 7, 1e30, 0]).view(6, 1)
    x[1, 16:32] = 0
    weights = WeightScheme.model_validate({"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"})
    expected = torch.cat([quantize(token.view(1, -1), weights).dequantize() for token in x])
    assert torch.equal(snap_inputs(x, scheme), expected)
    assert torch.equal(snap_inputs(x.view(2, 3, 64), scheme), expected.view(2, 3, 64))


@pytest.mark.parametrize("word", sorted({*ACTIVATION_PRESETS, "int8asym", "int4g32", "int4asymg16", "int2asym", "e4m3g32"}))
def test_permuting_tokens_permutes_the_rounded_ones(word: str) -> None:
    fields, random = input_fields(f"a{word}"), torch.Generator().manual_seed(0)
    scheme = ActivationScheme.model_validate(fields)
    x = torch.randn(10, 64, generator=random) * torch.logspace(-3, 3, 10).view(10, 1)
    order = torch.randperm(10, generator=random)
    assert torch.equal(snap_inputs(x[order], scheme), snap_inputs(x, scheme)[order])


@pytest.mark.parametrize("word", ["int2", "int3", "int5", "int7", "int2asym", "int4asym", "int8asym", "e4m3", "e5m2"])
def test_every_level_of_an_input_format_is_one_of_its_grid(word: str) -> None:
    """A token of all levels: its params encode each to a code of its own; the range's own params are off by half a step."""
    scheme = ActivationScheme.model_validate(input_fields(f"a{word}"))
    grid = scheme.grid
    codes = torch.arange(grid.low, grid.high + 1).float()  # [codes]
    params = Params(torch.tensor([0.25]), None if scheme.symmetric else torch.tensor([float(grid.n_levels // 3)]))
    x = grid.decode(codes, params)
    assert torch.equal(grid.snap(x, params), x) and len(x.unique()) == len(grid.levels(codes).unique())
    room = float(grid.fit(x).scale) * 0.5001 if scheme.format == "int" else 0
    assert float((snap_inputs(x, scheme) - x).abs().max()) <= room


def test_sixteen_bit_inputs_take_the_plain_path() -> None:
    plain = layer("w4a16g32")
    assert plain.activations is None
    assert torch.equal(plain(inputs()), torch.nn.functional.linear(inputs(), plain.qt.dequantize(), plain.bias))


@pytest.mark.parametrize("word", [w for w in ACTIVATION_PRESETS if w == "mxint8" or not w.startswith(("int", "nv"))])
def test_float_and_block_activations_are_those_of_weights_in_the_same_format(word: str) -> None:
    """A matrix of tokens [tokens, in] is rounded as one of weights [out, in] is, with scales that nothing rounds."""
    scheme = ActivationScheme.model_validate(ACTIVATION_PRESETS[word])
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 50, 7, 0.2, 0]).view(6, 1)
    fields = {"format": scheme.format, "bits": scheme.bits, "group": scheme.group, "scale_dtype": scheme.scale_dtype}
    expected = quantize(x, WeightScheme.model_validate(fields)).dequantize()
    assert torch.equal(snap_inputs(x, scheme), expected)
    assert torch.equal(snap_inputs(x[[3, 1]], scheme), expected[[3, 1]])  # whatever other tokens there are


def test_products_of_whole_numbers_are_exact() -> None:
    """w8a8 as an integer kernel computes it: codes multiplied in int64, scaled once at the end."""
    rounded, x = layer("w8a8", ActivationScheme(bits=8)), inputs().double()
    grid = ActivationScheme(bits=8).grid
    params = grid.fit(inputs().flatten(0, 1).unsqueeze(1))
    codes = grid.encode(inputs().flatten(0, 1).unsqueeze(1), params).squeeze(1).long()  # [tokens, in]
    W = rounded.qt  # codes [out, in], scale [out, 1]
    sums = codes @ W.codes.long().T  # [tokens, out], exact
    expected = sums.double() * params.scale.squeeze(1).double() * W.scale.double().T
    found = rounded.double()(x).flatten(0, 1) - (0 if rounded.bias is None else rounded.bias.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("word", ["int8", "int4asym", "e4m3", "nvfp4", "int8t1"])
def test_gradients_pass_the_rounding_of_inputs_as_if_there_were_none(word: str) -> None:
    """Training a model with rounded inputs: the values are the rounded ones, to the bit."""
    scheme = ActivationScheme.model_validate(input_fields(f"a{word}"))
    x, plain = inputs().requires_grad_(True), inputs().requires_grad_(True)
    rounded, exact = layer("w8a16", scheme), layer("w8a16")
    assert torch.equal(rounded(x), rounded(inputs()))
    rounded(x).sum().backward()
    exact(plain).sum().backward()
    assert x.grad is not None and plain.grad is not None and torch.equal(x.grad, plain.grad)


def test_a_layer_with_an_activation_scheme_rounds_its_input_first() -> None:
    scheme = ActivationScheme(bits=8)
    rounded, plain = layer("w8a8", scheme), layer("w8a8")
    assert torch.equal(rounded(inputs()), plain(snap_inputs(inputs(), scheme)))
    assert not torch.equal(rounded(inputs()), plain(inputs()))


def test_float_zero_points_that_training_widened_come_back_as_they_were() -> None:
    source = layer("w4a16g32-asymf16")
    widened = copy.deepcopy(source).float()
    assert widened.zero is not None and widened.zero.dtype == torch.float32
    assert widened.qt.zero is not None and widened.qt.zero.dtype == torch.float16
    assert source.qt.zero is not None and torch.equal(widened.qt.zero, source.qt.zero)
    assert torch.equal(widened(inputs()), source(inputs()))


def test_a_state_dict_carries_codes_scales_and_zero_points() -> None:
    source, target = layer("w4a16g32-asym"), layer("w4a16g32-asym")
    target.codes.zero_()
    target.scale.data.zero_()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs()), source(inputs()))


def compensated(dtype: str, activations: ActivationScheme | None = None) -> QuantLinear:
    """The layer with a low-rank part of rank 2, of the size of quantization's error."""
    random = torch.Generator().manual_seed(2)
    low_rank = LowRank(0.3 * torch.randn(6, 2, generator=random), 0.3 * torch.randn(2, 96, generator=random))
    bare = layer("w4a16g32", activations)
    return QuantLinear(bare.qt, bare.bias, activations, low_rank.stored_in(dtype))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_a_low_rank_part_adds_its_product_to_the_decoded_weights(dtype: str) -> None:
    quantized = compensated(dtype)
    assert quantized.low_rank is not None
    W = quantized.qt.dequantize() + quantized.low_rank.multiply()
    assert torch.equal(quantized.weight_values(torch.float32), W)
    # Sums in another order.
    torch.testing.assert_close(quantized(inputs()), F.linear(inputs(), W, quantized.bias), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(quantized(inputs()), layer("w4a16g32")(inputs()), atol=0.1)


def test_a_low_rank_part_sees_the_rounded_input_that_the_codes_see() -> None:
    scheme = ActivationScheme(bits=4)
    assert torch.equal(compensated("bfloat16", scheme)(inputs()), compensated("bfloat16")(snap_inputs(inputs(), scheme)))


def test_a_low_rank_part_works_in_the_dtype_of_its_input() -> None:
    quantized = compensated("int8")
    y = quantized.bfloat16()(inputs().bfloat16())
    assert y.dtype == torch.bfloat16
    expected = compensated("int8")(inputs())
    assert float((y.float() - expected).norm() / expected.norm()) < 3 * 2**-8  # two products more than without


def test_a_state_dict_carries_the_low_rank_part() -> None:
    source, target = compensated("int8"), compensated("int8")
    assert target.left is not None
    target.left.zero_()
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(inputs()), source(inputs()))


@pytest.mark.parametrize("word", ["w8a8", "w4-aint4g32", "mxfp4-amxfp4", "nvfp4-anvfp4"])
def test_inputs_of_no_token_give_no_output(word: str) -> None:
    """An expert that no token chose is called all the same."""
    scheme = Scheme.model_validate(word)
    W = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    layer = QuantLinear(quantize(W, scheme.weights), None, scheme.activations)
    assert layer(torch.zeros(0, 64)).shape == (0, 6)


def test_inputs_that_do_not_divide_into_groups_are_refused() -> None:
    with pytest.raises(QtoolError, match="64 inputs do not divide into the groups of 48 that int4g48 has"):
        snap_inputs(torch.zeros(2, 64), ActivationScheme(bits=4, group=48))
