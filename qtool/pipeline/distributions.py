"""How the values of linears are distributed, before and after the transforms and against the grid: what a report plots.

Written to distributions.json, one entry for each kind of linear in each block (a mixture's experts count together):
    weights   of the original and, where a step transformed it, of the model right before it was quantized (`transformed`)
    inputs    of both, over the first tokens of the calibration text; `channels`: the largest magnitude of each channel,
              64 of them from the smallest to the largest
    grid      weights before rounding in units of their stored scales, x / s + z, and how often each level is used after it
    input_grid   inputs of the model right before it was quantized in units of the scales that they will be rounded by
Magnitudes are counted in half octaves, everything else in 64 bins (linalg/histogram.py); of a large matrix every n-th row.
Why a pass of its own after all steps instead of counting inside of them: it sees what the steps have come to together, no
method need know of it, and of a few hundred tokens it costs little beside one evaluation.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.codebook import CodebookGrid
from qtool.formats.inputs import InputScales, fit_inputs, grouped_inputs, outlying
from qtool.formats.integer import IntegerGrid
from qtool.formats.scheme import ActivationScheme, Grid, Scheme
from qtool.formats.tensor import QuantizedTensor, to_groups
from qtool.linalg import histogram
from qtool.linalg.outliers import Moments, channel_ratio
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.memory import large_pieces_returned
from qtool.model.store import INPUTS, Changes
from qtool.model.wiring import find_groups
from qtool.pipeline.sensitivity import kind_of
from qtool.progress import Progress

Row = dict[str, Any]  # an entry of distributions.json
N_TOKENS = 512  # of the calibration text, in whole windows, one at least
N_WEIGHTS = 1 << 16  # of one linear, about: every n-th row of a larger one
MOST_LEVELS = 32  # that are worth a line each


@large_pieces_returned()
@torch.no_grad()
def measure_distributions(
    original: ModelHandle, unquantized: ModelHandle, compressed: ModelHandle, tokens: Tensor | None, progress: Progress
) -> list[Row]:
    """The entries of distributions.json; tokens [samples, length], None where no text was read.

    unquantized: the model right before its quantize steps, which is the original itself where nothing transformed it.
    """
    models = {"original": original} | ({} if unquantized is original else {"transformed": unquantized})
    progress.stage("distributions", sum(model.n_blocks for model in models.values()))
    text = None if tokens is None else tokens[: max(1, N_TOKENS // tokens.shape[1])]
    found: dict[tuple[int, str], Row] = {}
    for name, model in models.items():
        hidden = None if text is None else model.embed(text)  # [samples, length, hidden]
        for block in model.blocks():
            inputs: dict[str, Inputs] = {}
            changes = compressed.unit_changes(f"block_{block.index:03d}") if model is unquantized else {}
            if hidden is not None:
                inputs = observed(block, hidden, changes)
                hidden = block.forward_observed(hidden, {one.first: one for one in inputs.values()})
            of_kind: dict[str, list[str]] = {}
            for linear in block.linears():
                of_kind.setdefault(kind_of(linear, block), []).append(linear)
            for kind, linears in of_kind.items():
                row = found.setdefault((block.index, kind), {"block": block.index, "kind": kind, "weights": {}, "inputs": {}})
                row["weights"][name] = magnitudes(every_nth_row(weight_of(block.get(one))) for one in linears)
                if (seen := [inputs[one] for one in linears if one in inputs and inputs[one].n_tokens]) and hidden is not None:
                    row["inputs"][name] = facts_of(seen)
                    row |= {} if (grid := inputs_on_the_grid(seen)) is None else {"input_grid": grid}
                row |= {} if (grid := on_the_grid(block, linears, changes)) is None else {"grid": grid}
            progress.advance(block.name)
    return list(found.values())


def magnitudes(parts: Iterable[Tensor]) -> Row:
    """Counts and moments of all values of some matrices [rows, in] together."""
    moments, counts, largest = Moments(), torch.zeros(histogram.BINS, dtype=torch.int64), 0.0
    for W in parts:
        moments.update(W)
        counts += histogram.magnitude_counts(W)
        largest = max(largest, float(W.abs().max()))
    rms = (moments.second / max(moments.n, 1) + moments.mean**2) ** 0.5
    return {"counts": counts.tolist(), "rms": short(rms), "largest": short(largest), "kurtosis": short(moments.kurtosis())}


class Inputs:
    """What linears that share an input are fed: counts of magnitudes, and each channel's largest one.

    Where they are rounded, counts in units of the scales too, of the channels that are.
    """

    def __init__(
        self,
        first: str,
        n_features: int,
        device: torch.device,
        rounding: ActivationScheme | None = None,
        static: InputScales | None = None,
    ) -> None:
        self.first = first  # the linear that is observed for all
        self.rounding = rounding
        self.static = None if static is None else static.to(device)
        self.on_grid = torch.zeros(histogram.BINS, dtype=torch.int64)
        self.stats = LayerStats(n_features, ("amax",), device)
        self.moments = Moments()
        self.counts = torch.zeros(histogram.BINS, dtype=torch.int64)

    @property
    def n_tokens(self) -> int:
        return self.stats.n_tokens

    def update(self, x: Tensor) -> None:
        """Take in x [..., in]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()  # [tokens, in]
        self.stats.update(rows)
        self.moments.update(rows)
        self.counts += histogram.magnitude_counts(rows)
        if self.rounding is not None:
            kept = outlying(rows, self.rounding)  # [in]
            wide = grouped_inputs(rows if kept is None else rows.masked_fill(kept, 0), self.rounding)  # [tokens, groups, group]
            params = fit_inputs(wide, self.rounding, self.static)
            u = wide / params.scale if params.zero is None else wide / params.scale + params.zero
            u = u.flatten(1) if kept is None else u.flatten(1)[:, ~kept]  # [tokens, in]
            self.on_grid += histogram.level_counts(u, *range_of(self.rounding.grid))


def observed(block: Block, hidden: Tensor, changes: Changes) -> dict[str, Inputs]:
    """By full name, empty statistics of the inputs of a block's linears; those that share an input share them.

    changes: says how inputs are rounded; of linears with one input, which mostly are rounded alike, the first that is counts.
    """
    found: dict[str, Inputs] = {}
    for group in find_groups(block, hidden[:1]):
        first, rounding, static = group.linears[0], None, None
        for name in group.linears:
            change, scales = changes.get(f"{name}.weight"), changes.get(f"{name}{INPUTS}")
            if rounding is None and isinstance(change, tuple):
                rounding, static = change[1].activations, scales if isinstance(scales, InputScales) else None
        found |= dict.fromkeys(group.linears, Inputs(first, shape_of(block.get(first))[1], block.device, rounding, static))
    return found


def facts_of(seen: list[Inputs]) -> Row:
    """Of the inputs of linears of one kind together."""
    unique = list(dict.fromkeys(seen))
    amax = torch.stack([one.stats.amax() for one in unique]).amax(0).sort().values  # [in], rising
    places = torch.linspace(0, len(amax) - 1, min(histogram.BINS, len(amax))).round().long()
    moments = unique[0].moments if len(unique) == 1 else None
    return {
        "counts": torch.stack([one.counts for one in unique]).sum(0).tolist(),
        "channels": [short(value) for value in amax[places.to(amax.device)].tolist()],
        "channel_ratio": short(channel_ratio(amax)),
        "kurtosis": None if moments is None else short(moments.kurtosis()),
    }


def inputs_on_the_grid(seen: list[Inputs]) -> Row | None:
    """Inputs of linears of one kind in units of the levels; None where they are not rounded. Of several schemes the first."""
    unique = [one for one in dict.fromkeys(seen) if one.rounding is not None and one.rounding == seen[0].rounding]
    if not unique or (scheme := unique[0].rounding) is None:
        return None
    counts = torch.stack([one.on_grid for one in unique]).sum(0).tolist()
    return {"scheme": str(scheme), "range": range_of(scheme.grid), "levels": levels_of(scheme.grid), "counts": counts}


def range_of(grid: Grid) -> tuple[float, float]:
    """The range of the bins over a grid."""
    return histogram.range_over(grid.ends, grid.n_levels)


def on_the_grid(block: Block, linears: list[str], changes: Changes) -> Row | None:
    """The linears' weights in units of the levels that `changes` rounds them to; None where they are not quantized.

    Of experts with different schemes those that share the first one's.
    """
    found: Row | None = None
    for name in linears:
        change = changes.get(f"{name}.weight")
        if not isinstance(change, tuple):
            continue
        tensor, scheme = change[0], str(change[1])
        if found is None:
            found = describe(tensor.grid, change[1])
        if found["scheme"] != scheme:
            continue
        W = weight_of(block.get(name)).to(tensor.scale.device)
        before, after = histogram.level_counts(in_levels(W, tensor), *found["range"]).tolist(), uses(tensor)
        found["counts"] = [a + b for a, b in itertools.zip_longest(found["counts"], before, fillvalue=0)]
        found["used"] = [a + b for a, b in itertools.zip_longest(found["used"], after, fillvalue=0)]
    return found


def describe(grid: Grid, scheme: Scheme) -> Row:
    """What a histogram over the grid needs to be drawn."""
    levels = levels_of(grid)
    return {"scheme": str(scheme), "range": range_of(grid), "levels": levels, "counts": [], "used": []}


def levels_of(grid: Grid) -> list[float | None]:
    """The levels in the order of their codes; none where they are too many to draw."""
    if grid.n_levels > MOST_LEVELS or not isinstance(grid, IntegerGrid | CodebookGrid):
        return []
    codes = torch.arange(grid.low, grid.high + 1)
    return [short(level) for level in grid.levels(codes).tolist()]


def in_levels(W: Tensor, tensor: QuantizedTensor) -> Tensor:
    """W [out, in] before rounding in units of the levels of what it was rounded to, w / s + z [rows, groups, group]."""
    if tensor.column_scale is not None:
        W = W / tensor.column_scale.float()
    if tensor.salient is not None:  # they have a grid of their own
        rest = torch.ones(W.shape[1], dtype=torch.bool, device=W.device)
        rest[tensor.salient.columns.long()] = False
        W = W[:, rest]
    step = step_of(W)
    params = tensor.params()  # [rows, groups, 1]
    u = to_groups(W, tensor.scheme)[::step] / params.scale[::step]
    return u if params.zero is None else u + params.zero[::step]


def uses(tensor: QuantizedTensor) -> list[int]:
    """How often each code is used; empty where codes are too many to draw."""
    if not levels_of(tensor.grid):
        return []
    codes = every_nth_row(tensor.codes).flatten().long() - tensor.grid.low
    return torch.bincount(codes, minlength=tensor.grid.n_levels).tolist()


def every_nth_row(W: Tensor) -> Tensor:
    """Rows of W [out, in], at even distances, of about N_WEIGHTS weights."""
    return W[:: step_of(W)]


def step_of(W: Tensor) -> int:
    return max(1, W.numel() // N_WEIGHTS)


def short(value: float | None) -> float | None:
    """Four digits, which is more than a plot shows."""
    return None if value is None else float(f"{value:.4g}")
