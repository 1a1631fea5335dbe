"""Pre-shifted exponents: make weak input channels stronger by powers of two, so that few exponent bits reach all of them.

    X_j <- 2^k_j X_j,   W_:j <- 2^-k_j W_:j,     k_j = clip(round(log2(M / max|X_j|)), 0, 2^e - 1)
    X [tokens, in] input of the linears that share it    W [out, in] theirs    k [in]    e: exponent bits of the inputs' format
M is the largest magnitude, shared by all channels, of  2^(-t/2) max|X|,  t = 0, 1, 2, ..,  that loses least:
    L = sum over the linears  ‖Q_a(X diag(2^k)) Q(W diag(2^-k))ᵀ - X Wᵀ‖²,  or no shift where none loses less
    Q rounding of weights, Q_a of inputs, both as `scheme` says
What makes X, a norm or a linear, takes 2^k_j into its own weights, of which exponents alone change: nothing new runs.
k_j is the whole-number part of a channel's exponent bias in the paper, and M stands for the shared one.
Source: Liu et al. 2023, arXiv:2310.16836 (LLM-FP4), section 4.2.
Differs: weights are divided where the paper's carry k_j in their exponents, the same product;
inputs' ranges are each token's own, so that M says how far channels are evened out, not where they are cut off.
For: before quantize/fpq, where inputs are floats of four bits; whole numbers take SmoothQuant's scales.
Costs: one pass through the model, and a dozen trial roundings of each linear and of 2048 tokens of its input.
"""

from collections.abc import Callable, Iterator

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.codebook import exponent_bits
from qtool.formats.scheme import Scheme
from qtool.layers.trial_rounding import output_loss
from qtool.model.handle import Block
from qtool.model.wiring import Edits, Scaling, edited_weight, largest_per_source, scale_edits
from qtool.options import Options
from qtool.registry import Method

SMALLEST = 1e-5  # largest magnitude of a dead channel
LOWEST = 12  # octaves below the strongest channel that M may lie


class PreShiftOptions(Options):
    """What weights and inputs will be rounded to."""

    scheme: Scheme = Field(description="the scheme of the quantize step that follows, inputs in floats, such as e2m1-ae2m1")


def pre_shift(
    block: Block,
    scalings: list[Scaling],
    stats: dict[str, LayerStats],
    options: PreShiftOptions,
    note: Callable[[str], None],
) -> Edits:
    """Edits that shift the channels of every scaling of the block."""
    edits: Edits = {}
    for scaling in scalings:
        weights = [edited_weight(block, name, edits) for name in scaling.consumers]
        shared = stats[scaling.consumers[0]]
        x_max = largest_per_source(shared.amax(), scaling).clamp(min=SMALLEST)  # [channels of source]
        X, spread = shared.sample(), scaling.spread.to(x_max.device)  # [tokens, in]
        Y = [X @ W.T for W in weights]  # [tokens, out]
        tried = [
            (output_loss(X, weights, Y, torch.exp2(-k)[spread], options.scheme), k) for k in shifts(x_max, most(options.scheme))
        ]
        _, best = min(tried, key=lambda pair: pair[0])  # the first of equals, which is no shift
        if bool(best.any()):
            scale_edits(block, scaling, torch.exp2(-best), edits)
    return edits


def shifts(x_max: Tensor, most: int) -> Iterator[Tensor]:
    """k [channels of source] to try for largest magnitudes x_max: none, then those of every M."""
    yield torch.zeros_like(x_max)
    for t in range(2 * min(most, LOWEST) + 1):
        M = x_max.max() * 2.0 ** (-t / 2)
        yield (M / x_max).log2().round().clamp(0, most)


def most(scheme: Scheme) -> int:
    """2^e - 1; raises QtoolError for inputs that are no floats."""
    if scheme.activations is None or scheme.activations.format == "int":
        raise QtoolError(
            f"transform/pre_shift: {scheme} rounds no inputs to floats; write a scheme such as e2m1-ae2m1, or take "
            "transform/smoothquant"
        )
    return int(2 ** exponent_bits(scheme.activations.format) - 1)


def check(model: object, options: PreShiftOptions) -> None:
    """Raise QtoolError, before any work, where inputs will not be floats."""
    most(options.scheme)


METHOD = Method(
    run=pre_shift, options=PreShiftOptions, scope="block", needs=("amax", "sample"), check=check, schemes=("e2m1g32-ae2m1",)
)
