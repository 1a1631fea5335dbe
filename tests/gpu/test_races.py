"""The same bits however often, beside other work, on two streams at once, and replayed from a CUDA graph."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.formats.tensor import QuantizedTensor
from qtool.kernels import int8, weight_only

Weights = Callable[..., QuantizedTensor]
Inputs = Callable[..., Tensor]
REPEATS = 200
SCHEMES = ["w4a16g128-asym", "w2a16g64", "w3a16g128", "w8a16", "nf4g64", "nvfp4"]


def product_of(scheme: str, tokens: int, weights: Weights, inputs: Inputs) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    packed = weight_only.pack(weights(scheme, 1024, 4096))
    return lambda x: weight_only.matmul(x, packed), inputs(tokens, 4096, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 16, 64, 256])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_repeated_beside_a_stream_that_fills_the_memory(scheme: str, tokens: int, weights: Weights, inputs: Inputs) -> None:
    call, x = product_of(scheme, tokens, weights, inputs)
    expected = call(x)
    torch.cuda.synchronize()
    hog, stream = torch.empty(128 << 20, device=x.device), torch.cuda.Stream()
    different = torch.zeros((), dtype=torch.int64, device=x.device)
    for repeat in range(REPEATS):
        if repeat % 4 == 0:
            with torch.cuda.stream(stream):
                hog.add_(1)
        different += (call(x) != expected).sum()
    torch.cuda.synchronize()
    assert int(different) == 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_two_streams_at_once(scheme: str, weights: Weights, inputs: Inputs) -> None:
    call, x = product_of(scheme, 8, weights, inputs)
    other = x.flip(0).contiguous()
    expected, of_other = call(x), call(other)
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    found: list[list[Tensor]] = [[], []]
    for _ in range(REPEATS):
        for which, (stream, value) in enumerate(zip(streams, (x, other), strict=True)):
            with torch.cuda.stream(stream):
                found[which].append(call(value))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in found[0]) and all(torch.equal(y, of_other) for y in found[1])


@pytest.mark.parametrize("tokens", [1, 64, 300])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_computes_of_new_inputs_what_a_call_does(scheme: str, tokens: int, weights: Weights, inputs: Inputs) -> None:
    call, x = product_of(scheme, tokens, weights, inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call(x)
    for _ in range(20):
        x.copy_(torch.randn_like(x))
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, call(x))


def test_int8_repeated(seed: int, gpu: torch.device) -> None:
    random = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-128, 128, (n, 4096), generator=random, dtype=torch.int8).to(gpu) for n in (70, 1024))
    scales = torch.rand(70, device=gpu), torch.rand(1024, device=gpu)
    expected = int8.matmul_int8(x, w, *scales)
    assert all(torch.equal(int8.matmul_int8(x, w, *scales), expected) for _ in range(REPEATS))
