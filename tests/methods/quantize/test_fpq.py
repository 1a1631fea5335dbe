"""FPQ against the search written out token by token in float64, what it promises, and what it refuses."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool import registry
from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.codebook import splits
from qtool.formats.scheme import ActivationScheme, Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.methods.quantize.fpq import FpqOptions, fpq
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.linear_scope import change_linears
from qtool.pipeline.work import Work
from qtool.recipe import parse

TOP = {"e1m2": 1.75, "e2m1": 6.0, "e3m0": 16.0}


def problem(seed: int, n_out: int = 6, n_in: int = 32, tokens: int = 60) -> tuple[Tensor, Tensor]:
    """Weights [out, in] with a few far out, and inputs [tokens, in] of uneven strength."""
    random = torch.Generator().manual_seed(seed)
    W = torch.randn(n_out, n_in, generator=random)
    W = W * W.abs() if seed % 2 else W
    x = torch.randn(tokens, n_in, generator=random) * torch.linspace(0.2, 3, n_in) ** (1 + seed % 3)
    return W, x


def run(
    W: Tensor, x: Tensor, scheme: object, notes: list[str] | None = None
) -> tuple[QuantizedTensor, ActivationScheme | None]:
    stats, asked = LayerStats(x.shape[1], ("sample",)), Scheme.model_validate(scheme)
    stats.update(x)
    heard: list[str] = [] if notes is None else notes
    found = fpq(W.clone(), stats, asked, FpqOptions.model_validate({"scheme": scheme}), heard.append)
    assert notes is not None or heard == []
    return found


def loss(W: Tensor, x: Tensor, tensor: QuantizedTensor, inputs: ActivationScheme | None) -> float:
    rounded = x if inputs is None else snap_inputs(x, inputs)
    return float((rounded @ tensor.dequantize().T - x @ W.T).square().sum())


# ---- the golden ----


def rounded(value: float, top: float, name: str) -> float:
    """value as a float of the format whose largest is `top`, by exponents and steps, not by a table."""
    exponent, mantissa = int(name[1]), int(name[3])
    scale, bias = top / TOP[name], {"e1m2": 1, "e2m1": 1, "e3m0": 3}[name]
    size = min(abs(value) / scale, TOP[name])
    if size == 0:
        return 0.0
    power = min(max(math.floor(math.log2(size)), 1 - bias), 2**exponent - 1 - bias)
    step = 2.0 ** (power - mantissa)
    if exponent == 3 and size >= 2.0 ** (1 - bias):  # no mantissa: the nearest of two powers
        step = 2.0**power
    return math.copysign(min(round(size / step) * step, TOP[name]) * scale, value)


def row_rounded(row: list[float], top: float, name: str) -> list[float]:
    return [rounded(value, top, name) for value in row]


def golden(W: Tensor, x: Tensor) -> tuple[str, str, list[list[float]]]:
    """Formats of weights and inputs, and the weights, found from e2m1 for both by turns, whole rows with one scale."""
    names = ("e2m1", "e3m0", "e1m2")
    weights, tokens = W.double().tolist(), x.double().tolist()
    outputs = (x.double() @ W.double().T).tolist()
    seen = {a: torch.tensor([row_rounded(t, max(map(abs, t)), a) for t in tokens], dtype=torch.float64) for a in names}

    def losses_of(rows: list[list[float]], a: str) -> list[float]:
        errors = seen[a] @ torch.tensor(rows, dtype=torch.float64).T - torch.tensor(outputs, dtype=torch.float64)
        return [float(column) for column in errors.square().sum(0)]  # one for each row

    def best_rows(a: str) -> tuple[str, list[list[float]]]:
        found = {}
        for f in names:
            choices = []
            for step in range(8, 25):
                tops = [max(map(abs, row)) * step / 20 for row in weights]
                rows = [row_rounded(row, top, f) for row, top in zip(weights, tops, strict=True)]
                choices.append(list(zip(losses_of(rows, a), rows, strict=True)))
            found[f] = [min(of_row, key=lambda pair: pair[0]) for of_row in zip(*choices, strict=True)]
        best = min(found, key=lambda f: sum(pair[0] for pair in found[f]))
        return best, [pair[1] for pair in found[best]]

    a = "e2m1"
    for _ in range(3):
        f, rows = best_rows(a)
        before, a = a, min(names, key=lambda a: sum(losses_of(rows, a)))
        if a == before:
            break
    return f, a, rows


@pytest.mark.parametrize("seed", range(3))
def test_formats_and_weights_are_those_of_the_search_written_out(seed: int) -> None:
    W, x = problem(seed)
    scheme = {"weights": {"format": "e2m1", "scale_dtype": "float32"}, "activations": {"format": "e2m1"}}
    tensor, inputs = run(W, x, scheme)
    f, a, rows = golden(W, x)
    assert inputs is not None and (tensor.scheme.format, inputs.format) == (f, a)
    # A weight half way between two levels may go to either.
    assert float((tensor.dequantize().double() - torch.tensor(rows)).abs().gt(1e-5).float().mean()) < 0.02


def test_the_cases_of_the_golden_choose_different_formats() -> None:
    chosen = {golden(*problem(seed))[:2] for seed in range(3)}
    assert len(chosen) > 1


# ---- what it promises ----


@pytest.mark.parametrize("short", ["e2m1-ae2m1", "e3m0g16-ae1m2", "mxfp4-amxfp4", "e2m1g16-aint8", "e4m3-ae5m2", "nvfp4"])
def test_the_outputs_error_is_never_above_that_of_rounding_in_the_schemes_own_formats(short: str) -> None:
    for seed in range(3):
        W, x = problem(seed)
        asked = Scheme.model_validate(short)
        tensor, inputs = run(W, x, short)
        plain = loss(W, x, quantize(W, asked.weights), asked.activations)
        assert loss(W, x, tensor, inputs) <= plain * (1 + 1e-5)
        assert tensor.scheme == asked.weights.model_copy(update={"format": tensor.scheme.format})
        if asked.activations is None or asked.activations.format == "int":
            assert inputs == asked.activations
        else:
            assert inputs is not None and inputs.format in splits(asked.activations.format)


def test_even_weights_take_even_levels_and_powers_take_powers() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(100, 64, generator=random)
    even = torch.randint(-7, 8, (8, 64), generator=random).float()
    powers = torch.randint(0, 7, (8, 64), generator=random).float().exp2() * torch.randn(8, 64, generator=random).sign()
    even[:, 0], powers[:, 0] = 7, 64
    scheme = {"weights": {"format": "e2m1", "scale_dtype": "float32"}}
    for W, name in ((even, "e1m2"), (powers, "e3m0")):
        tensor, inputs = run(W, x, scheme)
        assert tensor.scheme.format == name and inputs is None
        assert torch.allclose(tensor.dequantize(), W)


# ---- edges ----


def test_a_linear_that_no_token_reached_is_rounded_in_the_formats_of_the_scheme() -> None:
    W, _ = problem(0)
    notes: list[str] = []
    tensor, inputs = run(W, torch.zeros(0, 32), "e3m0-ae3m0", notes)
    assert torch.equal(tensor.codes, quantize(W, tensor.scheme).codes) and tensor.scheme.format == "e3m0"
    assert inputs is not None and inputs.format == "e3m0" and len(notes) == 1


def test_a_dead_input_and_a_row_of_zeros_stay_finite() -> None:
    W, x = problem(1)
    x[:, 5], W[3] = 0, 0
    tensor, _ = run(W, x, "e2m1-ae2m1")
    assert bool(torch.isfinite(tensor.dequantize()).all()) and bool((tensor.dequantize()[3] == 0).all())


@pytest.mark.parametrize("scheme", ["w4a4", "nf4g64", "e2m1g32-asymf16", "e2m1g32-ic"])
def test_what_has_no_other_split_is_refused(scheme: str) -> None:
    W, x = problem(0)
    with pytest.raises(QtoolError, match="chooses among floats .* write a scheme such as e2m1-ae2m1"):
        run(W, x, scheme)


def test_recipes_that_could_not_hold_or_search_the_formats_are_refused_before_any_work() -> None:
    head = "model: demo\npipeline:\n  - calibrate/text: {source: demo:calibration}\n"
    steps = "  - quantize/fpq: {scheme: mxfp4}\n  - export/compressed_tensors: {}\n"
    with pytest.raises(QtoolError, match="export/compressed_tensors cannot hold the formats chosen by linear of quantize/fpq"):
        parse(head + steps, "r.yaml")


def test_a_linears_own_formats_are_what_its_layer_runs_with_and_what_is_stored(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    block, work = model.block(0), Work({})
    names = tuple(f"{block.name}.mlp.{which}_proj" for which in ("gate", "up"))
    stats = LayerStats(64, ("sample",))
    stats.update(torch.randn(50, 64, generator=torch.Generator().manual_seed(0)))
    options = FpqOptions.model_validate({"scheme": "e3m0-ae3m0"})
    change_linears(block, names, stats, registry.load("quantize/fpq"), options, work, {}, {})
    for name in names:
        layer, stored = block.get(name), work.changes[f"{name}.weight"]
        assert isinstance(layer, QuantLinear) and layer.activations is not None and isinstance(stored, tuple)
        assert layer.scheme.format != "e3m0" and layer.activations.format != "e3m0"  # normal numbers want a mantissa
        assert (stored[1].weights, stored[1].activations) == (layer.scheme, layer.activations)
    assert {row["scheme"] for row in work.linears} == {str(work.changes[f"{name}.weight"][1]) for name in names}  # type: ignore[index]
