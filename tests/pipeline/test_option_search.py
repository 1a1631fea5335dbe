"""Searching options: mistakes before any work, the front by its definition, and a search that is stopped and goes on."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qtool.cli.main import app
from qtool.errors import QtoolError, RecipeError
from qtool.pipeline import option_search
from qtool.pipeline.option_search import best_of, mark_front, read_search, run_option_search, write_best
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load

BASE = """\
model: {model}
pipeline:
  - quantize/rtn: {{scheme: w8a16}}
  - evaluate/kl_divergence: {{source: demo:test, samples: 3, length: 16}}
"""
SPACE = """\
extends: base.yaml
space:
  pipeline.quantize/rtn.scheme: {choice: [w3a16g32, w4a16g32]}
  pipeline.quantize/rtn.range: {choice: [minmax, mse]}
objectives: [kl_divergence, bits_per_weight]
trials: 8
first: {pipeline.evaluate/kl_divergence.samples: 1}
"""


@pytest.fixture
def write(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """`write(text)`: a search file beside the recipe base.yaml of a tiny model."""
    (tmp_path / "base.yaml").write_text(BASE.format(model=tiny_model("llama")))

    def file(text: str) -> Path:
        (tmp_path / "search.yaml").write_text(text)
        return tmp_path / "search.yaml"

    return file


def test_every_mistake_comes_before_any_work(write: Callable[[str], Path]) -> None:
    with pytest.raises(RecipeError) as refused:
        read_search(write(SPACE.replace("w3a16g32", "w3a16g48").replace("samples: 1", "smaples: 1")))
    assert "scheme=w3a16g48" in str(refused.value) and "first look: " in str(refused.value)
    for wrong, says in (("{low: 2}", "either choice, or low and high"), ("{low: 2, high: 1}", "low 2 is not below high 1")):
        with pytest.raises(RecipeError, match=says):
            read_search(write(SPACE.replace("{choice: [minmax, mse]}", wrong)))
    for wrong, says in (
        ("kl_divergnce", 'no evaluate step measures "kl_divergnce"; did you mean "kl_divergence"?; costs: bits_per'),
        ("kl_divergence@demo:tset", 'no step measures it on "demo:tset"; did you mean "demo:test"'),
        ("ms_per_token", 'objectives: ms_per_token: no evaluate step measures "tokens_per_second"'),
    ):
        with pytest.raises(QtoolError, match=re.escape(says)):
            read_search(write(SPACE.replace("[kl_divergence, ", f"[{wrong}, ")))


def test_the_front_is_what_no_trial_beats_and_the_best_is_nearest_to_all_its_ends() -> None:
    given = [[0.0, 10.0], [1.0, 5.0], [1.0, 6.0], [9.0, 4.0], [10.0, 4.0], None]
    rows: list[dict[str, Any]] = [{"values": values, "front": False} for values in given]
    mark_front(rows)
    assert [row["front"] for row in rows] == [True, True, False, True, False, False]
    assert best_of(rows)["values"] == [1.0, 5.0]


def test_a_stopped_search_goes_on_as_if_it_had_not_been_and_its_best_is_a_recipe(
    write: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna", reason="Optuna is not here; pip install optuna")
    options, base = read_search(write(SPACE)), tmp_path / "base.yaml"
    whole = run_option_search(options, base, tmp_path / "whole", Silent())
    carried_out = []

    def stop_at_the_fourth(*arguments: Any) -> dict[str, Any]:
        carried_out.append(arguments)
        if len(carried_out) == 4:
            raise KeyboardInterrupt
        return run_recipe(*arguments)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(option_search, "run_recipe", stop_at_the_fourth)
        run_option_search(options, base, tmp_path / "parts", Silent())
    assert not (tmp_path / "parts" / "search.json").exists()
    parts = run_option_search(options, base, tmp_path / "parts", Silent())
    assert parts == whole and len(whole) == 8
    done = [row for row in whole if row["values"] is not None]
    assert any(row["front"] for row in done) and len(done) < 8  # of two ranges one is worse at the same bits
    for row in done:
        results = json.loads((tmp_path / "whole" / row["name"] / "results.json").read_text())
        assert row["values"][1] == results["model"]["bits_per_weight"]
    best = load(write_best(whole, tmp_path / "whole"))
    assert best.steps[0].key == "quantize/rtn"
    shown = CliRunner().invoke(app, ["search", str(tmp_path / "search.yaml"), "--out", str(tmp_path / "whole")])
    assert shown.exit_code == 0, shown.stderr  # all is done, so that only the table is made
    assert shown.stdout.count("●") == 1 + sum(row["front"] for row in whole)
    assert f"8 trials, {8 - len(done)} ended after their first look" in shown.stdout and "best.yaml" in shown.stdout
    with pytest.raises(QtoolError, match="holds another search"):
        run_option_search(options.model_copy(update={"seed": 1}), base, tmp_path / "whole", Silent())
