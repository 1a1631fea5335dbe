"""A run's folder tells whether someone works in it, and its events where."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.pipeline.folder import is_at_work
from qtool.pipeline.run import run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import parse
from qtool.report.events import RunState, read_events


def test_a_real_run_tells_where_it_is_and_how_it_ended(
    tiny_model: Callable[..., Path], tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    recipe = parse(
        f"model: {tiny_model('llama')}\npipeline:\n"
        "  - calibrate/text: {source: demo:calibration, samples: 2, length: 16}\n  - quantize/rtn: {scheme: w4a16g32}\n"
        "  - evaluate/perplexity: {source: demo:test, samples: 2, length: 16}\n  - export/safetensors: {}\n",
        "test",
    )
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path, interrupted(3))  # at the second block
    assert not is_at_work(tmp_path)

    def state() -> RunState:
        found = RunState()
        found.follow(read_events((tmp_path / "events.jsonl").read_text()))
        return found

    stopped = state()
    assert (stopped.status, stopped.why) == ("stopped", "KeyboardInterrupt")
    assert [stage.state for stage in stopped.stages] == ["done", "running", "waiting", "waiting"]

    seen: list[bool] = []

    class Watching(Silent):
        def advance(self, detail: str = "") -> None:
            seen.append(is_at_work(tmp_path))

    results = run_recipe(recipe, tmp_path, Watching())
    assert seen and all(seen) and not is_at_work(tmp_path)
    finished = state()
    assert finished.status == "done" and {stage.state for stage in finished.stages} == {"done"}
    assert [stage.name for stage in finished.stages] == [stage["name"] for stage in results["stages"]]
    assert json.loads((tmp_path / "events.jsonl").read_text().splitlines()[-1])["event"] == "finished"
