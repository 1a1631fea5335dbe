"""AdaDim against both dimensions rounded weight by weight, where an input stands out, and at its edges."""

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.methods.quantize.ada_dim import AdaDimOptions, ada_dim, round_to_nearest
from qtool.methods.quantize.gptq import GptqOptions, gptq
from qtool.recipe import parse


def problem(n_out: int = 16, n_in: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [out, in] and inputs [tokens, in], correlated and of uneven strength."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_in, n_in, generator=random) * (0.1 + torch.rand(n_in, generator=random)) ** 2
    return torch.randn(n_out, n_in, generator=random), torch.randn(200, n_in, generator=random) @ mix


def with_a_strong_input(n_out: int = 16, n_in: int = 48) -> tuple[Tensor, Tensor]:
    """The same with one input a hundred times as strong, whose weights are smaller than their neighbours for that."""
    W, x = problem(n_out, n_in)
    x[:, 7] *= 100
    W[:, 7] /= 20
    return W, x


def statistics(x: Tensor) -> LayerStats:
    stats = LayerStats(x.shape[1], ("hessian",))
    stats.update(x)
    return stats


def run(W: Tensor, x: Tensor, scheme: object, notes: list[str] | None = None, **choices: object) -> QuantizedTensor:
    options = AdaDimOptions.model_validate({"scheme": scheme, **choices})
    heard: list[str] = [] if notes is None else notes
    tensor = ada_dim(W.clone(), statistics(x), Scheme.model_validate(scheme).weights, options, heard.append)
    assert notes is not None or heard == []
    return tensor


def output_error(W: Tensor, x: Tensor, rounded: Tensor) -> float:
    """Squared error of the outputs themselves, in float64."""
    return float((x.double() @ (rounded - W).double().T).square().sum())


# ---- the golden: both dimensions, group by group in Python's floats ----


def golden(W: Tensor, along: str, bits: int, group: int, symmetric: bool) -> Tensor:
    """W [out, in] rounded in full ranges with float32 scales; a group is a run of weights of one output or one input."""
    lines = W.tolist() if along == "out_channel" else W.T.tolist()
    for line in lines:
        for start in range(0, len(line), group):
            part = line[start : start + group]
            least, most = min(*part, 0.0), max(*part, 0.0)
            half, last = 2 ** (bits - 1), 2**bits - 1
            if symmetric:
                zero, scale = 0, max(max(-least, most) / (half + 0.5), min(-least, most) / (half - 0.5))
            else:
                zero = min(max(round(-least / (most - least) * (last + 1) - 0.5), 0), last)
                scale = max(most / (last - zero + 0.5), -least / (zero + 0.5))
            scale = float(torch.tensor(-scale if symmetric and most > -least else scale))
            low = -half if symmetric else 0
            for i, w in enumerate(part):
                # By a float32 division, as the largest weight of a group may lie just half way; then the even code.
                code = round(float(torch.tensor(w) / torch.tensor(scale))) + zero
                line[start + i] = scale * (min(max(code, low), low + 2**bits - 1) - zero)
    rounded = torch.tensor(lines)
    return rounded if along == "out_channel" else rounded.T


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_rounding_kept_is_that_of_the_dimension_whose_outputs_are_off_by_less(seed: int, symmetric: bool) -> None:
    W, x = problem(seed=seed)
    W *= (1 + torch.arange(48) % 5) if seed % 2 else (1 + torch.arange(16) % 5).unsqueeze(1)
    scheme = {"weights": {"bits": 3, "group": 16, "symmetric": symmetric, "scale_dtype": "float32"}}
    tensor = run(W, x, scheme, quantizer="rtn", range="minmax")
    both = {along: golden(W, along, 3, 16, symmetric) for along in ("out_channel", "in_channel")}
    errors = {along: output_error(W, x, rounded) for along, rounded in both.items()}
    best = min(errors, key=lambda along: errors[along])
    assert tensor.scheme.group_along == best
    # Sums of float32; a weight half way between two levels may go to either.
    assert output_error(W, x, tensor.dequantize()) == pytest.approx(min(errors.values()), rel=1e-3)


def test_the_cases_of_the_golden_take_either_dimension() -> None:
    chosen = set()
    for seed in range(2):
        W, x = problem(seed=seed)
        W *= (1 + torch.arange(48) % 5) if seed % 2 else (1 + torch.arange(16) % 5).unsqueeze(1)
        chosen.add(run(W, x, "w3a16g16", quantizer="rtn", range="minmax").scheme.group_along)
    assert chosen == {"out_channel", "in_channel"}


# ---- what it promises ----


@pytest.mark.parametrize("choice", ["minmax", "mse", "hessian"])
@pytest.mark.parametrize("short", ["w3a16g16", "w3a16g16-asym", "w4a16", "nf4g16"])
def test_the_error_is_the_lesser_of_both_dimensions(choice: str, short: str) -> None:
    for W, x in (problem(), with_a_strong_input()):
        H = statistics(x).hessian()
        kept = run(W, x, short, quantizer="rtn", range=choice)
        options = AdaDimOptions.model_validate({"scheme": short, "range": choice})
        errors = []
        for along in ("out_channel", "in_channel"):
            scheme = kept.scheme.model_copy(update={"group_along": along})
            errors.append(output_error(W, x, round_to_nearest(W, H, scheme, options).dequantize()))
        assert output_error(W, x, kept.dequantize()) == pytest.approx(min(errors), rel=1e-9)


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
@pytest.mark.parametrize("short", ["w3a16g16", "w3a16g16-asym", "w4a16g16"])
def test_an_input_that_stands_out_gets_scales_of_its_own_and_loses_less(quantizer: str, short: str) -> None:
    W, x = with_a_strong_input()
    tensor = run(W, x, short, quantizer=quantizer)
    assert tensor.scheme.group_along == "in_channel" and tensor.scale.shape == (48, 1)
    plain = quantize(W, Scheme.model_validate(short).weights)
    assert output_error(W, x, tensor.dequantize()) < 0.5 * output_error(W, x, plain.dequantize())


@pytest.mark.parametrize("short", ["w3a16g16", "w3a16g16-asym"])
@pytest.mark.parametrize("strong", [False, True])
def test_with_gptq_it_is_gptq_in_the_chosen_dimension(short: str, strong: bool) -> None:
    W, x = with_a_strong_input() if strong else problem()
    tensor = run(W, x, short)
    ending = "-ic" if tensor.scheme.group_along == "in_channel" else ""
    options = GptqOptions.model_validate({"scheme": f"{short}{ending}"})
    expected = gptq(W.clone(), statistics(x), tensor.scheme, options, print)
    assert ending == "-ic" or not strong
    assert torch.equal(tensor.codes, expected.codes) and torch.equal(tensor.scale, expected.scale)


def test_gptq_along_inputs_rounds_every_column_at_its_own_turn() -> None:
    """The golden of the second dimension: errors of a column reach the next before its ranges are fitted."""
    W, x = problem()
    H = statistics(x).hessian().double()
    H += 0.01 * H.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    scheme = {"weights": {"bits": 3, "group": 16, "group_along": "in_channel", "symmetric": False, "scale_dtype": "float32"}}
    options = GptqOptions.model_validate({"scheme": scheme, "range": "minmax", "act_order": "none"})
    tensor = gptq(W.clone(), statistics(x), Scheme.model_validate(scheme).weights, options, print)
    current, settled = W.double(), W.double().clone()
    for c in range(48):
        settled[:, c] = golden(current[:, c].float().unsqueeze(0), "out_channel", 3, 16, False).double()
        left = list(range(c + 1, 48))
        change = (settled - W.double())[:, : c + 1]  # [out, settled]
        if left:  # those weights of least error while the settled ones stay
            current[:, left] = W.double()[:, left] - torch.linalg.solve(H[left][:, left], H[left][:, : c + 1] @ change.T).T
    # Scales in float32 of columns in float32; one step of a code is 0.3 and more.
    assert torch.allclose(tensor.dequantize().double(), settled, rtol=0, atol=1e-4)


# ---- edges ----


def test_rows_that_do_not_divide_leave_one_dimension_and_a_note() -> None:
    W, x = with_a_strong_input(n_out=10)
    notes: list[str] = []
    assert run(W, x, "w3a16g16", notes).scheme.group_along == "out_channel"
    assert notes == ["10 rows do not divide into groups of 16; groups along out_channel"]


def test_columns_that_do_not_divide_are_refused() -> None:
    W, x = problem(n_out=32)
    with pytest.raises(QtoolError, match="48 columns do not divide into groups of 32"):
        run(W, x, "w3a16g32")


def test_whole_rows_compete_with_whole_columns() -> None:
    W, x = with_a_strong_input()
    tensor = run(W, x, "w3a16")
    assert tensor.scheme.group_along == "in_channel" and tensor.scale.shape == (48, 1)


def test_a_linear_that_no_token_reached_is_rounded_along_outputs_and_noted() -> None:
    W, _ = problem()
    notes: list[str] = []
    options = AdaDimOptions.model_validate({"scheme": "w3a16g16", "range": "minmax"})
    scheme = Scheme.model_validate("w3a16g16").weights
    tensor = ada_dim(W.clone(), LayerStats(48, ("hessian",)), scheme, options, notes.append)
    assert torch.equal(tensor.codes, quantize(W, scheme).codes)
    assert notes == ["no calibration token reached it; groups along out_channel"]


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_a_dead_input_a_row_of_zeros_and_one_output_stay_finite(quantizer: str) -> None:
    W, x = problem()
    x[:, 5], W[3] = 0, 0
    tensor = run(W, x, "w3a16g16-asym", quantizer=quantizer)
    assert bool(torch.isfinite(tensor.dequantize()).all())
    one = run(W[:1], x, "w3a16", quantizer=quantizer)
    assert one.shape == (1, 48) and bool(torch.isfinite(one.dequantize()).all())


def test_scales_that_are_quantized_themselves_go_with_rounding_alone() -> None:
    W, x = problem()
    assert run(W, x, "w3a16g16-dq", quantizer="rtn").second is not None
    with pytest.raises(QtoolError, match="leave -dq away, or quantizer: rtn"):
        run(W, x, "w3a16g16-dq")


def test_an_export_that_holds_no_groups_along_inputs_is_refused_with_the_recipe() -> None:
    steps = "  - calibrate/text: {source: demo:calibration}\n  - quantize/ada_dim: {scheme: w3a16g64}\n"
    with pytest.raises(QtoolError) as refused:
        parse(f"model: demo\npipeline:\n{steps}  - export/compressed_tensors: {{}}\n", "r.yaml")
    expected = "r.yaml:5: export/compressed_tensors cannot hold the groups along in_channel of quantize/ada_dim"
    assert str(refused.value).startswith(expected)
    assert parse(f"model: demo\npipeline:\n{steps}  - export/safetensors: {{}}\n", "r.yaml").steps
