"""Rounding to nearest against a search over all codes, and ranges that follow what inputs see."""

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.linalg.ranges import FINE_STEPS, STEPS, plain_cost, search_range
from qtool.methods.quantize.rtn import METHOD, RtnOptions, rtn

SCHEMES = ["w2a16g16", "w3a16g16-asym", "w4a16", "w8a16-asym"]
RANGES = ["minmax", "mse", "hessian", "output"]


def problem(n_out: int = 6, n_in: int = 48) -> tuple[Tensor, Tensor]:
    """W [out, in] and x [tokens, in], correlated."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(n_in, n_in, generator=random) * torch.rand(n_in, generator=random) ** 2
    return torch.randn(n_out, n_in, generator=random), torch.randn(80, n_in, generator=random) @ mix


def statistics(x: Tensor) -> LayerStats:
    stats = LayerStats(x.shape[1], ("hessian",))
    stats.update(x)
    return stats


def run(W: Tensor, stats: LayerStats | None, short: str, choice: str = "minmax") -> QuantizedTensor:
    options = RtnOptions.model_validate({"scheme": short, "range": choice})
    notes: list[str] = []
    tensor = rtn(W.clone(), stats, Scheme.model_validate(short).weights, options, notes.append)
    assert notes == []
    return tensor


@pytest.mark.parametrize("short", SCHEMES)
@pytest.mark.parametrize("choice", RANGES)
def test_every_weight_gets_the_nearest_of_all_codes(short: str, choice: str) -> None:
    W, x = problem()
    tensor = run(W, statistics(x), short, choice)
    grid = tensor.scheme.grid
    group = tensor.scheme.group or 48
    scale = tensor.scale.double().repeat_interleave(group, 1)  # [out, in]
    zero = 0 if tensor.zero is None else tensor.zero.double().repeat_interleave(group, 1)
    distances = torch.stack([(W - scale * (code - zero)).abs() for code in range(grid.low, grid.high + 1)])
    chosen = (W - scale * (tensor.codes.double() - zero)).abs()
    assert torch.allclose(chosen, distances.amin(0), rtol=0, atol=1e-6)  # halfway, float32 division decides


def test_a_hand_worked_row() -> None:
    # Symmetric, 2 bits: scale = 3 / 1.5 = 2, levels -4, -2, 0, 2.
    tensor = run(torch.tensor([[3.0, -0.9, 1.1, -3.0, 0.0, 0.0, 0.0, 0.0]]), None, "w2a16g8")
    assert tensor.codes.tolist() == [[1, 0, 1, -2, 0, 0, 0, 0]]
    assert tensor.dequantize().tolist() == [[2.0, 0.0, 2.0, -4.0, 0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("short", SCHEMES)
def test_the_output_range_costs_no_more_output_than_any_other(short: str) -> None:
    W, x = problem()
    stats = statistics(x)
    group = Scheme.model_validate(short).weights.group or 48

    def partial_error(tensor: QuantizedTensor) -> float:
        """Mean over tokens of the squared error of each group's part of each output, summed."""
        E = (W - tensor.dequantize()).double().unflatten(1, (-1, group))  # [out, groups, group]
        parts = torch.einsum("tgj,ogj->tgo", x.double().unflatten(1, (-1, group)), E)
        return float(parts.square().mean(0).sum())

    errors = {choice: partial_error(run(W, stats, short, choice)) for choice in RANGES}
    assert errors["output"] <= min(errors.values()) * (1 + 1e-5)  # costs summed in float32


def test_data_is_asked_for_only_by_ranges_that_use_it() -> None:
    options = {choice: RtnOptions.model_validate({"scheme": "w4a16", "range": choice}) for choice in RANGES}
    needs = {choice: METHOD.needed(options[choice]) for choice in RANGES}
    assert needs == {"minmax": (), "mse": (), "hessian": ("hessian",), "output": ("hessian",)}


@pytest.mark.parametrize(("choice", "steps"), [("hessian", STEPS), ("output", FINE_STEPS)])
def test_a_linear_that_no_token_reached_is_searched_by_plain_error_and_noted(choice: str, steps: int) -> None:
    W, _ = problem()
    notes: list[str] = []
    options = RtnOptions.model_validate({"scheme": "w3a16g16", "range": choice})
    tensor = rtn(W, LayerStats(48, ("hessian",)), Scheme.model_validate("w3a16g16").weights, options, notes.append)
    params = search_range(W.view(6, 3, 16), tensor.scheme.grid, plain_cost, steps)
    assert torch.equal(tensor.codes, quantize(W, tensor.scheme, params).codes)
    assert notes == ["no calibration token reached it; its ranges are searched by plain error"]


@pytest.mark.parametrize("choice", RANGES)
@pytest.mark.parametrize("short", ["w4a16g64", "w4a16g64-asym", "w3a16"])
def test_edges_stay_finite(choice: str, short: str) -> None:
    """A dead column, an all-zero group, a constant row, one output channel, a width of 192."""
    W, x = problem(1, 192)
    W = torch.cat([W, torch.full((1, 192), -2.0), torch.zeros(1, 192)])
    W[:, 64:128] = 0
    x[:, 5] = 0
    tensor = run(W, statistics(x), short, choice)
    assert bool(torch.isfinite(tensor.dequantize()).all())
    assert torch.equal(tensor.dequantize()[:, 64:128], torch.zeros(3, 64))
    assert torch.equal(tensor.dequantize()[2], torch.zeros(192))
    alone = run(W[:1], statistics(x), short, choice)
    assert torch.equal(alone.codes, tensor.codes[:1])


def test_columns_that_do_not_divide_are_refused() -> None:
    W, _ = problem(4, 48)
    for choice in ("minmax", "mse"):
        with pytest.raises(QtoolError, match="48 columns do not divide into groups of 32"):
            run(W, None, "w4a16g32", choice)


def test_the_full_range_is_that_of_plain_quantize() -> None:
    W, _ = problem()
    scheme = Scheme.model_validate("w4a16g16-asym").weights
    assert torch.equal(run(W, None, "w4a16g16-asym").codes, quantize(W, scheme).codes)
