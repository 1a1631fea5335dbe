"""AWQ's search finds the scale that a slow search over real outputs finds, and never loses to rounding."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import quantize
from qtool.methods.transform.awq import AwqOptions, awq, candidates, output_loss
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.model.wiring import find_scalings
from qtool.options import ModelOptions

SCHEME = WeightScheme(bits=3, group=16, symmetric=True, scale_dtype="float32")


def test_the_closed_form_is_the_mean_squared_output_error() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(50, 32, generator=generator) * torch.linspace(0.1, 3, 32)
    W = torch.randn(8, 32, generator=generator)
    s = torch.rand(32, generator=generator) + 0.5
    rounded = quantize(W * s, SCHEME).dequantize() / s
    expected = (X @ (rounded - W).T).square().sum() / len(X)
    assert output_loss(W, s, X.T @ X / len(X), SCHEME) == pytest.approx(float(expected), rel=1e-4)


def test_the_chosen_scale_is_the_best_candidate_by_real_outputs(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama")), dtype="float32"))
    hidden = model.embed(torch.randint(0, 4096, (4, 24), generator=torch.Generator().manual_seed(0)))
    block = model.block(0)
    scaling = find_scalings(block, hidden[:1])[0]
    inputs: list[torch.Tensor] = []
    stats = LayerStats(64, ("mean_abs", "hessian"))
    block.get(scaling.consumers[0]).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    block.observe(hidden, {scaling.consumers[0]: stats})
    options = AwqOptions.model_validate({"scheme": {"weights": SCHEME.model_dump()}, "grid": 8})
    edits = awq(block, [scaling], {scaling.consumers[0]: stats}, options, print)

    X = torch.cat(inputs)  # [tokens, in]
    weights = [weight_of(block.get(name)) for name in scaling.consumers]

    def real_loss(s: torch.Tensor) -> float:
        errors = [X @ (quantize(W * s, SCHEME).dequantize() / s - W).T for W in weights]
        return float(sum(error.square().sum() for error in errors))

    tried = list(candidates(torch.cat(weights), stats.mean_abs(), scaling.spread, options))
    best = min(tried, key=real_loss)
    chosen = edits[f"{scaling.consumers[0]}.weight"] / weights[0]
    assert torch.allclose(chosen.nanmedian(0).values, best, rtol=1e-3)
    assert real_loss(best) <= real_loss(torch.ones(64))
    assert len(tried) == 1 + 2 * 8


def test_a_channel_that_is_always_zero_keeps_scales_finite() -> None:
    options = AwqOptions.model_validate({"scheme": "w4a16g16"})
    activation = torch.ones(32)
    activation[5] = 0.0
    for s in candidates(torch.randn(4, 32), activation, torch.arange(32), options):
        assert torch.isfinite(s).all() and (s > 0).all()
