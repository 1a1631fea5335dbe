"""Quantized layers and a whole model on a GPU's kernels."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.kernels import weight_only
from qtool.layers.fast_linear import FastLinear, fast, fast_together
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.model.acceleration import Acceleration
from qtool.model.handle import ModelHandle

NAMES = {
    "w4a16g64": "qtool CUDA",
    "nf4g64": "qtool CUDA",
    "w4a8g128": "qtool CUDA",
    "w8a8": "qtool CUDA int8",
    "w8-aint8asym": "qtool CUDA int8",
    "e4m3-ae4m3": "torch FP8",
}


@pytest.mark.parametrize("scheme", NAMES)
def test_a_layer_has_its_product_and_is_right(
    scheme: str, weights: Callable[..., object], inputs: Callable[..., Tensor], near: Callable[..., None]
) -> None:
    if scheme.startswith("e4m3") and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no FP8 arithmetic")
    tensor = weights(scheme, 512, 1024)
    layer = QuantLinear(tensor, None, Scheme.model_validate(scheme).activations)  # type: ignore[arg-type]
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear) and made.product.name == NAMES[scheme]
    for tokens in (1, 40):
        x = inputs(tokens, 1024, torch.bfloat16)
        rounded = x.float() if layer.activations is None else snap_inputs(x.float(), layer.activations)
        # A product of weights alone takes rounded inputs in bfloat16.
        near(made(x), rounded.double() @ layer.qt.dequantize().double().T, 2**-7)


def test_a_model_writes_as_the_reference(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), {"q_proj": "w4a16g32", "down_proj": "nf4g64", "*_proj": "w8a8"})
    options = model.options.model_copy(update={"device": "cuda"})
    acceleration = Acceleration()
    found = ModelHandle(options, model.changes, acceleration).take()
    expected = ModelHandle(options, model.changes).take()
    assert acceleration.decoded == {} and acceleration.n_products == 14
    assert acceleration.shared == set(), "q has a scheme of its own, k, v, gate and up have int8"
    tokens = torch.randint(2, 4096, (2, 12), device="cuda")
    with torch.no_grad():
        logits, exact = found(tokens).logits.float(), expected(tokens).logits.float()
    assert (logits - exact).norm() <= 2**-6 * exact.norm()  # two blocks in bfloat16, rounded at 2^-9 in another order
    assert found.generate(tokens, max_new_tokens=4, do_sample=False).shape == (2, 16)


@pytest.mark.parametrize("tokens", [1, 9, 64, 300])
def test_linears_that_read_one_input_share_a_launch(
    tokens: int,
    weights: Callable[..., QuantizedTensor],
    inputs: Callable[..., Tensor],
    near: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    random = torch.Generator("cuda").manual_seed(0)
    biases = torch.randn(1536, device="cuda", generator=random).to(torch.bfloat16).split([1000, 512, 24])
    layers = [QuantLinear(weights("w4a16g128-asym", len(bias), 1024), bias) for bias in biases]
    parts = fast_together(layers, torch.bfloat16)
    assert not isinstance(parts, str), parts
    started: list[str] = []
    run = weight_only.run
    monkeypatch.setattr(weight_only, "run", lambda launch, device: started.append(launch.file) or run(launch, device))
    x = inputs(tokens, 1024, torch.bfloat16)
    found = [part(x) for part in parts]
    assert len(started) == 1
    for y, layer, bias in zip(found, layers, biases, strict=True):
        near(y, x.double() @ layer.qt.dequantize().double().T + bias.double(), 2**-8)
