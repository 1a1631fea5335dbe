"""Calibration error: its definition by loops, certain and ignorant models, and an error of its own from windows."""

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.artifact import Metric
from qtool.calibration.windows import read_windows
from qtool.errors import QtoolError
from qtool.methods.evaluate.calibration_error import (
    METHOD,
    CalibrationErrorOptions,
    bin_sums,
    calibration_error,
    expected_error,
)
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = CalibrationErrorOptions(source="demo:test", samples=6, length=48, bins=10)


def by_name(metrics: list[Metric]) -> dict[str, Metric]:
    return {one.name: one for one in metrics if one.part is None}


def test_it_is_the_definition_on_the_demo_model() -> None:
    model = ModelHandle(ModelOptions(path="demo", dtype="float32"))
    every = calibration_error(model, model, TEXT, 0)
    found = by_name(every)
    tokens = read_windows(TEXT, model.tokenizer, 0).tokens
    plain = AutoModelForCausalLM.from_pretrained(model.folder, dtype=torch.float32).eval()
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    with torch.no_grad():
        for window in tokens:
            p = plain(window[None]).logits[0, :-1].softmax(-1)
            for row, label in zip(p, window[1:], strict=True):
                bins[min(int(float(row.max()) * 10), 9)].append((float(row.max()), int(row.argmax()) == int(label)))
    n = sum(map(len, bins))
    gaps = [abs(sum(right for _, right in one) - sum(sure for sure, _ in one)) for one in bins]
    assert found["calibration_error"].value == pytest.approx(sum(gaps) / n, abs=1e-4)  # a position may change its bin
    assert found["accuracy"].value == pytest.approx(sum(right for one in bins for _, right in one) / n, abs=1e-9)
    assert found["confidence"].value == pytest.approx(sum(sure for one in bins for sure, _ in one) / n, rel=1e-4)
    diagram = {one.part for one in every if one.name == "accuracy" and one.part is not None}
    assert diagram == {f"confidence: {i / 10:.2f}-{(i + 1) / 10:.2f}" for i in range(10) if bins[i]}


def test_a_model_that_knows_nothing_is_well_calibrated(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    torch.nn.init.zeros_(plain.lm_head.weight)
    plain.save_pretrained(folder)
    model = ModelHandle(ModelOptions(path=str(folder)))
    found = by_name(calibration_error(model, model, TEXT, 0))
    assert found["confidence"].value == pytest.approx(1 / 4096)
    assert found["calibration_error"].value == pytest.approx(abs(found["accuracy"].value - 1 / 4096), rel=1e-6)


def test_certainty_that_is_wrong_costs_one() -> None:
    logits = torch.zeros(5, 7)
    logits[:, 3] = 100.0
    assert expected_error(bin_sums(logits, torch.tensor([0, 1, 2, 4, 5]), 15)) == pytest.approx(1.0)
    assert expected_error(bin_sums(logits, torch.full((5,), 3), 15)) == pytest.approx(0.0)


def test_the_jackknifes_error_is_about_the_bootstraps() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    options = TEXT.model_copy(update={"samples": 40, "length": 32})
    metric = by_name(calibration_error(model, model, options, 0))["calibration_error"]
    windows = read_windows(options, model.tokenizer, 0)
    hidden = model.final_hidden(windows.tokens)
    with model.outer(), torch.no_grad():
        pairs = zip(hidden.split(1), windows.tokens, strict=True)
        sums = torch.stack([bin_sums(model.logits(sample)[0, :-1], ids[1:], 10) for sample, ids in pairs])
    random = torch.Generator().manual_seed(0)
    draws = [expected_error(sums[torch.randint(40, (40,), generator=random)].sum(0)) for _ in range(300)]
    assert metric.stderr == pytest.approx(statistics.stdev(draws), rel=0.5)  # absolute values bend it, forty windows are few


def test_one_window_has_no_standard_error_and_long_ones_are_refused() -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    one = by_name(calibration_error(model, model, TEXT.model_copy(update={"samples": 1}), 0))
    assert one["calibration_error"].stderr is None
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="evaluate/calibration_error: length 513"):
        METHOD.check(model, TEXT.model_copy(update={"length": 513}))
