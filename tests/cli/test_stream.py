"""`qtool stream`: what it prints and its exit codes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from qtool.cli.main import app


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[..., Path]) -> Path:
    steps = [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/gptq": None}]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    return path


def test_it_tells_size_time_and_memory_and_verify_passes(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = call("stream", recipe, "--out", out, "--workers", 2, "--set", "pipeline.quantize/rtn.scheme=w8a16g32")
    assert found.exit_code == 0
    last = found.stdout.splitlines()[-1]
    assert last.startswith(f"{out}: ") and " MiB, " in last and last.endswith(" GiB of memory")
    assert call("verify", out).exit_code == 0


def test_what_it_does_not_take_exits_2_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(content | {"pipeline": [*content["pipeline"][:1], {"export/gguf": None}]}))
    before = sorted(tmp_path.iterdir())
    found = call("stream", recipe, "--out", tmp_path / "out")
    assert found.exit_code == 2
    assert "export/gguf does not write each linear by itself" in found.stderr and "Traceback" not in found.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_no_workers_is_a_mistake(recipe: Path, tmp_path: Path) -> None:
    assert call("stream", recipe, "--out", tmp_path / "out", "--workers", 0).exit_code == 2
