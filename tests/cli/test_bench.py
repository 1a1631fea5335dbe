"""qtool bench: tables and JSON, and mistakes in its options."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qtool.bench import timing
from qtool.cli.main import app


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests measure for moments only."""
    monkeypatch.setitem(timing.ROTATED, "cpu", 1 << 16)
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(timing.SIDE, "cpu", 64)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


CELLS = ("--shape", "64x64", "--format", "w4a16g32,nf4g64", "--batch", "1,3")
KERNELS = ("bench", "kernels", *CELLS, "--seconds", "0", "--device", "cpu")


def test_kernels_are_a_table_with_verdicts_and_reasons() -> None:
    shown = call(*KERNELS)
    assert shown.exit_code == 0, shown.stderr
    assert "qtool (torch int4)" in shown.stdout and "of the floor" in shown.stdout
    assert "w4a16g32 64×64, 3 tokens: " in shown.stdout
    assert "not timed: qtool, nf4g64: nf4g64: levels of nf4 are no 16 neighbouring whole numbers" in shown.stdout


def test_kernels_as_json_alone_on_stdout_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="draws the figure; the bench extra")
    shown = call(*KERNELS, "--json", "--svg", tmp_path / "times.svg")
    assert shown.exit_code == 0, shown.stderr
    assert {row["tokens"] for row in json.loads(shown.stdout)["rows"]} == {1, 3}
    assert "<svg" in (tmp_path / "times.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch", "1,x"), '--batch is "1,x", must be whole numbers above zero, separated by commas, such as 1,4,16'),
        (("--shape", "64"), '--shape is "64", must be OUTxIN, separated by commas, such as 4096x4096,14336x4096'),
        (("--format", "w4a16h3"), '--format: "w4a16h3" is no scheme'),
        (("--device", "gpu"), 'device: "gpu" is no device'),
        (("--shape", "64x48", "--format", "w4a16g32"), "48 columns do not divide into groups of 32"),
    ],
)
def test_a_mistake_in_an_option_is_said(arguments: tuple[str, ...], message: str) -> None:
    refused = call("bench", "kernels", "--seconds", "0", *arguments)
    assert refused.exit_code == 2 and message in refused.stderr


def test_generate_refuses_a_dense_model() -> None:
    refused = call("bench", "generate", "demo", "--device", "cpu")
    assert refused.exit_code == 2 and "demo has no quantized linear; name an export or a run's folder" in refused.stderr
