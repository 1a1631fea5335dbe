"""Every recipe that ships runs to the end on two blocks of the demo model, on less text and with fewer training steps.

Those that need a mixture run on a random one of four experts.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from qtool.calibration.tokens import ASSETS
from qtool.cli.main import app
from qtool.recipe import load

RECIPES = sorted((Path(__file__).resolve().parent.parent.parent / "recipes").glob("*.yaml"))


BLOCKS = 2
# By the weights, not by the text: one block is enough.
SLOW = ("quantize/yaqa", "quantize/lattice", "quantize/ada_dim", "quantize/fpq")
MIXTURES = ("prune/experts", "prune/ream")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first blocks, with its embedding, last norm and head."""
    folder = tmp_path_factory.mktemp("demo") / "model"
    shutil.copytree(ASSETS / "demo" / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": BLOCKS}))
    left_out = tuple(f"model.layers.{index}." for index in range(BLOCKS, config["num_hidden_layers"]))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def smaller(path: Path, model: Path) -> list[str]:
    """Overrides that leave every step in and take seconds."""
    found = [f"model={model}", "gates={}"]
    for number, step in enumerate(load(path).steps, 1):
        if step.key in ("calibrate/text", "evaluate/perplexity", "evaluate/kl_divergence", "evaluate/calibration_error"):
            split = "calibration" if step.key == "calibrate/text" else "test"
            source = step.options.model_dump()["source"]
            source = source if source == "preservation" else f"demo:{split}"
            domain = step.options.model_dump().get("domain")
            found.append(f"pipeline.{number}={{source: {source}, samples: 2, length: 32}}")
            found += [] if domain is None else [f"pipeline.{number}.domain={domain}"]
        elif step.key == "evaluate/lm_eval":
            found.append(f"pipeline.{number}={{tasks: [demo_cloze], limit: 2}}")
        else:
            fewer = {"steps": 1, "batch": 2, "samples": 2, "generate": 2, "candidates": 1}
            if step.method.kind in ("calibrate", "evaluate"):  # four samples: one for a weight of 1 in 4
                fewer |= {"samples": 4, "length": 32, "candidates": 8, "bins": 2, "clusters": 2, "preserved": 2, "tokens": 5}
            if step.key == "evaluate/temperature":
                found.append(f"pipeline.{number}.temperatures=[1.0]")
            stated = step.options.model_dump()
            if stated.get("validation"):
                fewer["validation"] = 1
            found += [f"pipeline.{number}.{name}={n}" for name, n in fewer.items() if type(stated.get(name)) is int]
        if step.key == "distill/sortednet":  # sizes that two blocks have
            found.append(f"pipeline.{number}.submodels={{small: {{blocks: 1, neurons: 512}}}}")
        if step.key in MIXTURES:
            found.append(f"pipeline.{number}.keep=3")
        if step.key in SLOW:
            found.append(f'pipeline.{number}.ignore=[lm_head, "*layers.1.*"]')
    return found


@pytest.mark.no_cover  # counting lines would double the time, and every line has tests of its own
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_to_the_end(path: Path, model: Path, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    if any(step.key in MIXTURES for step in load(path).steps):
        model = tiny_model("mixtral", hidden_size=128)  # groups of 128
    overrides = [part for override in smaller(path, model) for part in ("--set", override)]
    done = CliRunner().invoke(app, ["run", str(path), "--out", str(tmp_path / "out"), *overrides])
    assert done.exit_code == 0, done.stderr + repr(done.exception)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    steps = [step.key for step in load(path).steps]
    assert [stage["name"] for stage in results["stages"]][: len(steps)] == steps
    assert {row["subject"] for row in results["metrics"]} >= {"original", "compressed"}
    assert sum(map(len, (sample["texts"] for sample in results["samples"]))) == 8 * ("evaluate/generation" in steps)
    assert len(results["exports"]) == sum(key.startswith("export/") for key in steps)
