"""Sweeps: trials from grids and lists, every mistake before any work, and a real one on Ray that is stopped and goes on."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qtool.cli.main import app
from qtool.errors import QtoolError, RecipeError
from qtool.pipeline import sweep
from qtool.pipeline.sweep import Resources, SweepOptions, Trial, check_room, expand, read_sweep

BASE = """\
model: {model}
pipeline:
  - quantize/rtn: {{scheme: w8a16}}
  - evaluate/perplexity: {{source: demo:test, samples: 3, length: 16}}
  - evaluate/kl_divergence: {{source: demo:test, samples: 3, length: 16}}
"""


@pytest.fixture
def write(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """`write(text)`: a sweep file beside the recipe base.yaml of a tiny model."""
    (tmp_path / "base.yaml").write_text(BASE.format(model=tiny_model("llama")))

    def file(text: str) -> Path:
        (tmp_path / "sweep.yaml").write_text(f"extends: base.yaml\n{text}")
        return tmp_path / "sweep.yaml"

    return file


def test_a_grid_is_every_combination_and_stated_trials_go_over_all_of_it() -> None:
    options = SweepOptions.model_validate(
        {"extends": "r", "grid": {"a.x": [1, 0.5], "b": ["w4/g"]}, "trials": {"one": {"seed": 1}, "two": {}}}
    )
    assert expand(options) == {
        "one,x=1,b=w4_g": {"seed": 1, "a.x": 1, "b": "w4/g"},
        "one,x=0.5,b=w4_g": {"seed": 1, "a.x": 0.5, "b": "w4/g"},
        "two,x=1,b=w4_g": {"a.x": 1, "b": "w4/g"},
        "two,x=0.5,b=w4_g": {"a.x": 0.5, "b": "w4/g"},
    }
    alike = SweepOptions.model_validate({"extends": "r", "grid": {"a.x": [1, 2], "b.x": [1, 2]}})
    assert len(expand(alike)) == 4
    long = SweepOptions.model_validate({"extends": "r", "grid": {"a": ["w" * 300 + end for end in "xyz"]}})
    assert len(expand(long)) == 3 and all(len(name) < 130 for name in expand(long))


def test_every_mistake_of_every_trial_comes_before_any_work(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as refused:
        read_sweep(write("grid:\n  pipeline.quantize/rtn.scheme: [w4a16g48, w9, w4a16g32]\n  sede: [1]\n"))
    text = str(refused.value)
    assert text.count('there is no "sede"') == 3 and "scheme=w9,sede=1: --set" in text
    with pytest.raises(RecipeError, match=r"(?s)scheme=w4a16g48: .* do not divide into groups of 48"):
        read_sweep(write("grid:\n  pipeline.quantize/rtn.scheme: [w4a16g48, w4a16g32]\n"))
    with pytest.raises(RecipeError) as refused:
        read_sweep(write("gird: {seed: [1]}\nresources: {cpus: 0}\n"))
    assert 'sweep.yaml:2: there is no "gird"; did you mean "grid"?' in str(refused.value)
    assert "sweep.yaml:3: resources.cpus is 0; valid: number > 0" in str(refused.value)
    with pytest.raises(RecipeError, match="states no trial; give grid, trials or both"):
        read_sweep(write(""))
    with pytest.raises(RecipeError, match="cannot name a folder"):
        read_sweep(write("trials: {../up: {seed: 1}}\n"))


ON_A_CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False,
                                                        "object_store_memory": 80 << 20})
from qtool.errors import QtoolError
from qtool.pipeline import sweep
from qtool.recipe import load

def killed_once(recipe, out, cwd):  # stands for a trial; a machine's memory, or its owner, ends the first
    import os, pathlib, signal
    tries = pathlib.Path(out + ".tries")
    n = int(tries.read_text()) if tries.is_file() else 0
    tries.write_text(str(n + 1))
    if n == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return None if os.environ["CUDA_VISIBLE_DEVICES"] == "0" else "it sees other GPUs"

sweep.run_trial = killed_once
recipe, out = sweep.Path(sys.argv[1]), sweep.Path(sys.argv[2])
found = {}
for retries in (1, 0):
    trials = [sweep.Trial(f"r{retries}", (), load(recipe))]
    where = sweep.Resources(address=cluster.address, gpus=1, retries=retries)
    found |= dict(sweep.carry_out(where, trials, out))
try:
    list(sweep.carry_out(sweep.Resources(address=cluster.address, gpus=2), trials, out))
except QtoolError as error:
    found["two"] = str(error)
print(json.dumps(found))
cluster.shutdown()
"""


def test_a_cluster_that_runs_already_gives_each_trial_its_gpus_and_takes_up_killed_ones(
    write: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray has no wheel here; pip install ray")
    write("")
    command = [sys.executable, "-c", ON_A_CLUSTER, str(tmp_path / "base.yaml"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["r1"] is None and (tmp_path / "r1.tries").read_text() == "2"
    assert found["r0"] is not None and (tmp_path / "r0.tries").read_text() == "1"
    assert found["two"] == (
        "resources: a trial takes 1 cpus and 2 gpus on one machine, but they have 1 and 1; take fewer"
    )


def test_what_no_single_machine_has_is_refused() -> None:
    machines = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 8.0}]
    check_room(Resources(cpus=8), machines)
    check_room(Resources(cpus=4, gpus=1), machines)
    with pytest.raises(QtoolError, match="8 cpus and 1 gpus on one machine, but they have 4 and 1, 8 and 0; take fewer"):
        check_room(Resources(cpus=8, gpus=1), machines)


def test_a_sweep_runs_on_ray_compares_its_trials_and_does_none_twice(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="Ray has no wheel here; pip install ray")
    file = write("grid:\n  pipeline.quantize/rtn.scheme: [w4a16g32, w3a16g32]\nresources: {parallel: 2}\n")
    command = [sys.executable, "-m", "qtool", "sweep", str(file), "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "scheme=w3a16g32" in done.stdout and "2 trials" in done.stdout and "Δ from scheme=w4a16g32" in done.stdout
    out = tmp_path / "out"
    trials = json.loads((out / "sweep.json").read_text())["trials"]
    assert [(trial["name"], trial["status"]) for trial in trials] == [("scheme=w4a16g32", "done"), ("scheme=w3a16g32", "done")]
    rows = {row["name"]: row for row in json.loads((out / "compare.json").read_text())["runs"]}
    assert rows["scheme=w4a16g32"]["value"] < rows["scheme=w3a16g32"]["value"]
    assert rows["scheme=w4a16g32"]["bits_per_weight"] == pytest.approx(4.5) and (out / "compare.html").is_file()

    finished = (out / "scheme=w4a16g32" / "results.json").read_bytes()
    (out / "scheme=w3a16g32" / "results.json").unlink()  # as if it had been stopped before its end
    handed: list[str] = []

    def carry_out_here(resources: Resources, trials: Sequence[Trial], out: Path) -> Iterator[tuple[str, str | None]]:
        for trial in trials:
            handed.append(trial.name)
            yield trial.name, sweep.run_trial(trial.recipe.to_yaml(), str(out / trial.name), str(tmp_path))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sweep, "carry_out", carry_out_here)
    again = CliRunner().invoke(app, command[3:])
    assert again.exit_code == 0, again.stderr
    assert handed == ["scheme=w3a16g32"]  # the other one stands
    assert (out / "scheme=w4a16g32" / "results.json").read_bytes() == finished
