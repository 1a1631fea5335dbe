"""LLM.int8(): the decomposition against plain products of codes, its limits, what outliers cost, options and bitsandbytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.layers.rounded_linear import soft_snap_inputs
from qtool.methods.quantize.llm_int8 import LlmInt8Options, llm_int8
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.checks import check_recipe
from qtool.recipe import parse

PLANTED = (3, 50, 51)  # channels with outliers


def layer(short: str) -> QuantLinear:
    scheme, random = Scheme.model_validate(short), torch.Generator().manual_seed(0)
    W, bias = torch.randn(24, 96, generator=random), torch.randn(24, generator=random)
    return QuantLinear(quantize(W, scheme.weights), bias, scheme.activations)


def tokens() -> Tensor:
    """[samples 2, tokens 20, in 96], within 6 but for a few channels a hundred times the others."""
    x = torch.randn(2, 20, 96, generator=torch.Generator().manual_seed(1)).clamp(-5.5, 5.5)
    x[..., list(PLANTED)] *= 100
    return x


def decomposed(x: Tensor, quantized: QuantLinear, threshold: float) -> Tensor:
    """Both products apart, the one of codes in int64: x [tokens, in] to [tokens, out], float64."""
    columns = [j for j in range(x.shape[1]) if float(x[:, j].abs().max()) >= threshold]
    rest = [j for j in range(x.shape[1]) if j not in columns]
    W = quantized.qt.dequantize().double()
    y = x[:, columns].double() @ W[:, columns].T + quantized.bias.double()  # type: ignore[union-attr]
    if rest:
        s_x = x[:, rest].abs().amax(1, keepdim=True) / 127  # [tokens, 1]
        codes = (x[:, rest] / s_x).round().long()
        assert int(codes.abs().max()) == 127
        sums = codes @ quantized.qt.codes[:, rest].long().T  # [tokens, out], exact
        y = y + sums.double() * s_x.double() * quantized.qt.scale.double().T
    return y


@pytest.mark.parametrize("threshold", [0.5, 6.0, 300.0, 1e6])
def test_a_layer_computes_both_products_of_the_decomposition(threshold: float) -> None:
    x = tokens()
    quantized = layer(f"w8-aint8t{threshold:.6f}")
    expected = decomposed(x.flatten(0, 1), quantized, threshold)
    torch.testing.assert_close(quantized(x).flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-3)


def test_without_outliers_it_is_plain_vectorwise_int8_and_at_zero_only_weights_are_rounded() -> None:
    x = tokens().flatten(0, 1)
    plain = (x / (x.abs().amax(1, keepdim=True) / 127)).round() * (x.abs().amax(1, keepdim=True) / 127)
    rounding = Scheme.model_validate("w8-aint8t1000000").activations
    assert rounding is not None
    torch.testing.assert_close(snap_inputs(x, rounding), plain)
    assert torch.equal(layer("w8-aint8t0")(x), layer("w8")(x))


def test_planted_outliers_cost_far_less_than_in_plain_int8() -> None:
    x, exact = tokens(), layer("w8")
    errors = {word: float((layer(word)(x) - exact(x)).square().mean()) for word in ("w8-aint8t6", "w8a8")}
    assert errors["w8-aint8t6"] < errors["w8a8"] / 1000


def test_outliers_are_those_of_the_call_and_the_order_of_its_tokens_does_not_count() -> None:
    x = tokens().flatten(0, 1)
    x[:, list(PLANTED)] /= 100
    x[7, 40] = 6.0
    quantized, order = layer("w8-aint8t6"), torch.randperm(40, generator=torch.Generator().manual_seed(2))
    rounding = quantized.activations
    assert rounding is not None
    found = snap_inputs(x, rounding)
    assert torch.equal(found[:, 40], x[:, 40]) and not torch.equal(found[:, 41], x[:, 41])
    assert torch.equal(snap_inputs(x[order], rounding), found[order])
    alone = snap_inputs(x[8], rounding)  # in a call of its own this token has no outlier
    assert alone[40] != x[8, 40]
    assert torch.equal(soft_snap_inputs(x, rounding), found)
    assert torch.equal(snap_inputs(torch.zeros(3, 96), rounding), torch.zeros(3, 96))


def test_weights_are_those_of_rounding_to_nearest() -> None:
    W, options = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), LlmInt8Options()
    found = llm_int8(W, None, options.scheme.weights, options, lambda text: None)
    assert str(options.scheme) == "w8-aint8t6" and found.codes.dtype == torch.int8
    scale = found.scale.float()  # [out, 1]
    assert torch.equal(found.codes.float(), (W / scale).round().clamp(-128, 127))
    # A hundredth finer than max |W| / 127, stored in eight bits of mantissa.
    assert bool((scale.abs() <= W.abs().amax(1, keepdim=True) / 127 * (1 + 2**-8)).all())


def test_other_schemes_are_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    for word in ("w8a8", "w4-aint8t6", "w8g32-aint8t6", "w8-aint4t6"):
        with pytest.raises(QtoolError, match=f"{word} is no scheme of LLM.int8"):
            parse(f"model: {folder}\npipeline:\n  - quantize/llm_int8: {{scheme: {word}}}\n", "r")
    text = "calibrate/text: {source: demo:calibration, samples: 2, length: 32}"
    for last, message in (
        ("quantize/inputs: {}", "w8-aint8t6: outliers of its inputs are found at run time"),
        ("export/compressed_tensors: {}", "w8-aint8t6: this export can say of inputs"),
        ("export/torchao: {}", "w8-aint8t6: activations have 8 bits"),
        ("export/gptq: {}", "w8-aint8t6: this export holds weights alone"),
    ):
        recipe = parse(f"model: {folder}\npipeline:\n  - {text}\n  - quantize/llm_int8: {{}}\n  - {last}\n", "r")
        with pytest.raises(QtoolError, match=message):
            check_recipe(recipe)


@pytest.mark.parametrize("name", ["bitsandbytes", "qtool"])
def test_an_export_brings_codes_and_threshold_back(
    name: str,
    export: Callable[..., Artifact],
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
    logits_of: Callable[[ModelHandle], Tensor],
    tmp_path: Path,
) -> None:
    model = quantized(tiny_model("llama"), "w8-aint8t2.5")
    assert export(name, model).lossless
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    assert {str(scheme.activations) for scheme in again.schemes().values()} == {"int8t2.5"}
    assert torch.equal(logits_of(again), logits_of(model))
    if name == "bitsandbytes":
        said: dict[str, Any] = again.quantization or {}
        assert (said["llm_int8_threshold"], said["qtool_inputs"]) == (2.5, "int8t2.5")
        again.quantization = {**said, "llm_int8_threshold": 6.0}
        with pytest.raises(QtoolError, match="qtool_inputs is int8t2.5, llm_int8_threshold 6.0; they must agree"):
            again.schemes()


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        ("w8a8", "w8a8: this export holds weights alone; quantize to w8, or by quantize/llm_int8"),
        ("w8-aint8t0", "bitsandbytes takes a threshold of 0 for none; quantize to w8a16"),
        ({"mlp.*": "w8-aint8t6", "self_attn.*": "w8a16"}, "but a model has one llm_int8_threshold; use one scheme"),
        ("nf4g64-aint8t6", "nf4g64-aint8t6: this export holds weights alone; quantize to nf4g64"),
    ],
)
def test_what_bitsandbytes_does_not_compute_is_refused(
    schemes: object,
    message: str,
    export: Callable[..., Artifact],
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
) -> None:
    with pytest.raises(QtoolError, match=message):
        export("bitsandbytes", quantized(tiny_model("llama"), schemes))
