"""SpinQuant's network is the model that a run makes, its rotations stay rotations, and the best ones are kept."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.rotations import LearnedRotations
from qtool.methods.transform.hadamard import HadamardOptions, hadamard
from qtool.methods.transform.spinquant import SpinQuantOptions, spinquant
from qtool.model.handle import ModelHandle
from qtool.model.rotated_network import RotatedNetwork
from qtool.model.rotation import Places, Rotations, find_places
from qtool.options import ModelOptions
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, load

TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], Tensor]


class Recording(RotatedNetwork):
    """Keeps the rotations of every forward."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.seen: list[Rotations] = []

    def logits(self, rotations: Rotations, options: LearnedRotations, rows: Tensor) -> Tensor:
        self.seen.append(rotations.detached([]))
        return super().logits(rotations, options, rows)


@contextmanager
def network_of(folder: Path, tokens: Tensor) -> Iterator[tuple[Places, Recording]]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    places = find_places(model, tokens[:1])
    with model.materialized() as module:
        yield places, Recording(model, module.float(), places, tokens)


def recipe(model: Path, tmp_path: Path, *steps: dict[str, object]) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "pipeline": list(steps)}))
    return load(path)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_network_that_learns_is_the_model_that_is_made(
    family: str, tiny_model: TinyModel, tmp_path: Path, windows: Tensor, logits_of: LogitsOf
) -> None:
    folder, scheme = tiny_model(family), {"scheme": "w4a8g32-asym", "ignore": ["lm_head", "*layers.1.self_attn.o_proj"]}
    scheme |= {} if family != "gpt2" else {"ignore": ["lm_head", "*h.1.attn.c_proj"]}
    rotate: dict[str, object] = {"transform/hadamard": {"online": True}}
    run_recipe(recipe(folder, tmp_path, rotate, {"quantize/rtn": scheme}), tmp_path / "run", Silent())
    state = tmp_path / "run" / "state"
    made = ModelHandle(ModelOptions(path=str(folder)), (state / "00-transform-hadamard", state / "01-quantize-rtn"))
    with network_of(folder, windows) as (places, network):
        rotations = hadamard(places, HadamardOptions(online=True), 0, print)
        rows = torch.arange(len(windows))
        found = network.logits(rotations, SpinQuantOptions.model_validate(scheme), rows)
        original = network.original_logits(rows)
    expected = logits_of(made)
    error = (found - expected).norm() / (original - expected).norm()
    assert error < 0.02  # of what rounding takes: a rounding that falls the other way in the eighth digit
    assert torch.allclose(original, logits_of(ModelHandle(ModelOptions(path=str(folder)))), atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_rotations_stay_rotations_and_the_best_are_kept(family: str, tiny_model: TinyModel, windows: Tensor) -> None:
    options = SpinQuantOptions.model_validate({"scheme": "w3a4", "steps": 6, "batch": 2, "lr": 0.5})
    with network_of(tiny_model(family), windows) as (places, network):
        found = spinquant(places, network, options, 0, print)
        seen = list(network.seen)
        logits = torch.cat([network.logits(found, options, rows) for rows in torch.arange(4).split(2)])
    loss = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten()))
    assert len(found.losses) == 5 and min(found.losses) < found.losses[0]
    assert abs(loss - min(found.losses)) < 1e-4
    for rotations in seen:
        assert rotations.residual is not None
        for R in (rotations.residual, *(R[0] for R in rotations.heads.values())):
            assert (R.T @ R - torch.eye(len(R))).abs().max() < 1e-5
        if family == "opt":
            assert torch.allclose(rotations.residual.sum(1), torch.ones(64, dtype=torch.float64))
    assert (seen[0].residual - found.residual).abs().max() > 0.01  # type: ignore[operator]
    assert all((seen[0].heads[name] - R).abs().max() > 1e-3 for name, R in found.heads.items())


def test_without_a_step_it_is_the_start(tiny_model: TinyModel, windows: Tensor) -> None:
    options = SpinQuantOptions.model_validate({"scheme": "w4a4", "steps": 0, "rounds": "inputs", "online": True})
    notes: list[str] = []
    with network_of(tiny_model("llama"), windows) as (places, network):
        found = spinquant(places, network, options, 3, notes.append)
        plain = hadamard(places, HadamardOptions(online=True), 3, print)
    assert len(found.losses) == 1 and notes == [] and found.inputs.keys() == plain.inputs.keys()
    assert found.residual is not None and plain.residual is not None and torch.equal(found.residual, plain.residual)


def test_a_step_that_helps_nothing_is_noted_and_one_that_explodes_is_an_error(tiny_model: TinyModel, windows: Tensor) -> None:
    notes: list[str] = []
    folder = tiny_model("llama")
    with network_of(folder, windows) as (places, network):
        options = SpinQuantOptions.model_validate({"scheme": "w2a4", "steps": 1, "batch": 4, "lr": 1e-30})
        found = spinquant(places, network, options, 0, notes.append)
        assert found.losses[0] == min(found.losses) and "no step lowered the loss" in notes[0]
        network.tokens = windows.clone()
        network._module.get_parameter("model.norm.weight").data[0] = float("nan")
        with pytest.raises(QtoolError, match="the loss of the rounded model is nan; lower the learning rate"):
            spinquant(places, network, options, 0, notes.append)


def test_a_run_learns_and_keeps_its_losses(tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf) -> None:
    folder = tiny_model("llama", tie_word_embeddings=True)
    text: dict[str, object] = {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}}
    learn: dict[str, object] = {"transform/spinquant": {"scheme": "w4a4", "steps": 4, "batch": 2}}
    run_recipe(recipe(folder, tmp_path, text, learn), tmp_path / "run", Silent())
    step = tmp_path / "run" / "state" / "01-transform-spinquant"
    losses = yaml.safe_load((step / "done.json").read_text())["learned"]["losses"]
    assert len(losses) == 5 and not (step / "rotations.safetensors").exists()
    found, expected = (logits_of(ModelHandle(ModelOptions(path=str(folder)), changes)) for changes in ((step,), ()))
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_what_cannot_be_rounded_is_refused_before_any_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    text: dict[str, object] = {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}}
    for options, message in (
        ({"scheme": "w4a16", "rounds": "inputs"}, "rounds is inputs, but the scheme rounds none"),
        ({"scheme": "w4a4g48"}, "do not divide into groups of 48"),
    ):
        with pytest.raises(QtoolError, match=f"recipe.yaml:.*transform/spinquant: .*{message}"):
            check_recipe(recipe(folder, tmp_path, text, {"transform/spinquant": options}))
    with pytest.raises(QtoolError, match="transform/spinquant needs calibration text"):
        recipe(folder, tmp_path, {"transform/spinquant": {"scheme": "w4a4"}})
