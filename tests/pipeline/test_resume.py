"""A run that is killed goes on where it stopped, and ends with the same bits as one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qtool.errors import QtoolError
from qtool.pipeline.run import run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import load

pytestmark = pytest.mark.no_cover  # the same run many times over; counting lines would double the time
N_BLOCKS = 6


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    model = tiny_model("llama", dtype="bfloat16", num_hidden_layers=N_BLOCKS)
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 8, "length": 64}},
        {"transform/smoothquant": {"alpha": 0.5}},
        {"quantize/gptq": {"scheme": "w4a16g32", "true_sequential": True}},
        {"export/safetensors": None},
        {"export/compressed_tensors": None},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "seed": 1, "pipeline": steps}))
    return path


def start(recipe: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "qtool", "run", str(recipe), "--out", str(out)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def exported_bytes(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted((out / "exports").rglob("*.safetensors"))}


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 240
    while not path.exists():
        assert process.poll() is None, f"ended before {path.name} was written"
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.0005)


def test_a_run_killed_at_random_blocks_ends_with_the_same_bits(recipe: Path, tmp_path: Path) -> None:
    run_recipe(load(recipe), tmp_path / "whole", Silent())
    out = tmp_path / "killed"
    points = [("01-transform-smoothquant", 0), ("02-quantize-gptq", 0)]
    rng = random.Random(0)
    for step, first in points:
        process = start(recipe, out)
        wait_for(out / "state" / step / f"block_{rng.randint(first, N_BLOCKS - 3):03d}.safetensors", process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (out / "results.json").exists()
    assert start(recipe, out).communicate()[1] == b""
    assert (out / "results.json").exists()
    assert exported_bytes(out) == exported_bytes(tmp_path / "whole")


def test_ctrl_c_exits_130_and_leaves_a_run_that_can_go_on(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"
    process = start(recipe, out)
    wait_for(out / "state" / "01-transform-smoothquant" / "block_001.safetensors", process)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in stderr
    assert not list(out.rglob("*.tmp"))
    results = run_recipe(load(recipe), out, Silent())
    assert results["status"] == "done"


@pytest.mark.parametrize("after", [2, 9, 14])
def test_an_interrupt_after_any_advance_changes_no_bit(
    recipe: Path, tmp_path: Path, after: int, interrupted: Callable[[int], Progress]
) -> None:
    run_recipe(load(recipe), tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load(recipe), tmp_path / "cut", interrupted(after))
    run_recipe(load(recipe), tmp_path / "cut", Silent())
    assert exported_bytes(tmp_path / "cut") == exported_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    "step",
    [
        {"quantize/gptq": {"scheme": "w4a16g32", "alpha": 0.25, "ignore": []}},
        {"quantize/sign_round": {"scheme": "w4a16g32", "steps": 3}},
        {"quantize/omniquant": {"scheme": "w4a16g32", "steps": 3}},
        {"transform/let": {"scheme": "w4a16g32", "steps": 3}},
    ],
    ids=lambda step: next(iter(step)),
)
def test_methods_that_see_the_original_model_beside_go_on_with_the_same_bits(
    step: dict[str, object], recipe: Path, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    content = yaml.safe_load(recipe.read_text())
    calibrate, _, _, export, _ = content["pipeline"]
    recipe.write_text(yaml.safe_dump(content | {"pipeline": [calibrate, step, export]}))
    run_recipe(load(recipe), tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load(recipe), tmp_path / "cut", interrupted(4))  # in the third of six blocks
    run_recipe(load(recipe), tmp_path / "cut", Silent())
    assert exported_bytes(tmp_path / "cut") == exported_bytes(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (["pipeline.transform/smoothquant.alpha=0.7"], "recipe"),
        (["seed=2"], "recipe"),
    ],
)
def test_another_recipe_refuses_to_mix_with_old_state(recipe: Path, tmp_path: Path, change: list[str], part: str) -> None:
    out = tmp_path / "out"
    run_recipe(load(recipe), out, Silent())
    with pytest.raises(QtoolError, match=f"another {part}.*--fresh"):
        run_recipe(load(recipe, change), out, Silent())
    assert run_recipe(load(recipe, change), out, Silent(), fresh=True)["status"] == "done"


def test_another_model_in_the_same_folder_is_noticed(recipe: Path, tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    out = tmp_path / "out"
    run_recipe(load(recipe), out, Silent())
    tiny_model("llama", dtype="bfloat16", num_hidden_layers=N_BLOCKS, seed=5)
    with pytest.raises(QtoolError, match="another model"):
        run_recipe(load(recipe), out, Silent())


def test_another_text_under_the_same_name_is_noticed(recipe: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rows = [json.dumps({"text": f"def f{n}(x):\n    return x + {n}\n" * 10}) + "\n" for n in range(60)]
    text.write_text("".join(rows))
    changed = [f"pipeline.calibrate/text.source={text}"]
    run_recipe(load(recipe, changed), tmp_path / "out", Silent())
    text.write_text("".join(rows[1:]))
    with pytest.raises(QtoolError, match="another text"):
        run_recipe(load(recipe, changed), tmp_path / "out", Silent())


class Stages(Silent):
    """Remembers which stages began, and what was noted."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.noted: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.began.append(name)

    def note(self, text: str) -> None:
        self.noted.append(text)


@pytest.fixture
def measured(recipe: Path) -> Path:
    """The recipe with a measurement in place of its first export."""
    content = yaml.safe_load(recipe.read_text())
    content["pipeline"][3] = {"evaluate/perplexity": {"source": "demo:test", "samples": 2, "length": 32}}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


@pytest.mark.parametrize("damage", ["deleted", "cut short"])
def test_an_export_that_does_not_stand_is_written_again_with_the_same_bytes(
    measured: Path, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "out"
    first, bytes_before = run_recipe(load(measured), out, Silent()), exported_bytes(out)
    export = out / "exports" / "compressed_tensors"
    if damage == "deleted":
        shutil.rmtree(export)
    else:
        (export / "model.safetensors").write_bytes(b"cut short")
    progress = Stages()
    again = run_recipe(load(measured), out, progress)
    assert progress.began == ["calibrate/text", "export/compressed_tensors"]  # equal bytes need no second measurement
    assert "exports/compressed_tensors is not as it was written" in progress.noted[0]
    assert exported_bytes(out) == bytes_before != {}
    assert (again["exports"], again["metrics"]) == (first["exports"], first["metrics"])


def test_files_beside_an_export_are_left_alone(recipe: Path, tmp_path: Path) -> None:
    run_recipe(load(recipe), tmp_path / "out", Silent())
    card = tmp_path / "out" / "exports" / "safetensors" / "README.md"
    card.write_text("mine")
    run_recipe(load(recipe), tmp_path / "out", Silent())
    assert card.read_text() == "mine"


def test_an_export_that_comes_out_otherwise_is_measured_again(measured: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_recipe(load(measured), out, Silent())
    shutil.rmtree(out / "exports")
    settings = Path(load(measured).model.path) / "tokenizer_config.json"  # the export takes the tokenizer along
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ messages }}"}))
    progress = Stages()
    again = run_recipe(load(measured), out, progress)
    assert progress.began[-1] == "evaluate/perplexity of export:compressed_tensors"
    assert again["exports"] != first["exports"]


def test_the_same_command_on_a_finished_run_repeats_its_results(recipe: Path, tmp_path: Path) -> None:
    first = run_recipe(load(recipe), tmp_path / "out", Silent())
    assert run_recipe(load(recipe), tmp_path / "out", Silent())["stages"][1:] == first["stages"][1:]
