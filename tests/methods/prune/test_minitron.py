"""The search over shapes against an enumeration that counts each shape's parameters on a model made of it."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.calibration.importance import Importance
from qtool.errors import QtoolError
from qtool.methods.prune.minitron import MinitronOptions, candidates, minitron, shape_after
from qtool.model.handle import ModelHandle
from qtool.model.shape import shape_of_model, smaller
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(tiny_model("llama"))))


def test_candidates_are_all_that_keep_to_the_budget_with_as_many_neurons_as_it_allows(model: ModelHandle) -> None:
    options = MinitronOptions(parameters=0.75, tolerance=0.05, candidates=1000, multiple=16)
    old, budget = shape_of_model(model), 0.75 * model.n_parameters()
    expected = []
    for blocks, hidden in itertools.product((1, 2), (32, 48, 64)):
        sizes = {
            neurons: smaller(model, replace(old, blocks=blocks, hidden=hidden, neurons=neurons)).n_parameters()
            for neurons in range(16, 129, 16)
        }
        fitting = [neurons for neurons, size in sizes.items() if size <= budget]
        if fitting and sizes[fitting[-1]] >= 0.95 * budget:
            expected.append(replace(old, blocks=blocks, hidden=hidden, neurons=fitting[-1]))
    found = candidates(model, options)
    assert sorted(map(str, found)) == sorted(map(str, expected))


def test_the_evenest_shapes_come_first_and_the_least_divergent_is_chosen(model: ModelHandle, windows: Tensor) -> None:
    options = MinitronOptions(parameters=0.75, tolerance=0.2, candidates=3, multiple=8)
    shapes = candidates(model, options)
    assert len(shapes) == 3  # of more that there are
    by_shape = dict(zip(map(str, shapes), (0.3, 0.1, 0.1), strict=True))
    cut = minitron(Importance(model, windows, divergence=lambda cut: by_shape[str(cut.shape)]), options, lambda text: None)
    assert cut.shape == shapes[1] and cut.facts["chosen"] == 1
    assert [row["kl"] for row in cut.facts["candidates"]] == [0.3, 0.1, 0.1]


def test_one_candidate_is_taken_untried(model: ModelHandle, windows: Tensor) -> None:
    options = MinitronOptions(parameters=0.75, tolerance=0.1, candidates=1, multiple=8)
    cut = minitron(Importance(model, windows), options, lambda text: None)
    assert cut.shape == shape_after(model, options) and cut.facts["candidates"][0]["kl"] is None


def test_a_budget_that_nothing_keeps_to_is_refused(model: ModelHandle) -> None:
    with pytest.raises(QtoolError, match=r"no shape has 9.5 to 10 % of the parameters"):
        shape_after(model, MinitronOptions(parameters=0.1, axes=["neurons"]))
    with pytest.raises(ValidationError, match="axes must hold neurons"):
        MinitronOptions(parameters=0.5, axes=["blocks"])


def test_a_run_tries_each_candidate_and_writes_the_best(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    text = "{source: demo:calibration, samples: 2, length: 32}"
    step = "prune/minitron: {parameters: 0.8, tolerance: 0.1, candidates: 2, multiple: 8}"
    folder = tiny_model("llama")
    recipe = parse(f"model: {folder}\npipeline:\n- calibrate/text: {text}\n- {step}\n- export/safetensors: {{}}\n", "test")
    results = run_recipe(recipe, tmp_path / "out", Silent())
    stage = next(stage for stage in results["stages"] if stage["name"] == "prune/minitron")
    losses = [row["kl"] for row in stage["candidates"]]
    assert len(losses) == 2 and stage["chosen"] == losses.index(min(losses)) and all(kl > 0 for kl in losses)
    assert results["model"]["parameters_compressed"] <= 0.8 * results["model"]["parameters"]
    assert not (tmp_path / "out" / "state" / "01-prune-minitron" / "candidate").exists()
    assert torch.isfinite(torch.tensor(losses)).all()
