"""FPQ: for each linear the split of a float's bits, for weights and for inputs, and the weights' ranges, by its output's error.

    L = ‖Q_a(X) Qᵀ - X Wᵀ‖² = tr(D H Dᵀ) + 2 tr(D Tᵀ) + const,   Q = decode(encode(W)),   D = Q - W
    H = Q_a(X)ᵀ Q_a(X),   T = W (Q_a(X) - X)ᵀ Q_a(X)
    X [tokens, in] inputs    W, Q, D, T [out, in]    H [in, in]    Q_a rounding of inputs, each token in its own range
Formats are all that have the bits of the scheme's: of four E1M2, E2M1, E3M0, of six E2M3, E3M2, of eight E4M3, E5M2.
By turns: the weights' format of least L, each group in the range r [min w, max w] whose part of L, with its own block of H, is
least, r = 0.4, 0.45, .. 1.2; then, for these weights, the inputs' format of least L; until neither changes.
Source: Liu et al. 2023, arXiv:2310.16836 (LLM-FP4), section 4.1: a real exponent bias is a scale, its search one of ranges.
Differs: inputs have no range to search, as each token has its own, the paper's a tensor; weights may have groups; a range may
not cost more than it saves in other groups, so that W in the full ranges stays among the choices. The pre-shifted exponents
of section 4.2 are transform/pre_shift, put before this step.
Why both: KL on the demo model's validation text at e2m1-ae2m1: plain rounding 0.244, FPQ 0.182, after pre_shift 0.147; with
four gains of each norm 32 times as large (scripts/plant_outliers.py) 4.5, 0.69, 0.24.
For: weights and inputs both in floats of four bits; where the format must stay as it is written, quantize/rtn or gptq.
Costs: some hundred trial roundings of each linear; the text beyond 2048 tokens costs a pass through the model alone.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.calibration.statistics import SAMPLE, LayerStats
from qtool.errors import QtoolError
from qtool.formats.codebook import splits
from qtool.formats.integer import Params
from qtool.formats.scheme import ActivationScheme, Scheme, SchemeSelection, WeightScheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.layers.quant_linear import snap_inputs
from qtool.linalg.ranges import diagonal_blocks, output_cost
from qtool.options import Sequential
from qtool.registry import Method

SHARES = [step / 20 for step in range(8, 25)]  # of the full range
ROUNDS = 3  # most turns of weights and inputs, the paper's


class FpqOptions(SchemeSelection, Sequential):
    """Options of FPQ; of the scheme's formats only their bits count."""


@dataclass(frozen=True)
class Inputs:
    """What L knows of rounded inputs: H [in, in], T [out, in] and the constant, all means over tokens."""

    scheme: ActivationScheme | None
    H: Tensor
    T: Tensor
    rest: float

    @classmethod
    def of(cls, X: Tensor, W: Tensor, scheme: ActivationScheme | None) -> "Inputs":
        """Inputs X [tokens, in] of W [out, in], rounded as the scheme says."""
        x = X if scheme is None else snap_inputs(X, scheme)  # [tokens, in]
        R = (x - X) @ W.T  # [tokens, out]
        return cls(scheme, x.T @ x / len(x), R.T @ x / len(x), float(R.square().sum()) / len(x))

    def loss(self, tensor: QuantizedTensor, W: Tensor) -> float:
        """L of quantized weights."""
        D = tensor.dequantize() - W  # [out, in]
        return float(((D @ self.H + 2 * self.T) * D).sum()) + self.rest


def fpq(
    W: Tensor, stats: LayerStats, scheme: Scheme, options: FpqOptions, note: Callable[[str], None]
) -> tuple[QuantizedTensor, ActivationScheme | None]:
    """Quantize W [out, in] float32, and choose how inputs are; raises QtoolError for schemes that are no floats."""
    check_floats(scheme)
    if stats.n_tokens == 0:
        note("no calibration token reached it; rounded to nearest in the formats of the scheme")
        return quantize(W, scheme.weights), scheme.activations
    X = stats.sample()
    formats = [scheme.weights.model_copy(update={"format": name}) for name in splits(scheme.weights.format)]
    seen = [Inputs.of(X, W, choice) for choice in input_choices(scheme.activations)]
    inputs = next(one for one in seen if one.scheme == scheme.activations)
    tensor = quantize(W, scheme.weights)
    for _ in range(ROUNDS):
        tried = [tensor, *(found for choice in formats for found in round_weights(W, choice, inputs))]
        tensor = min(tried, key=lambda found: inputs.loss(found, W))
        before, inputs = inputs, min(seen, key=lambda one: one.loss(tensor, W))
        if inputs is before:
            break
    return tensor, inputs.scheme


def input_choices(scheme: ActivationScheme | None) -> list[ActivationScheme | None]:
    """The scheme in every format of its bits that its groups and scales go with; alone where it is no float."""
    found: list[ActivationScheme | None] = [scheme]
    for name in () if scheme is None else splits(scheme.format):
        if scheme is not None and name != scheme.format:
            with contextlib.suppress(ValidationError):
                found.append(ActivationScheme.model_validate(scheme.model_dump() | {"format": name}))
    return found


def round_weights(W: Tensor, scheme: WeightScheme, inputs: Inputs) -> list[QuantizedTensor]:
    """W [out, in] in one format: in full ranges, and each group in the range whose part of L is least."""
    w = to_groups(W, scheme)  # [out, groups, group]
    grid = scheme.grid.for_tensor(w)
    quadratic, T = output_cost(diagonal_blocks(inputs.H, w.shape[-1])), to_groups(inputs.T, scheme)
    low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)  # [out, groups, 1]
    scale, least = grid.fit(w).scale, torch.full_like(low, torch.inf)
    for share in SHARES:
        params = grid.fit_range(share * low, share * high)
        D = grid.snap(w, params) - w
        cost = quadratic(D) + 2 * (D * T).sum(-1, keepdim=True)  # [out, groups, 1]
        scale, least = torch.where(cost < least, params.scale, scale), torch.minimum(cost, least)
    return [quantize(W, scheme), quantize(W, scheme, Params(scale, None))]


def check_floats(scheme: Scheme) -> None:
    """Raise QtoolError for weights whose format has no other split of its bits, or groups that L has no parts for."""
    weights = scheme.weights
    if not splits(weights.format) or not weights.symmetric or weights.group_along != "out_channel":
        raise QtoolError(
            f"quantize/fpq chooses among floats without zero points in groups along inputs, not for {weights}; write a scheme "
            "such as e2m1-ae2m1"
        )


def check(model: object, options: FpqOptions) -> None:
    """Raise QtoolError, before any work, for schemes that are no floats."""
    for scheme in (options.scheme, *options.modules.values()):
        if isinstance(scheme, Scheme):  # and not the word search
            check_floats(scheme)


def operations(options: FpqOptions, out: int, columns: int) -> float:
    """Of one linear: what each rounding of inputs takes, and two turns of trial roundings, each in three formats."""
    group = options.scheme.weights.group if isinstance(options.scheme, Scheme) else None
    return 3 * 2.0 * SAMPLE * columns * (2 * out + columns) + 2 * 3 * len(SHARES) * 2.0 * out * columns * (group or columns)


METHOD = Method(
    run=fpq,
    options=FpqOptions,
    scope="linear",
    needs=("sample",),
    check=check,
    schemes=("e2m1g32", "e3m0", "e2m1-ae2m1", "e3m2g32"),
    chooses=("format",),
    chooses_inputs=True,
    adds="formats chosen by linear",
    operations=operations,
)
