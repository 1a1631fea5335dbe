"""YAQA against the least squares of its whole objective solved anew after every weight, against GPTQ, and at its edges."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool import laws
from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.methods.quantize import yaqa as module
from qtool.methods.quantize.gptq import gptq
from qtool.methods.quantize.yaqa import METHOD, YaqaOptions, yaqa

NEEDS = ("hessian", "output_hessian", "drift")


def correlated(n: int, n_tokens: int, random: torch.Generator) -> Tensor:
    """Values [tokens, n] that move together, some far more than others."""
    return torch.randn(n_tokens, n, generator=random) @ (
        torch.randn(n, n, generator=random) * (0.1 + torch.rand(n, generator=random)) ** 2
    )


def problem(n_out: int, n_in: int, n_tokens: int = 300, seed: int = 0) -> tuple[Tensor, LayerStats]:
    """Weights [out, in], and statistics of correlated inputs and of correlated gradients by the outputs."""
    random = torch.Generator().manual_seed(seed)
    stats = LayerStats(n_in, NEEDS)
    x = correlated(n_in, n_tokens, random)
    stats.update(x, x + 0.1 * torch.randn(x.shape, generator=random))
    g = correlated(n_out, n_tokens, random)
    return torch.randn(n_out, n_in, generator=random), stats.of_output(g.T @ g / n_tokens)


def run(
    W: Tensor, stats: LayerStats, short: str, method: Callable[..., QuantizedTensor] = yaqa, **choices: object
) -> QuantizedTensor:
    options = YaqaOptions.model_validate({"scheme": short, **choices})

    def refuse(text: str) -> None:
        raise AssertionError(f"noted: {text}")

    return method(W.clone(), stats, Scheme.model_validate(short).weights, options, refuse)


def loss(W: Tensor, tensor: QuantizedTensor, stats: LayerStats) -> float:
    E, H_out = (W - tensor.dequantize()).double(), stats.output_hessian()
    assert H_out is not None
    return float(((E @ stats.hessian().double()) * (H_out.double() @ E)).sum())


# ---- the golden ----


def golden(W: Tensor, stats: LayerStats, tensor: QuantizedTensor) -> Tensor:
    """Codes [out, in] in the ranges of `tensor`, alpha 0.

    All weights are one vector v and the objective is v's quadratic form, Hₒ ⊗ H written out. Column after column, and in it
    row after row, a weight is rounded to nearest; then all that are left are solved anew, those of the least objective
    whose settled neighbours are what they were rounded to. No factor is taken and nothing is updated step by step.
    """
    H_out = stats.output_hessian()
    assert H_out is not None
    damped = [
        H.double() + damp * H.double().diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
        for H, damp in ((H_out, 0.3), (stats.hessian(), 0.01))
    ]
    F = torch.kron(*damped)  # [out * in, out * in]
    n_out, n_in = W.shape
    w = W.double().flatten()
    rows = sorted(range(n_out), key=lambda r: -float(H_out[r, r]))
    columns = sorted(range(n_in), key=lambda c: -float(stats.hessian()[c, c]))
    left, settled, codes = list(range(n_out * n_in)), [], torch.zeros(n_out * n_in, dtype=torch.int64)
    current, change = w.clone(), torch.zeros_like(w)
    group = tensor.scheme.group or n_in
    levels = torch.arange(tensor.grid.low, tensor.grid.high + 1, dtype=torch.float64)
    for c in columns:
        for r in rows:
            i, g = r * n_in + c, c // group
            zero = 0.0 if tensor.zero is None else float(tensor.zero[r, g])
            values = float(tensor.scale[r, g]) * (levels - zero)
            best = int((values - current[i]).abs().argmin())
            codes[i] = int(levels[best])
            change[i] = values[best] - w[i]
            left.remove(i)
            settled.append(i)
            if left:
                current[left] = w[left] - torch.linalg.solve(F[left][:, left], F[left][:, settled] @ change[settled])
    return codes.view(n_out, n_in)


@pytest.mark.parametrize("short", ["w3a16g8", "w4a16g8-asym", "w2a16-asym"])
@pytest.mark.parametrize(("n_out", "n_in"), [(6, 16), (9, 8), (1, 16)])
def test_codes_equal_those_of_solving_all_later_weights_anew(short: str, n_out: int, n_in: int) -> None:
    W, stats = problem(n_out, n_in)
    tensor = run(W, stats, short, alpha=0)
    assert torch.equal(tensor.codes.long(), golden(W, stats, tensor))


def test_the_golden_catches_a_wrong_factor_that_the_law_lets_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that pass on half of what they should: still better than rounding, and wrong."""
    right = module.sweep_both

    def half(columns: Tensor, U: Tensor, V: Tensor, *rest: object) -> None:
        right(columns, U, V.diagonal().diag() + 0.5 * V.triu(1), *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "sweep_both", half)
    W, stats = problem(6, 16)
    tensor = run(W, stats, "w3a16g8", alpha=0)
    assert not torch.equal(tensor.codes.long(), golden(W, stats, tensor))
    laws.linear.loss_is_no_worse_than_rounding(replace(METHOD, key="quantize/yaqa"))


# ---- what it promises ----


FORMATS = ("w4a16g32", "w3a16g32-asym", "w2a16g32-asym", "nvfp4", "nf4g32")
CASES = [(order, short) for order in ("none", "static", "group") for short in FORMATS]


@pytest.mark.parametrize(("act_order", "short"), [*CASES, ("static", "w4a16g32-dq")])
def test_the_loss_of_both_sides_is_below_that_of_gptq(act_order: str, short: str) -> None:
    W, stats = problem(48, 96)
    both, inputs_alone = (run(W, stats, short, method, alpha=0, act_order=act_order) for method in (yaqa, gptq))
    assert loss(W, both, stats) < 0.9 * loss(W, inputs_alone, stats)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("short", ["w4a16g32", "w3a16g32-asym", "mxfp4"])
def test_outputs_that_matter_alike_and_apart_leave_gptq(short: str, alpha: float) -> None:
    W, stats = problem(24, 96)
    stats = stats.of_output(2 * torch.eye(24))
    both, inputs_alone = (run(W, stats, short, method, alpha=alpha) for method in (yaqa, gptq))
    # The same sums in another order: a weight in the middle between two levels may go to the other.
    assert float((both.codes == inputs_alone.codes).float().mean()) > 0.99
    assert loss(W, both, stats) == pytest.approx(loss(W, inputs_alone, stats), rel=1e-2)


def test_permuting_outputs_together_with_their_gradients_permutes_the_codes() -> None:
    W, stats = problem(24, 32)
    H_out, permutation = stats.output_hessian(), torch.randperm(24, generator=torch.Generator().manual_seed(1))
    assert H_out is not None
    permuted = run(W[permutation], stats.of_output(H_out[permutation][:, permutation]), "w3a16g32")
    assert torch.equal(permuted.codes, run(W, stats, "w3a16g32").codes[permutation])


# ---- edges ----


def test_a_head_without_gradients_of_its_own_is_rounded_by_gptq() -> None:
    W, stats = problem(24, 64)
    stats = stats.of_output(None)
    assert torch.equal(run(W, stats, "w3a16g32").codes, run(W, stats, "w3a16g32", gptq).codes)


def test_outputs_that_nothing_depends_on_are_rounded_by_their_inputs() -> None:
    W, stats = problem(24, 64)
    stats = stats.of_output(torch.zeros(24, 24))
    both, inputs_alone = (run(W, stats, "w4a16g32", method) for method in (yaqa, gptq))
    assert float((both.codes == inputs_alone.codes).float().mean()) > 0.99


def test_a_dead_output_disturbs_no_other() -> None:
    W, stats = problem(24, 64)
    H_out = stats.output_hessian()
    assert H_out is not None
    H_out[5], H_out[:, 5] = 0, 0
    codes = run(W, stats, "w3a16g32").codes
    W[5] *= -1.7
    others = [row for row in range(24) if row != 5]
    assert torch.equal(run(W, stats, "w3a16g32").codes[others], codes[others])


@pytest.mark.parametrize("act_order", ["none", "static", "group"])
def test_weights_that_were_pruned_stay_zero(act_order: str) -> None:
    W, stats = problem(8, 96)
    W.view(8, 24, 4)[..., 1::2] = 0
    tensor = run(W, stats, "w3a16g32-asym", act_order=act_order)
    assert torch.equal(tensor.dequantize().view(8, 24, 4)[..., 1::2], torch.zeros(8, 24, 2))


def test_a_linear_that_no_token_reached_is_rounded_and_noted() -> None:
    W, _ = problem(8, 64)
    notes: list[str] = []
    scheme = Scheme.model_validate("w4a16g32").weights
    options = YaqaOptions.model_validate({"scheme": "w4a16g32", "range": "minmax"})
    tensor = yaqa(W.clone(), LayerStats(64, NEEDS).of_output(torch.zeros(8, 8)), scheme, options, notes.append)
    assert torch.equal(tensor.codes, quantize(W, scheme).codes)
    assert notes == ["no calibration token reached it; rounded to nearest"]


def test_gradients_that_are_not_finite_are_refused() -> None:
    W, stats = problem(8, 64)
    with pytest.raises(QtoolError, match="NaN or infinity"):
        run(W, stats.of_output(torch.full((8, 8), float("nan"))), "w4a16g32")


def test_groups_of_input_channels_and_codes_of_many_columns_are_refused() -> None:
    W, stats = problem(8, 64)
    with pytest.raises(QtoolError, match="use quantize/gptq"):
        run(W, stats, "w3a16g8-ic")
    with pytest.raises(QtoolError, match="use quantize/lattice"):
        run(W, stats, "e8p")
