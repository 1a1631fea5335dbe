"""`qtool verify`, and the list of digests that every export holds, against the system's own sha256sum."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from qtool.cli.main import app
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    """The folder of a run with two exports."""
    steps = [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/safetensors": None}, {"export/gguf": {"type": "q8_0"}}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    run_recipe(load(path), tmp_path / "run", Silent())
    return tmp_path / "run"


def test_an_export_that_was_left_alone_passes_here_and_with_sha256sum(run: Path) -> None:
    export = run / "exports" / "safetensors"
    found = call("verify", export)
    n_files = sum(path.is_file() for path in export.rglob("*")) - 1
    assert (found.exit_code, found.stdout) == (0, f"{export}: {n_files} files, all as they were written\n")
    listed = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=export, capture_output=True, text=True)
    assert listed.returncode == 0 and listed.stdout.count(": OK") == n_files


def test_a_run_stands_for_all_its_exports_wherever_it_was_moved(run: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(run, tmp_path / "moved"))
    found = call("verify", moved)
    assert found.exit_code == 0
    assert [line.split(":")[0] for line in found.stdout.splitlines()] == [
        str(moved / "exports" / name) for name in ("gguf", "safetensors")
    ]


def test_every_change_is_named(run: Path) -> None:
    export = run / "exports" / "safetensors"
    weights = bytearray((export / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit
    (export / "model.safetensors").write_bytes(weights)
    (export / "config.json").unlink()
    (export / "notes.txt").write_text("put there by a user")
    found = call("verify", run)
    assert found.exit_code == 2
    assert f"{export / 'model.safetensors'} is not as it was written\n" in found.stderr
    assert f"{export / 'config.json'} is missing\n" in found.stderr
    assert "notes.txt" not in found.stderr and "write it again" in found.stderr
    assert str(run / "exports" / "gguf") in found.stdout


def test_a_folder_that_is_no_export_and_a_broken_list_are_mistakes(run: Path, tmp_path: Path) -> None:
    assert call("verify", tmp_path).exit_code == 2
    assert "holds no SHA256SUMS" in call("verify", tmp_path).stderr
    (run / "exports" / "gguf" / "SHA256SUMS").write_text("what is this\n")
    found = call("verify", run)
    assert found.exit_code == 2 and "line 1 is no digest and name" in found.stderr
