"""Products of few bits on a GPU against float64, in every format and at every border of tokens and tiles."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.formats.tensor import QuantizedTensor
from qtool.kernels import weight_only

Weights = Callable[..., QuantizedTensor]
Inputs = Callable[..., Tensor]
Near = Callable[[Tensor, Tensor, float], None]
FORMATS = [f"w{bits}a16g{group}{ending}" for bits in (2, 3, 4, 8) for group in (32, 64, 128) for ending in ("", "-asym")]
FORMATS += ["w4a16", "w3a16-asymf16", "w8a16", "w2a16g256", "nf4g64", "fp4_bnbg64", "e2m1g128", "mxfp4", "nvfp4", "ternaryg64"]
TOKENS = [1, 2, 3, 5, 7, 8, 9, 12, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300]
BOUNDS = {torch.bfloat16: 2**-8, torch.float16: 2**-10}  # the result is rounded at half of it


def exact(x: Tensor, tensor: QuantizedTensor) -> Tensor:
    return x.double() @ tensor.dequantize().double().T


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("scheme", FORMATS)
def test_formats(scheme: str, dtype: torch.dtype, weights: Weights, inputs: Inputs, near: Near) -> None:
    tensor = weights(scheme, 1024, 1024)
    if dtype == torch.float16:  # whose range ends at 65504
        tensor = replace(tensor, scale=(tensor.scale.float() / 256).to(tensor.scale.dtype))
    packed = weight_only.pack(tensor)
    for tokens in (1, 16, 40, 300):
        x = inputs(tokens, 1024, dtype)
        near(weight_only.matmul(x, packed), exact(x, tensor), BOUNDS[dtype])


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scheme", ["w4a16g128-asym", "w2a16g64", "nvfp4"])
def test_numbers_of_tokens(scheme: str, tokens: int, weights: Weights, inputs: Inputs, near: Near) -> None:
    tensor = weights(scheme, 1024, 2048)
    x = inputs(tokens, 2048, torch.bfloat16)
    near(weight_only.matmul(x, weight_only.pack(tensor)), exact(x, tensor), BOUNDS[torch.bfloat16])


@pytest.mark.parametrize("shape", [(8, 128), (24, 136), (1000, 1032), (1024, 14336), (4096, 4096), (14336, 4096)])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w3a16-asym"])
def test_edge_shapes(scheme: str, shape: tuple[int, int], weights: Weights, inputs: Inputs, near: Near) -> None:
    tensor = weights(scheme, *shape)
    packed = weight_only.pack(tensor)
    for tokens in (1, 17):
        x = inputs(tokens, shape[1], torch.bfloat16)
        near(weight_only.matmul(x, packed), exact(x, tensor), BOUNDS[torch.bfloat16])


def test_whole_numbers_and_unit_scales_are_exact(weights: Weights, gpu: torch.device, seed: int) -> None:
    tensor = weights("w4a16g64", 256, 512)
    tensor = replace(tensor, scale=torch.ones_like(tensor.scale))
    x = torch.randint(-2, 3, (19, 512), generator=torch.Generator().manual_seed(seed)).to(gpu, torch.float16)
    y = weight_only.matmul(x, weight_only.pack(tensor))
    expected = exact(x, tensor)
    assert int(expected.abs().max()) <= 2048  # whole numbers that float16 holds
    assert torch.equal(y.double(), expected)


def test_more_tokens_leave_the_others_as_they_were_and_moved_outputs_move(weights: Weights, inputs: Inputs) -> None:
    tensor = weights("w4a16g128-asym", 512, 1024)
    packed = weight_only.pack(tensor)
    x = inputs(16, 1024, torch.bfloat16)
    y = weight_only.matmul(x, packed)
    assert torch.equal(weight_only.matmul(x, packed), y)
    order = torch.randperm(512, device=x.device)
    assert tensor.zero is not None
    moved = replace(tensor, codes=tensor.codes[order], scale=tensor.scale[order], zero=tensor.zero[order])
    assert torch.equal(weight_only.matmul(x, weight_only.pack(moved)), y[:, order])


def test_the_bias_is_added_and_odd_memory_is_served(weights: Weights, inputs: Inputs, near: Near) -> None:
    tensor = weights("w4a16g64", 320, 512)
    packed = weight_only.pack(tensor)
    bias = torch.randn(320, device=tensor.codes.device).to(torch.bfloat16)
    wide = inputs(9, 513, torch.bfloat16)
    x = wide[:, 1:]  # neither contiguous nor at a multiple of 16 bytes
    near(weight_only.matmul(x, packed, bias), exact(x, tensor) + bias.double(), BOUNDS[torch.bfloat16])
    assert weight_only.matmul(x[:0], packed).shape == (0, 320)


def test_weights_of_more_than_two_billion_bytes(weights: Weights, inputs: Inputs, near: Near) -> None:
    if torch.cuda.get_device_properties(0).total_memory < 60 << 30:
        pytest.skip("needs 60 GB of a GPU")
    tensor = weights("w8a16", 147456, 16384)
    packed = weight_only.pack(tensor)
    assert packed.codes.nbytes > 1 << 31
    last = tensor.rows(147456 - 64, 147456)
    x = inputs(3, 16384, torch.bfloat16)
    near(weight_only.matmul(x, packed)[:, -64:], exact(x, last), BOUNDS[torch.bfloat16])


def test_compiled_models_call_the_kernel(weights: Weights, inputs: Inputs) -> None:
    packed = weight_only.pack(weights("w4a16g128", 256, 512))
    x = inputs(4, 512, torch.bfloat16)
    compiled = torch.compile(lambda x: weight_only.matmul(x, packed) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), weight_only.matmul(x, packed) * 2)
