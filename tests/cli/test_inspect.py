"""`qtool inspect`: tables for people, JSON for scripts, exit code 2 and nothing written where it cannot run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qtool.cli.main import app


def inspect(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["inspect", *(str(argument) for argument in arguments)])


def test_a_row_for_each_block_and_each_kind_and_the_worst_by_name(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = inspect(tiny_model("mixtral"), "--samples", "2", "--length", "16", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    rows = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    blocks = ["embedding", "model.layers.0", "model.layers.1"]
    kinds = [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.experts.gate_up.#", "mlp.experts.down.#", "lm_head"]
    assert rows[rows.index("embedding") :][:3] == blocks and rows[rows.index(kinds[0]) :][:7] == kinds
    results = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert all(row["where"] in done.stdout for row in results["worst"])
    assert str(tmp_path / "out" / "inspect.html") in done.stdout.replace("\n", "")


def test_json_is_the_file_and_nothing_else_on_stdout(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    done = inspect(tiny_model("llama"), "--samples", "1", "--length", "8", "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout) == json.loads((tmp_path / "out" / "inspect.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--length", "513"), "length 513 is more than the model's 512 positions"),
        (("--text", "missing.jsonl"), "the file missing.jsonl does not exist"),
        (("--samples", "100000"), "lower samples or length"),
        (("--device", "quantum"), "is no device"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(arguments: tuple[str, ...], said: str, tmp_path: Path) -> None:
    done = inspect("demo", *arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2 and said in done.stderr and not (tmp_path / "out").exists()


def test_an_out_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    done = inspect("demo", "--samples", "1", "--out", tmp_path / "file")
    assert done.exit_code == 2 and "cannot be written" in done.stderr and (tmp_path / "file").read_text() == "mine"
