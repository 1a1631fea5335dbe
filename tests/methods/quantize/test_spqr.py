"""SpQR's choice against every weight left out in turn, its walk against GPTQ's, what outliers buy and cost, and its edges."""

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize, to_groups
from qtool.laws.linear import linear_problem
from qtool.linalg.column_rounding import without
from qtool.methods.quantize.gptq import GptqOptions, gptq
from qtool.methods.quantize.spqr import SpqrOptions, largest, sensitivity, spqr
from qtool.recipe import parse

SCHEMES = ["w3a16g32", "w2a16g32-asym", "w4a16", "nf4g32", "w3a16g32-asymf16", "w3a16g8-ic", "w3a16g32-dq"]


def problem(n_out: int = 24, n_in: int = 96) -> tuple[Tensor, LayerStats]:
    """Weights [out, in] with a long tail, and statistics of correlated inputs of uneven strength."""
    random = torch.Generator().manual_seed(0)
    mix = torch.randn(n_in, n_in, generator=random) * (0.1 + torch.rand(n_in, generator=random)) ** 2
    stats = LayerStats(n_in, ("hessian",))
    stats.update(torch.randn(300, n_in, generator=random) @ mix)
    W = torch.randn(n_out, n_in, generator=random)
    return W * (0.3 + torch.rand(n_out, n_in, generator=random) ** 8 * 6), stats


def run(W: Tensor, stats: LayerStats, short: str, **choices: object) -> QuantizedTensor:
    options = SpqrOptions.model_validate({"scheme": short, **choices})

    def refuse(text: str) -> None:
        raise AssertionError(f"noted: {text}")

    return spqr(W.clone(), stats, Scheme.model_validate(short).weights, options, refuse)


def loss(W: Tensor, tensor: QuantizedTensor, stats: LayerStats) -> float:
    E = (W - tensor.dequantize()).double()
    return float(((E @ stats.hessian().double()) * E).sum())


def places(tensor: QuantizedTensor) -> Tensor:
    """Which weights [out, in] are outliers."""
    found = torch.zeros(tensor.shape, dtype=torch.bool)
    if tensor.outliers is not None:
        rows = torch.repeat_interleave(torch.arange(len(found)), tensor.outliers.starts.diff())
        found[rows, tensor.outliers.columns.long()] = True
    return found


# ---- the golden of the choice: a group rounded once with all its weights, and once without each of them ----


@pytest.mark.parametrize("short", ["w3a16g16", "w2a16g16-asym", "w3a16g8-ic", "nf4g16", "e2m1g16-asymf16", "w2a16"])
def test_sensitivity_is_what_a_group_saves_when_a_weight_is_left_out(short: str) -> None:
    W, _ = problem(8, 32)
    W[2, :16] = 0.5  # a constant group: every weight is its least and its greatest
    W[3, 3] = W[3, 5] = 9.0  # two that are greatest together
    scheme = Scheme.model_validate(short).weights
    curvature = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    along_in = scheme.group_along == "in_channel"
    lines, weights = (W.T, curvature.unsqueeze(1).expand(32, 8)) if along_in else (W, curvature.expand(8, 32))
    group = scheme.group or lines.shape[1]
    grid = scheme.grid
    expected = torch.zeros(lines.shape, dtype=torch.float64)

    def error(w: Tensor, d: Tensor) -> float:
        return float((d * (grid.snap(w, grid.fit(w)) - w).square()).double().sum())

    for o in range(len(lines)):
        for start in range(0, lines.shape[1], group):
            w, d = lines[o, start : start + group], weights[o, start : start + group]
            for j in range(group):
                others = [k for k in range(group) if k != j]
                expected[o, start + j] = error(w, d) - error(w[others], d[others])
    found = sensitivity(W, scheme, curvature).double()
    # Differences of float32 sums of at most 32 weights.
    assert torch.allclose(found, expected.T if along_in else expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5])
def test_exactly_the_share_is_chosen_and_nothing_larger_is_left(share: float) -> None:
    score = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    chosen = largest(score, share)
    assert int(chosen.sum()) == round(share * score.numel())
    if share:
        assert float(score[chosen].min()) > float(score[~chosen].max())


def test_magnitude_takes_the_largest_weights_and_sensitivity_others() -> None:
    W, stats = problem()
    by_size, by_error = (places(run(W, stats, "w3a16g32", choice=choice)) for choice in ("magnitude", "sensitivity"))
    assert torch.equal(by_size, largest(W.abs(), 0.005)) and int(by_size.sum()) == round(0.005 * W.numel())
    assert int(by_error.sum()) == round(0.005 * W.numel()) and not torch.equal(by_size, by_error)


# ---- the golden of the walk: no factor, no update; later columns solved anew, in float64 ----


@pytest.mark.parametrize("choice", ["sensitivity", "magnitude"])
def test_codes_and_outliers_are_those_of_solving_all_later_columns_anew(choice: str) -> None:
    W, stats = problem(6, 48)
    scheme = {"weights": {"bits": 3, "group": 16, "symmetric": False, "scale_dtype": "float32"}}
    given = Scheme.model_validate(scheme).weights
    options = SpqrOptions.model_validate(
        {"scheme": scheme, "share": 0.03, "choice": choice, "act_order": "none", "range": "minmax"}
    )
    tensor = spqr(W.clone(), stats, given, options, print)
    is_outlier = places(tensor)
    assert int(is_outlier.sum()) == round(0.03 * W.numel())
    H = stats.hessian().double()
    H += 0.01 * H.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    for o in range(len(W)):
        w, current, settled = W[o].double(), W[o].double().clone(), W[o].double().clone()
        for c in range(48):
            start = c // 16 * 16
            if c == start:  # the range of what the group's other weights are by now
                inside = [float(current[k]) for k in range(start, start + 16) if not is_outlier[o, k]]
                least, most = min(*inside, 0.0), max(*inside, 0.0)
                zero = min(max(round(-least / (most - least) * 8 - 0.5), 0), 7)
                scale = float(torch.tensor(max(most / (7.5 - zero), -least / (zero + 0.5))))
            code = min(max(round(float(current[c]) / scale) + zero, 0), 7)
            assert int(tensor.codes[o, c]) == code, (o, c)
            settled[c] = scale * (code - zero)
            if is_outlier[o, c]:
                settled[c] += float((current[c] - settled[c]).half())
            left = list(range(c + 1, 48))
            if left:
                change = (settled - w)[: c + 1]
                current[left] = w[left] - torch.linalg.solve(H[left][:, left], H[left][:, : c + 1] @ change)
        # Scales and columns in float32, outliers rounded to eleven bits at values that differ in the last of 24.
        assert torch.allclose(tensor.dequantize()[o].double(), settled, rtol=0, atol=3e-3)


# ---- what it promises ----


@pytest.mark.parametrize("short", SCHEMES)
@pytest.mark.parametrize("choice", ["sensitivity", "magnitude"])
def test_without_outliers_it_is_gptq_to_the_bit(short: str, choice: str) -> None:
    W, stats = problem()
    tensor = run(W, stats, short, share=0.0, choice=choice)
    options = GptqOptions.model_validate({"scheme": short})
    expected = gptq(W.clone(), stats, Scheme.model_validate(short).weights, options, print)
    assert tensor.outliers is None
    assert torch.equal(tensor.codes, expected.codes) and torch.equal(tensor.dequantize(), expected.dequantize())


@pytest.mark.parametrize("short", SCHEMES)
@pytest.mark.parametrize("choice", ["sensitivity", "magnitude"])
def test_more_outliers_lose_less_and_take_the_bytes_they_are_stored_in(short: str, choice: str) -> None:
    law = linear_problem()
    stats = LayerStats(96, ("hessian",))
    stats.update(law.x)
    tensors = [run(law.W, stats, short, share=share, choice=choice) for share in (0.0, 0.01, 0.04, 0.16)]
    losses = [loss(law.W, tensor, stats) for tensor in tensors]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    for tensor, share in zip(tensors[1:], (0.01, 0.04, 0.16), strict=True):
        # Two bytes for a value, two for its column, four for where each row begins.
        assert tensor.stored_bytes == tensors[0].stored_bytes + 4 * round(share * 24 * 96) + 4 * 25


IN_ORDERS = [
    (short, order) for short in SCHEMES for order in ("static", "none", "group") if "-dq" not in short or order == "static"
]


@pytest.mark.parametrize(("short", "order"), IN_ORDERS)
def test_outliers_are_exact_but_for_float16(short: str, order: str) -> None:
    """Of inputs that do not correlate no error is passed on, so that each outlier must come back."""
    W, _ = problem()
    stats = LayerStats(96, ("hessian",))
    stats.update(torch.eye(96))
    tensor = run(W, stats, short, share=0.02, act_order=order)
    found = places(tensor)
    assert int(found.sum()) == round(0.02 * W.numel())
    # Half a unit in the eleventh digit of what the code leaves, which is smaller than the weight or a step.
    assert torch.allclose(tensor.dequantize()[found], W[found], rtol=2**-11, atol=2**-11)


def test_a_planted_weight_is_found_and_its_group_is_rounded_as_if_it_were_not_there() -> None:
    W, _ = problem()
    W = W.clamp(-1, 1)
    stats = LayerStats(96, ("hessian",))
    stats.update(torch.eye(96))
    calm = quantize(W, Scheme.model_validate("w4a16g32").weights)
    W[5, 40] = 100.0
    tensor = run(W, stats, "w4a16g32", share=1 / W.numel(), range="minmax")
    assert places(tensor).nonzero().tolist() == [[5, 40]]
    assert float(tensor.scale[5, 1]) <= float(calm.scale[5, 1])
    assert float(tensor.dequantize()[5, 40]) == pytest.approx(100, rel=2**-11)
    others = [k for k in range(32, 64) if k != 40]
    assert float((tensor.dequantize() - W)[5, others].abs().max()) <= 0.51 * float(tensor.scale[5, 1])


def test_what_is_left_out_becomes_the_mean_of_the_rest() -> None:
    w = torch.tensor([[[1.0, 2.0, 30.0, 3.0], [-50.0, 7.0, 8.0, 9.0], [1.0, 1.0, 1.0, 1.0]]])
    left_out = torch.tensor([[[False, False, True, False], [True, False, False, False], [True, True, True, True]]])
    assert without(w, left_out).tolist() == [[[1, 2, 2, 3], [8, 7, 8, 9], [0, 0, 0, 0]]]


# ---- edges ----


@pytest.mark.parametrize("order", ["static", "group"])
@pytest.mark.parametrize("short", ["w3a16g32", "w3a16g32-asym"])
def test_pruned_weights_stay_zero_and_a_group_may_be_all_outliers(order: str, short: str) -> None:
    W, stats = problem()
    W.view(24, 24, 4)[..., 1::2] = 0
    W[0, :32] = 50.0 + torch.arange(32)
    tensor = run(W, stats, short, share=0.1, act_order=order, choice="magnitude")
    assert bool(places(tensor)[0, :32].all())
    pruned = W == 0
    assert torch.equal(tensor.dequantize()[pruned], torch.zeros(int(pruned.sum())))
    assert not bool((places(run(W, stats, short, share=0.5)) & pruned).any())


def test_scales_that_are_quantized_themselves_are_known_beforehand() -> None:
    with pytest.raises(QtoolError, match="act_order: static"):
        run(*problem(), "w3a16g32-dq", act_order="none")


def test_dead_columns_one_row_and_a_width_that_is_no_power_of_two() -> None:
    W, stats = problem(1, 80)
    stats.hessian()[7], stats.hessian()[:, 7] = 0, 0
    tensor = run(W, stats, "w3a16g16-asym", share=0.1)
    assert tensor.shape == (1, 80) and bool(torch.isfinite(tensor.dequantize()).all())
    assert loss(W, tensor, stats) < loss(W, quantize(W, tensor.scheme), stats)


def test_a_linear_that_no_token_reached_is_rounded_beside_its_outliers_and_noted() -> None:
    W, _ = problem()
    notes: list[str] = []
    options = SpqrOptions.model_validate({"scheme": "w3a16g32", "share": 0.02})
    tensor = spqr(W.clone(), LayerStats(96, ("hessian",)), Scheme.model_validate("w3a16g32").weights, options, notes.append)
    assert notes == ["no calibration token reached it; rounded to nearest"]
    grouped, found = to_groups(tensor.dequantize() - W, tensor.scheme), to_groups(places(tensor), tensor.scheme)
    # Ranges of least error clip a few; the plain error is below that of rounding without outliers.
    plain = quantize(W, tensor.scheme).dequantize() - W
    assert float(grouped.square().sum()) < float(plain.square().sum()) and int(found.sum()) == round(0.02 * W.numel())


def test_an_export_that_cannot_hold_outliers_is_refused_with_the_recipe() -> None:
    steps = "  - calibrate/text: {source: demo:calibration}\n  - quantize/spqr: {scheme: w3a16g64}\n"
    with pytest.raises(QtoolError, match="r.yaml:5: export/compressed_tensors cannot hold the outliers of quantize/spqr"):
        parse(f"model: demo\npipeline:\n{steps}  - export/compressed_tensors: {{}}\n", "r.yaml")
    assert parse(f"model: demo\npipeline:\n{steps}  - export/safetensors: {{}}\n", "r.yaml").steps
