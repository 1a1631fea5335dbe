"""PTQ1.61: one bit for most weights, the scheme given for the input channels with the largest activations.

Of each linear the share `salient` of columns with the largest max |x_j| is rounded to the scheme, a row at a time; the rest is
    W^ = r1 r2ᵀ ⊙ (alpha sign(W - mu) + mu),  see layers/binary_linear.py
and alpha, r1, r2 of all linears of a block f are trained together, by AdamW, to
    minimize  d(f^(x), f(x°)) + d(f^(x), f(x)),   d(a, b) = mean (a - b)² - mean over tokens of log cos(a, b)
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
Source: Zhao et al. 2025, arXiv:2502.13179. Differs: rates fall to zero, and a block keeps where it began if that was better;
r2 is 1 on salient columns, as the formula is that of the others. Its preprocessing, to quantize, restore the model by
low-rank training, merge and quantize again, is no part of this step.
For: below two bits, where the model must fit at any price.
Costs: gradients through every block; half a bit more where rows are short.
"""

from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.allocation import stored_bytes
from qtool.formats.outliers import index_dtype
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor, Salient, quantize
from qtool.layers.binary_linear import BINARY, BinaryLinear
from qtool.linalg.distance import distance_from_both
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.options import BlockTuning
from qtool.registry import Method


class Ptq161Options(SchemeSelection, BlockTuning):
    """Options of PTQ1.61; `scheme` is that of the salient columns, w4a16-asym in the paper."""

    salient: float = Field(0.2, ge=0, le=0.9, description="share of the columns that are rounded to the scheme")
    steps: int = Field(500, ge=0, description="updates per block; 0 leaves the scales of least squared error")
    batch: int = Field(4, ge=1, description="windows in one update")
    lr: float = Field(5e-4, gt=0, le=1, description="AdamW's rate for alpha, at first")
    factor_lr: float = Field(1e-3, gt=0, le=1, description="AdamW's rate for r1 and r2, at first")


def ptq161(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    schemes: dict[str, Scheme],
    options: Ptq161Options,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Quantize the linears named in `schemes`; inputs, targets [samples, length, hidden], the targets f(x°)."""
    check(None, options)
    amax = largest_inputs(block, inputs, schemes, note)
    layers = {name: binary(block, name, amax[name], scheme, options) for name, scheme in schemes.items()}
    own = block.forward(inputs)  # [samples, length, hidden], f(x)
    groups = [
        {"params": [layer.alpha for layer in layers.values()], "lr": options.lr},
        {"params": [p for layer in layers.values() for p in (layer.r1, layer.r2)], "lr": options.factor_lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(options.steps, 1))
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    first, random = [p.detach().clone() for p in trained], torch.Generator().manual_seed(seed)
    with block.replaced(layers):
        before = distance_from_both(block.forward(inputs), targets, own)
        for _ in range(options.steps):
            rows = torch.randperm(len(inputs), generator=random)[: options.batch]
            loss = distance_from_both(block.call_from_host(inputs[rows]), targets[rows], own[rows])
            gradients = torch.autograd.grad(loss, trained)
            for p, gradient in zip(trained, gradients, strict=True):
                p.grad = gradient
            optimizer.step()
            falling.step()
            for layer in layers.values():
                layer.clamp()
        if not distance_from_both(block.forward(inputs), targets, own) <= before:
            note("training did not lower the block's error; it keeps the scales of least squared error")
            with torch.no_grad():
                for p, value in zip(trained, first, strict=True):
                    p.copy_(value)
    return {name: layer.quantized() for name, layer in layers.items()}


def largest_inputs(block: Block, inputs: Tensor, schemes: dict[str, Scheme], note: Callable[[str], None]) -> dict[str, Tensor]:
    """Largest magnitude of each linear's input channels, [in] by name."""
    stats = {name: LayerStats(weight_of(block.get(name)).shape[1], ("amax",), block.device) for name in schemes}
    block.observe(inputs, stats)
    for name, seen in stats.items():
        if seen.n_tokens == 0:
            note(f"{name}: no calibration token reached it; its first columns are taken for the salient ones")
    return {name: seen.amax() for name, seen in stats.items()}


def binary(block: Block, name: str, amax: Tensor, scheme: Scheme, options: Ptq161Options) -> BinaryLinear:
    """The linear with its salient columns rounded and the others binary, untrained."""
    linear = block.get(name)
    W, bias = weight_of(linear), getattr(linear, "bias", None)
    n_salient = round(options.salient * len(amax))
    salient = None
    if n_salient:
        columns = amax.argsort(descending=True, stable=True)[:n_salient].sort().values  # [salient]
        salient = Salient(columns.to(index_dtype(len(amax))), quantize(W[:, columns], scheme.weights))
    return BinaryLinear(W, bias, salient, scheme.activations)


def check(model: object, options: Ptq161Options) -> None:
    """Raise QtoolError, before any work, for schemes that salient columns cannot have."""
    for scheme in (options.scheme, *options.modules.values()):
        if scheme != "search" and (scheme.weights.group is not None or scheme.weights.grid.width > 1):
            raise QtoolError(f"quantize/ptq161: salient columns have one group a row, not {scheme}; write scheme: w4a16-asym")


def added_bytes(options: Ptq161Options, out: int, columns: int) -> int:
    """What a matrix [out, columns] stores beyond salient columns alone, less than nothing: of the others one bit each."""
    assert isinstance(options.scheme, Scheme), "only a scheme can be planned with"
    n_salient = round(options.salient * columns)
    parts = stored_bytes((out, n_salient), options.scheme.weights) + stored_bytes((out, columns - n_salient), BINARY)
    masks = columns * torch.float16.itemsize + n_salient * index_dtype(columns).itemsize
    return parts + masks - stored_bytes((out, columns), options.scheme.weights)


METHOD = Method(
    run=ptq161,
    options=Ptq161Options,
    scope="block",
    check=check,
    schemes=("w4a16-asym", "w3a16"),
    adds="salient columns",
    added_bytes=added_bytes,
)
