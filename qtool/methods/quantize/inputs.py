"""Give inputs that are rounded at run time one static scale, and zero point, found on the calibration text.

    s = fit(range),  range = [min x, max x], or narrower      x^ = s (nearest(x / s + z) - z)      s, z [1]
    percentile   the narrowest range that holds `percentile` % of all values; with zero points half of the rest on each side
    mse          [max(min x, -t), min(max x, t)],  t = max |x| 2^(-k/8),  k of 0 .. 96 with the least |x - x^|² of all
    nvfp4        s is the float32 scale over those of 16, 2^ceil(log2(max |x| / 1344)); those of 16 are found at run time still
x [tokens, in]: of all tokens and of all linears that share the input and round it alike, which so share s, in the model as
the blocks before it have become. A token is rounded without a look at its range, so that kernels can do it while they write x.
Source: Jacob et al. 2018, arXiv:1712.05877, section 3.1; range mse: Nagel et al. 2021, arXiv:2106.08295, section 3.1.
Differs: percentiles and errors are those of values told to bfloat16, see calibration/input_values.py.
For: runtimes and accelerators that take static scales alone, and NVFP4 inputs, whose float32 scale runtimes want stored. At the
end of quantizing. minmax for floats; mse for whole numbers, of which a massive token takes nearly all levels.
Costs: two passes through the model, without gradients. Quality: scales for each token lose less wherever they can be had.
"""

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.input_values import Histogram, InputValues
from qtool.errors import QtoolError
from qtool.formats.inputs import InputScales
from qtool.formats.integer import Params
from qtool.formats.scales import token_scale
from qtool.formats.scheme import ActivationScheme, InputSelection, Scheme
from qtool.model.handle import ModelHandle
from qtool.registry import Method

WHERE = "quantize/inputs"
RATIOS = [2 ** (-k / 8) for k in range(97)]  # of the largest magnitude: twelve octaves, more than massive tokens stand out by


class InputsOptions(InputSelection):
    """What the range is to hold."""

    range: Literal["minmax", "percentile", "mse"] = Field(
        "minmax", description="minmax: all values; percentile: most; mse: those of least squared error"
    )
    percentile: float = Field(99.99, gt=50, le=100, description="share of the values that range percentile holds, in percent")


def inputs(
    seen: InputValues, scheme: ActivationScheme, dtype: torch.dtype, options: InputsOptions, note: Callable[[str], None]
) -> InputScales:
    """Static scales in dtype (of nvfp4 in float32) for a static scheme; raises QtoolError where a value is not finite."""
    if not seen.is_finite:
        raise QtoolError("inputs hold NaN or infinity; check the model's weights and load it with dtype: float32")
    found, grid = seen.histogram(), scheme.grid
    if found.minimum == found.maximum == 0:
        note("all inputs are zero; they get a scale of 1")
    low, high = chosen_range(found, scheme, options, dtype)
    if scheme.scale_dtype == "float8_e4m3fn":
        return InputScales(scheme, token_scale(torch.tensor([max(-low, high)]), grid.largest))
    return scales_of(scheme, low, high, dtype)


def chosen_range(found: Histogram, scheme: ActivationScheme, options: InputsOptions, dtype: torch.dtype) -> tuple[float, float]:
    """The ends of the range, around 0."""
    low, high = found.minimum, found.maximum
    if options.range == "percentile" and scheme.symmetric:
        most = reached(found.values.abs(), found.counts, options.percentile / 100)
        return max(low, -most), min(high, most)
    if options.range == "percentile":
        share = (1 + options.percentile / 100) / 2
        least, most = -reached(-found.values, found.counts, share), reached(found.values, found.counts, share)
        return min(max(low, least), 0), max(min(high, most), 0)
    if options.range == "mse":
        ends = [(max(low, -t), min(high, t)) for t in (max(-low, high) * ratio for ratio in RATIOS)]
        costs = [cost(found, scales_of(scheme, *pair, dtype)) for pair in ends]
        return ends[costs.index(min(costs))]
    return low, high


def reached(values: Tensor, counts: Tensor, share: float) -> float:
    """The least of the values that this share of all, by their counts, does not exceed."""
    values, order = values.sort()
    sums = counts[order].cumsum(0).double()
    return float(values[torch.searchsorted(sums, sums[-1:] * share * (1 - 1e-12)).clamp(max=len(values) - 1)])


def cost(found: Histogram, scales: InputScales) -> float:
    """Sum of the squared errors of all values."""
    zero = None if scales.zero is None else scales.zero.float()
    error = scales.scheme.grid.snap(found.values, Params(scales.scale.float(), zero)) - found.values  # [values]
    return float((found.counts * error.double().square()).sum())


def scales_of(scheme: ActivationScheme, low: float, high: float, dtype: torch.dtype) -> InputScales:
    """The scale, as it is stored, and zero point of a range."""
    params = scheme.grid.fit_range(torch.tensor([low]), torch.tensor([high]))  # [1]
    scale = params.scale.to(dtype)
    scale = torch.where(scale > 0, scale, torch.finfo(dtype).tiny)  # what the dtype cannot hold
    return InputScales(scheme, scale, None if params.zero is None else params.zero.to(torch.uint8))


def check_schemes(model: ModelHandle, schemes: dict[str, Scheme], options: InputsOptions) -> None:
    """Raise QtoolError where no input is rounded, or one so that a static scale does not serve it."""
    chosen = {name: scheme for name, scheme in schemes.items() if scheme.activations and not options.is_ignored(name)}
    if not chosen:
        raise QtoolError(
            f"{WHERE}: no linear rounds its inputs; quantize to a scheme such as w8a8, e4m3-ae4m3 or nvfp4-anvfp4 before it"
        )
    for name, scheme in chosen.items():
        rounding = scheme.activations
        assert rounding is not None
        where = f"{WHERE}: {name}: {scheme}"
        if rounding.static:
            raise QtoolError(f"{where}: its inputs have static scales already; leave this step away, or add it to ignore")
        if rounding.threshold is not None:
            raise QtoolError(f"{where}: outliers of its inputs are found at run time; quantize to w8a8, or add it to ignore")
        is_nvfp4 = rounding.scale_dtype == "float8_e4m3fn"
        if rounding.group is not None and not is_nvfp4:
            raise QtoolError(
                f"{where}: its inputs are rounded by groups, which find their ranges at run time; static scales serve whole "
                "tokens and nvfp4: quantize so, or add it to ignore"
            )
        if is_nvfp4 and options.range == "mse":
            raise QtoolError(f"{where}: groups of nvfp4 find their own ranges at run time; use range: minmax or percentile")


METHOD = Method(run=inputs, options=InputsOptions, scope="inputs", holds=check_schemes)
