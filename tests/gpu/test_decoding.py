"""A decode step in a CUDA graph writes what calls of the model write; where there can be none, the reason says so."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qtool.bench.decoding import CALLS, GRAPH, FixedCache, fixed_cache, make_decoding
from qtool.model.acceleration import Acceleration
from qtool.model.handle import ModelHandle
from tests.bench.test_decoding import written

PROMPT, NEW = 12, 24  # past the sliding window of 16 that one of the families has


@pytest.mark.parametrize("batch", [1, 3, 20])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_graph_writes_what_calls_write(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], family: str, batch: int
) -> None:
    compressed = quantized(tiny_model(family, dtype="bfloat16"), "w4a16g32")
    options = compressed.options.model_copy(update={"device": "cuda"})
    model = ModelHandle(options, compressed.changes, Acceleration()).take()
    one, other = torch.randint(4096, (2, batch, PROMPT), device="cuda")
    recorded = make_decoding(model, one, NEW)
    assert (recorded.form, recorded.why) == (GRAPH, None)
    cache = fixed_cache(model, PROMPT + NEW)
    assert not isinstance(cache, str), cache
    called = FixedCache(model, cache, batch)
    for prompt in (one, other, one):
        assert torch.equal(written(recorded, prompt, NEW), written(called, prompt, NEW))


def test_a_model_that_waits_for_the_gpu_is_called(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    class Waiting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * float(x.max() > -1e30)

    compressed = quantized(tiny_model("llama", dtype="bfloat16"), "w4a16g32")
    model = ModelHandle(compressed.options.model_copy(update={"device": "cuda"}), compressed.changes, Acceleration()).take()
    model.model.norm = nn.Sequential(model.model.norm, Waiting())
    prompt = torch.randint(4096, (2, PROMPT), device="cuda")
    decoding = make_decoding(model, prompt, NEW)
    assert decoding.form == CALLS and "waits for the GPU in forward, test_decoding.py" in str(decoding.why)
    assert written(decoding, prompt, NEW).shape == (2, NEW)
