"""Acceleration: what is made fast and what is not is counted, in a loaded model and in one that is read block by block."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.kernels import weight_only
from qtool.layers import fast_linear, shared_product
from qtool.layers.fast_linear import FastLinear
from qtool.layers.quant_linear import QuantLinear
from qtool.model.acceleration import Acceleration, device_of_runtime, stored_bytes
from qtool.model.handle import ModelHandle

SCHEMES = {"q_proj": "w4a16g32", "k_proj": "nf4g64", "down_proj": "w8a16"}


@pytest.fixture
def mixed(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> ModelHandle:
    return quantized(tiny_model("llama", dtype="bfloat16", num_key_value_heads=4), SCHEMES)


def test_a_model_is_counted_and_computes_the_same(mixed: ModelHandle, windows: torch.Tensor) -> None:
    acceleration = Acceleration()
    handle = ModelHandle(mixed.options, mixed.changes, acceleration)
    hidden, expected = handle.final_hidden(windows).float(), mixed.final_hidden(windows).float()
    # Two blocks in bfloat16, whose products and everything after them are rounded at 2^-9 in another order.
    assert (hidden - expected).norm() <= 2**-6 * expected.norm()
    assert not torch.equal(hidden, expected)
    handle.final_hidden(windows.flip(0))  # the blocks once more, counted once
    names = {product: sorted(names) for product, names in acceleration.products.items()}
    assert names == {
        "torch int4": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"],
        "torch int8": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
    }
    assert acceleration.lines() == [
        "2 of 6 linears: torch int4",
        "2 of 6 linears: torch int8",
        "2 of 6 linears decode at each call, model.layers.0.self_attn.k_proj first: nf4g64: levels of nf4 are no 16 "
        "neighbouring whole numbers",
    ]


def test_every_quantized_linear_with_a_product_is_replaced(mixed: ModelHandle) -> None:
    model = ModelHandle(mixed.options, mixed.changes, Acceleration()).take()
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert kinds["q_proj"] is kinds["down_proj"] is FastLinear
    assert (kinds["k_proj"], kinds["v_proj"]) == (QuantLinear, nn.Linear)


def test_bytes_count_each_tensor_once_and_what_onednn_hides() -> None:
    scheme = Scheme.model_validate("w8a8" if torch.cpu._is_vnni_supported() else "w4a16g64")
    tensor = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), scheme.weights)
    tied = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    model = nn.ModuleDict({"fast": QuantLinear(tensor, None, scheme.activations), "one": tied, "two": tied})
    Acceleration().accelerate(model, "", torch.bfloat16)
    assert isinstance(model["fast"], FastLinear)
    per_weight = 1 if scheme.activations is not None else 0.5
    beside = stored_bytes(model) - 2 * 128 * 64 - int(per_weight * 128 * 64)
    assert 0 < beside <= 64 * 20  # scales, sums and the like of 64 outputs


def test_linears_with_one_input_share_a_launch_and_are_all_counted(
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
    windows: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU, by the kernels' references: keys in another scheme than queries and values stand alone."""
    monkeypatch.setattr(fast_linear, "_reason_without_kernel", lambda *_: None)
    launched: list[int] = []
    own = weight_only.matmul
    monkeypatch.setattr(
        shared_product, "matmul", lambda x, packed, bias: launched.append(packed.shape[0]) or own(x, packed, bias)
    )
    schemes = {"k_proj": "w4a16g64", "*_proj": "w4a16g32"}
    model = quantized(tiny_model("llama", dtype="bfloat16", num_key_value_heads=2), schemes)
    acceleration = Acceleration()
    handle = ModelHandle(model.options, model.changes, acceleration)
    hidden, expected = handle.final_hidden(windows).float(), model.final_hidden(windows).float()
    assert (hidden - expected).norm() <= 2**-6 * expected.norm()  # as above
    assert set(launched) == {64 + 32, 2 * 128} and acceleration.n_products == 14 and acceleration.decoded == {}
    assert ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj") in acceleration.shared
    assert "8 of 14 linears share 4 launches with those that read the same input" in acceleration.lines()


def test_where_nothing_can_be_made_fast_it_is_an_error() -> None:
    acceleration = Acceleration()
    with pytest.raises(QtoolError, match=r"M on cpu: no linear has a fast product \(it has no quantized linear\)"):
        acceleration.require("M on cpu")
    acceleration.decoded["nf4g64: no levels"] = ["a"]
    with pytest.raises(QtoolError, match=r"no linear has a fast product \(nf4g64: no levels\); use the runtime reference"):
        acceleration.require("M on cpu")


def test_a_runtime_has_its_device() -> None:
    assert device_of_runtime("cpu", "auto") == "cpu"
    with pytest.raises(QtoolError, match="--runtime cpu with --device cuda:1: the runtime cpu runs on cpu"):
        device_of_runtime("cpu", "cuda:1")
    if not torch.cuda.is_available():
        with pytest.raises(QtoolError, match="--runtime cuda: torch sees no CUDA GPU; use --runtime cpu"):
            device_of_runtime("cuda", "auto")
