"""Pre-shifted exponents: the paper's formula channel by channel, exact in bfloat16, better where channels differ."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import snap_inputs
from qtool.methods.transform.pre_shift import PreShiftOptions, check, pre_shift
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.wiring import Edits, Scaling, apply_edits, find_scalings
from qtool.options import ModelOptions

SHORT = "e2m1-ae2m1"


def prepared(folder: Path, dtype: str = "float32", uneven: bool = True) -> tuple[Block, Tensor, list[Scaling]]:
    """A block whose norms have channels of very different strength, its inputs and scalings."""
    model = ModelHandle(ModelOptions.model_validate({"path": str(folder), "dtype": dtype}))
    hidden = model.embed(torch.randint(2, 4096, (4, 24), generator=torch.Generator().manual_seed(0)))
    block = model.block(0)
    if uneven:
        with torch.no_grad():
            gain = block.get(f"{block.name}.input_layernorm").get_parameter("weight")
            gain.mul_(torch.logspace(-3, 3, len(gain), base=2.0).to(gain.dtype))
    return block, hidden, find_scalings(block, hidden[:1])


def run(block: Block, hidden: Tensor, scalings: list[Scaling], short: str = SHORT) -> tuple[Edits, dict[str, LayerStats]]:
    stats = {name: LayerStats(shape_of(layer)[1], ("amax", "sample")) for name, layer in block.linears().items()}
    block.forward_observed(hidden, stats)
    return pre_shift(block, scalings, stats, PreShiftOptions.model_validate({"scheme": short}), print), stats


def real_loss(X: Tensor, weights: list[Tensor], k: Tensor, short: str) -> float:
    scheme = Scheme.model_validate(short)
    assert scheme.activations is not None
    x = snap_inputs(X * 2.0**k, scheme.activations)
    Q = [quantize(W * 2.0**-k, scheme.weights).dequantize() for W in weights]
    return sum(float((x @ q.T - X @ W.T).square().sum()) for q, W in zip(Q, weights, strict=True))


@pytest.mark.parametrize(("short", "most"), [("e2m1-ae2m1", 3), ("e3m0-ae3m0", 7), ("e2m1-ae1m2", 1)])
def test_shifts_are_those_of_the_formula_with_the_best_shared_magnitude(
    short: str, most: int, tiny_model: Callable[..., Path]
) -> None:
    """A second search, channel by channel in Python's floats."""
    block, hidden, scalings = prepared(tiny_model("llama"))
    scaling = next(s for s in scalings if s.source.endswith("input_layernorm"))
    edits, stats = run(block, hidden, [scaling], short)
    X, weights = stats[scaling.consumers[0]].sample(), [weight_of(block.get(name)) for name in scaling.consumers]
    peaks = X.abs().amax(0).tolist()
    tried = [torch.zeros(64)]
    for t in range(2 * most + 1):
        M = max(peaks) * 2 ** (-t / 2)
        tried.append(torch.tensor([min(max(round(math.log2(M / peak)), 0), most) for peak in peaks], dtype=torch.float32))
    best = min(tried, key=lambda k: real_loss(X, weights, k, short))
    gain = block.get(scaling.source).get_parameter("weight").detach()
    assert torch.equal(edits[f"{scaling.source}.weight"], gain * 2.0**best)
    assert 0 < float(best.max()) <= most and float(best.min()) == 0
    assert real_loss(X, weights, best, short) < 0.95 * real_loss(X, weights, tried[0], short)


def test_in_bfloat16_the_block_computes_the_same_bits(tiny_model: Callable[..., Path]) -> None:
    """Weights and gains change exponents alone, so that every product and sum is what it was, shifted."""
    block, hidden, scalings = prepared(tiny_model("llama", dtype="bfloat16"), "bfloat16")
    before = block.forward(hidden)
    edits, _ = run(block, hidden, scalings)
    assert any(name.endswith("norm.weight") for name in edits)
    apply_edits(block.module, block.name, edits)
    assert torch.equal(block.forward(hidden), before)


def test_channels_that_are_alike_stay_and_dead_ones_are_finite(tiny_model: Callable[..., Path]) -> None:
    block, hidden, scalings = prepared(tiny_model("llama"), uneven=False)
    with torch.no_grad():
        block.get(f"{block.name}.input_layernorm").get_parameter("weight")[3] = 0.0
    edits, stats = run(block, hidden, scalings)
    assert all(torch.isfinite(value).all() for value in edits.values())
    scaling = scalings[0]
    for name in scaling.consumers:
        flat = LayerStats(64, ("amax", "sample"))
        flat.update(torch.randint(0, 2, (50, 64), generator=torch.Generator().manual_seed(0)) * 2.0 - 1)
        stats[name] = flat
    assert pre_shift(block, [scaling], stats, PreShiftOptions.model_validate({"scheme": SHORT}), print) == {}


@pytest.mark.parametrize("short", ["e2m1", "w4a4", "e2m1-aint8"])
def test_inputs_that_are_no_floats_are_refused_before_any_work(short: str) -> None:
    with pytest.raises(QtoolError, match="rounds no inputs to floats; write a scheme such as e2m1-ae2m1"):
        check(None, PreShiftOptions.model_validate({"scheme": short}))
