"""Joint pruning and rounding against GPTQ where nothing is pruned, and against a loop that solves anew for every column."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.methods.quantize.gptq import GptqOptions, gptq
from qtool.methods.quantize.sparsegpt import SparseGptOptions, sparsegpt

OUT, IN = 12, 32


def problem(seed: int = 0) -> tuple[Tensor, LayerStats]:
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(IN, IN, generator=random) / IN**0.5 + torch.eye(IN)
    stats = LayerStats(IN, ("hessian",))
    stats.update(torch.randn(256, IN, generator=random) @ mix)
    return torch.randn(OUT, IN, generator=random), stats


def run(scheme: str, seed: int = 0, **options: object) -> Tensor:
    W, stats = problem(seed)
    chosen = SparseGptOptions.model_validate({"scheme": scheme, **options})
    return sparsegpt(W, stats, Scheme.model_validate(scheme).weights, chosen, lambda text: None).dequantize()


@pytest.mark.parametrize("scheme", ["w4a16g16", "w3a16g8-asym", "nf4g16"])
def test_without_sparsity_it_is_gptq(scheme: str) -> None:
    W, stats = problem()
    weights = Scheme.model_validate(scheme).weights
    expected = gptq(W, stats, weights, GptqOptions.model_validate({"scheme": scheme}), lambda text: None)
    assert torch.equal(run(scheme), expected.dequantize())


def test_two_of_four_go_as_a_loop_over_columns_that_inverts_anew_says() -> None:
    """Optimal brain surgery, column by column: H⁻¹ of the columns that are left, inverted for each."""
    W, stats = problem()
    scheme = Scheme.model_validate("w4a16g16").weights
    H = stats.hessian().double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(IN)
    params = quantize(W, scheme).params()  # ranges of the full weights: minmax
    w, mask = W.double().clone(), torch.zeros(OUT, IN, dtype=torch.bool)
    for c in range(IN):
        inverse = torch.linalg.inv(H[c:, c:])
        if c % 4 == 0:
            # U_jj² of later columns: the first diagonal entry of the inverse once the columns before them are gone.
            pivots = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(c, c + 4)])
            order = (w[:, c : c + 4] ** 2 / pivots).argsort(dim=1)
            mask[:, c : c + 4].scatter_(1, order[:, :2], True)
        column = w.float().masked_fill(mask, 0)
        column = quantize(column, scheme, params).dequantize().double()[:, c]
        w[:, c:] -= ((w[:, c] - column) / inverse[0, 0])[:, None] * inverse[0]
        w[:, c] = column
    found = run("w4a16g16", pattern="2:4", range="minmax")
    assert float(((found - w.float()).abs() > 1e-5).float().mean()) < 0.02  # float32 may round a tie the other way
    assert torch.equal(found == 0, (found == 0) | mask)


@pytest.mark.parametrize("scheme", ["w4a16g16", "w4a16g16-asym"])
def test_the_share_of_zeros_is_kept(scheme: str) -> None:
    zeros = int((run(scheme, sparsity=0.5) == 0).sum())
    assert zeros >= OUT * IN // 2  # weights that round to zero come on top


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_loses_less_than_pruning_by_magnitude_and_rounding_after(seed: int) -> None:
    W, stats = problem(seed)
    H = stats.hessian()
    by_magnitude = W.masked_fill(W.abs() < W.abs().median(), 0)
    rounded = quantize(by_magnitude, Scheme.model_validate("w4a16g16").weights).dequantize()
    losses = [float((((W - Q) @ H) * (W - Q)).sum()) for Q in (run("w4a16g16", seed, sparsity=0.5), rounded)]
    assert losses[0] < losses[1]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(QtoolError, match="no level at zero"):
        run("binary", sparsity=0.5)
    with pytest.raises(ValidationError, match="use act_order: static"):
        SparseGptOptions(scheme="w4a16g16", sparsity=0.5, act_order="none")
    with pytest.raises(QtoolError, match="32 columns do not divide into patterns of 5"):
        run("w4a16g16", pattern="2:5")
