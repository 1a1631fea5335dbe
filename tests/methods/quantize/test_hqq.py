"""HQQ against its steps written out weight by weight in float64, on what it promises, and at its edges."""

import math
import statistics

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.methods.quantize.hqq import HqqOptions, hqq

FLOAT_ZEROS = {"weights": {"bits": 3, "group": 16, "symmetric": False, "scale_dtype": "float32", "zero_dtype": "float16"}}
CODES = {"weights": {"bits": 3, "group": 16, "symmetric": False, "scale_dtype": "float32"}}
SYMMETRIC = {"weights": {"bits": 3, "group": 16, "scale_dtype": "float32"}}
NF4 = {"weights": {"format": "nf4", "group": 16, "scale_dtype": "float32"}}
EVERY = ["w4a16g64", "w3a16g64-asym", "w4a16g64-asymf16", "w2a16", "nf4g64", "mxfp4", "nvfp4", "mxint8", "w8a16-asymf16"]


def weights(n_out: int = 5, n_in: int = 48) -> Tensor:
    """[out, in], with a tail longer than a normal one's."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(n_out, n_in, generator=random) * (0.3 + torch.rand(n_out, n_in, generator=random) ** 4)


def run(W: Tensor, scheme: object, **choices: object) -> QuantizedTensor:
    options = HqqOptions.model_validate({"scheme": scheme, **choices})

    def refuse(text: str) -> None:
        raise AssertionError(f"noted: {text}")

    return hqq(W.clone(), None, Scheme.model_validate(scheme).weights, options, refuse)


def rounded(W: Tensor, scheme: object) -> QuantizedTensor:
    return quantize(W, Scheme.model_validate(scheme).weights)


def mean_error(W: Tensor, tensor: QuantizedTensor) -> Tensor:
    """Mean squared error of each group, [out, groups]."""
    return (W - tensor.dequantize()).square().unflatten(1, (-1, tensor.scheme.group or W.shape[1])).mean(-1)


# ---- the golden: one group after the other, in Python's floats ----


def golden(w: list[float], levels: list[float], learns: str, scale: float, zero: float, steps: int) -> list[list[float]]:
    """(mean error, scale, zero) of one group at each step; levels before zero and scale, `learns` the one that is found."""
    p, beta, found = 0.7, 10.0, []
    for _ in range(steps + 1):
        # In units of the scale by a float32 division, where the largest weight lies just half way between two levels.
        places = [float(torch.tensor(x) / torch.tensor(scale)) + zero for x in w]
        nearest = [min(levels, key=lambda level, place=place: (abs(place - level), level % 2)) for place in places]
        errors = [x - scale * (level - zero) for x, level in zip(w, nearest, strict=True)]
        found.append([sum(e * e for e in errors) / len(w), scale, zero])
        outliers = [math.copysign(max(abs(e) - abs(e) ** (p - 1) / beta, 0), e) if e else 0.0 for e in errors]
        targets = [x - e for x, e in zip(w, outliers, strict=True)]
        if learns == "both":
            scale = statistics.covariance(nearest, targets) / statistics.variance(nearest)
            zero = statistics.fmean(nearest) - statistics.fmean(targets) / scale
            zero = float(torch.tensor(zero).half())
        else:
            centred = [level - zero for level in nearest]
            scale = sum(c * t for c, t in zip(centred, targets, strict=True)) / sum(c * c for c in centred)
        beta *= 1.01
    return found


@pytest.mark.parametrize(("long", "learns"), [(FLOAT_ZEROS, "both"), (CODES, "scale"), (SYMMETRIC, "scale"), (NF4, "scale")])
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_params_are_those_of_the_best_of_the_steps_written_out(long: dict[str, object], learns: str, steps: int) -> None:
    W = 2 * weights()  # errors large enough for E to take part
    tensor = run(W, long, steps=steps)
    start, grid = rounded(W, long).params(), tensor.scheme.grid
    levels = grid.levels(torch.arange(grid.low, grid.high + 1).float()).tolist()
    moved = 0
    for o in range(len(W)):
        for g in range(3):
            first = float(start.scale[o, g]), 0.0 if start.zero is None else float(start.zero[o, g])
            w = W[o, 16 * g : 16 * g + 16].tolist()
            steps_taken = golden(w, levels, learns, *first, steps)
            if learns == "both":  # and from the range whose ends are the first and last level
                low, high = min(*w, 0.0), max(*w, 0.0)
                scale = float(torch.tensor((high - low) / 7))
                steps_taken += golden(w, levels, learns, scale, float(torch.tensor(-low / scale).half()), steps)
            least = min(mean for mean, _, _ in steps_taken)
            # Means that differ in float32's last digits alone are equally good: as many errors fall as rise.
            best = [(scale, zero) for mean, scale, zero in steps_taken if mean <= least * (1 + 1e-6)]
            params = float(tensor.scale[o, g]), 0.0 if tensor.zero is None else float(tensor.zero[o, g])
            assert any(params == pytest.approx(kept, rel=1e-5) for kept in best), (o, g)
            moved += params != first
    assert moved >= 5  # of 15 groups


def test_errors_that_are_let_off_whole_move_nothing_and_those_that_count_whole_move_zero_points() -> None:
    W = weights()
    still, free, plain = run(W, FLOAT_ZEROS, beta=1e12), run(W, FLOAT_ZEROS, beta=1e-9), rounded(W, FLOAT_ZEROS)
    assert still.zero is not None and free.zero is not None and plain.zero is not None
    # E is the error but for 1e-12: the line through codes and values is the one they came from, summed in float32, rounded.
    low, high = (W.unflatten(1, (3, 16)).amin(-1), W.unflatten(1, (3, 16)).amax(-1))
    ends_are_levels = torch.isclose(still.zero.float(), -7 * low / (high - low), rtol=0, atol=2**-7)
    assert bool((torch.isclose(still.zero.float(), plain.zero.float(), rtol=0, atol=2**-8) | ends_are_levels).all())
    assert float((free.zero - plain.zero).abs().max()) > 0.02


# ---- what it promises ----


@pytest.mark.parametrize("short", EVERY)
def test_no_group_is_worse_than_rounded(short: str) -> None:
    W = weights(12, 192)
    # Both means are summed in float32.
    assert bool((mean_error(W, run(W, short)) <= mean_error(W, rounded(W, short)) * (1 + 1e-5)).all())


@pytest.mark.parametrize("short", ["w4a16g64", "w3a16g64-asym", "w3a16g64-asymf16", "nf4g64"])
def test_most_groups_gain(short: str) -> None:
    W = weights(12, 192)
    assert float((mean_error(W, run(W, short)) < mean_error(W, rounded(W, short))).float().mean()) > 0.5


@pytest.mark.parametrize("short", EVERY)
def test_without_a_step_it_is_rounding_to_nearest(short: str) -> None:
    W = weights(6, 192)
    assert torch.equal(run(W, short, steps=0).dequantize(), rounded(W, short).dequantize())


def test_eight_bits_leave_next_to_nothing_to_find() -> None:
    W, short = weights(12, 192), "w8a16g64-asymf16"
    assert float(mean_error(W, run(W, short)).sum()) > 0.8 * float(mean_error(W, rounded(W, short)).sum())


# ---- edges ----


@pytest.mark.parametrize("short", EVERY)
def test_edges_stay_finite(short: str) -> None:
    """A dead column, all-zero groups, a constant row, one output channel, a width of 192; tables and small scales too."""
    W = torch.cat([weights(1, 192), torch.full((1, 192), -2.0), torch.zeros(1, 192)])
    W[:, 64:128] = 0
    W[:, 5] = 0
    tensor = run(W, short)
    found = tensor.dequantize()
    assert bool(torch.isfinite(found).all())
    assert torch.equal(found[2], torch.zeros(192))
    if tensor.scheme.group is not None:
        assert torch.equal(found[:, 64:128], torch.zeros(3, 64))
    if short != "nvfp4":  # all groups of a tensor share a part of the scale there
        assert torch.equal(run(W[:1], short).dequantize(), found[:1])


def test_one_group_is_the_same_in_its_own_length_and_as_a_whole_row() -> None:
    W = weights(6, 96)
    for end in ("", "-asym", "-asymf16"):
        assert torch.equal(run(W, f"w4a16g96{end}").dequantize(), run(W, f"w4a16{end}").dequantize())


def test_columns_that_do_not_divide_are_refused() -> None:
    with pytest.raises(QtoolError, match="48 columns do not divide into groups of 32"):
        run(weights(4, 48), "w4a16g32")
