"""FineQuant against its rule written out, on weights with and without outliers, and at its edges."""

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.methods.quantize.fine_quant import FineQuantOptions, fine_quant


def normal(n_out: int = 16, n_in: int = 2048, seed: int = 0) -> Tensor:
    return torch.randn(n_out, n_in, generator=torch.Generator().manual_seed(seed))


def with_outliers(share: float = 0.002, n_in: int = 2048) -> Tensor:
    """Normal weights, a share of them twenty times as large."""
    W = normal(n_in=n_in)
    chosen = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < share
    return torch.where(chosen, 20 * W, W)


def run(W: Tensor, short: str, **choices: object) -> QuantizedTensor:
    options = FineQuantOptions.model_validate({"scheme": short, **choices})

    def refuse(text: str) -> None:
        raise AssertionError(f"noted: {text}")

    return fine_quant(W.clone(), None, Scheme.model_validate(short).weights, options, refuse)


def group_of(tensor: QuantizedTensor) -> int:
    return tensor.scheme.group or tensor.shape[1]


def golden(W: Tensor, group: int, smallest: int, tau: float, symmetric: bool) -> int:
    """The group that the rule of the paper ends at, ranges group by group in Python's floats."""

    def mean_range(size: int) -> float:
        ranges = []
        for row in W.tolist():
            for start in range(0, len(row), size):
                part = row[start : start + size]
                ranges.append(max(map(abs, part)) if symmetric else max(part) - min(part))
        return sum(ranges) / len(ranges)

    while group // 2 >= smallest and group % 2 == 0 and mean_range(group // 2) < tau * mean_range(group):
        group //= 2
    return group


@pytest.mark.parametrize("tau", [0.0, 0.8, 0.9, 0.94, 1.0])
@pytest.mark.parametrize("ending", ["", "-asym"])
@pytest.mark.parametrize("n_in", [1024, 1536, 1000])
def test_the_group_is_that_of_the_rule_written_out(tau: float, ending: str, n_in: int) -> None:
    for W in (normal(4, n_in), with_outliers(n_in=n_in)[:4]):
        tensor = run(W, f"w4a16{ending}", tau=tau, smallest=16)
        assert group_of(tensor) == golden(W, n_in, 16, tau, ending == "")
        assert torch.equal(tensor.codes, quantize(W, tensor.scheme).codes)


def test_weights_without_outliers_stop_at_once_and_those_with_them_end_finer() -> None:
    assert run(normal(), "w4a16").scheme.group is None
    fine = run(with_outliers(), "w4a16")
    assert group_of(fine) <= 512
    coarse = quantize(with_outliers(), Scheme.model_validate("w4a16").weights)
    errors = [(tensor.dequantize() - with_outliers()).square().sum() for tensor in (fine, coarse)]
    assert float(errors[0]) < 0.8 * float(errors[1])
    assert fine.bits_per_weight > coarse.bits_per_weight


@pytest.mark.parametrize("W", [normal(), with_outliers(), with_outliers(0.02)], ids=["normal", "few", "many"])
@pytest.mark.parametrize("short", ["w4a16", "w3a16-asym", "nf4"])
def test_a_smaller_tau_never_gives_a_finer_group(W: Tensor, short: str) -> None:
    groups = [group_of(run(W, short, tau=tau, smallest=8)) for tau in (0.5, 0.8, 0.9, 0.95, 0.98, 1.0)]
    assert groups == sorted(groups, reverse=True) and groups[0] > groups[-1]


def test_the_schemes_own_group_is_the_coarsest_and_smallest_the_finest() -> None:
    assert group_of(run(normal(), "w4a16g256", tau=0)) == 256
    assert group_of(run(normal(), "w4a16g256", tau=1)) == 64
    assert group_of(run(normal(), "w4a16g256", tau=1, smallest=100)) == 128
    assert group_of(run(normal(), "w4a16g32", tau=1)) == 32  # finer than smallest from the beginning


def test_only_groups_that_divide_are_taken() -> None:
    assert group_of(run(normal(4, 1000), "w4a16", tau=1, smallest=8)) == 125
    assert group_of(run(normal(4, 1000), "w4a16", tau=1, smallest=200)) == 250
    with pytest.raises(QtoolError, match="1000 columns do not divide into groups of 128"):
        run(normal(4, 1000), "w4a16g128")


def test_searched_ranges_lose_less() -> None:
    W = with_outliers()
    losses = [float((run(W, "w3a16", range=choice).dequantize() - W).abs().pow(2.4).sum()) for choice in ("mse", "minmax")]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("short", ["w4a16", "w4a16-asym", "w4a16-ic", "nf4", "w4a16-dq"])
def test_weights_of_zero_and_dead_columns_end(short: str) -> None:
    W = normal(64, 256)
    W[:, 5] = 0
    assert bool(torch.isfinite(run(W, short, smallest=8).dequantize()).all())
    assert torch.equal(run(torch.zeros(64, 256), short, smallest=8).dequantize(), torch.zeros(64, 256))
