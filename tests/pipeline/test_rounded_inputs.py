"""Schemes with rounded inputs, whole runs of them: every family of formats, measured and exported."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

SCHEMES = {
    "q_proj": "w8a8",
    "k_proj": "w4a8",
    "v_proj": "w6a6",
    "o_proj": "w4a4",
    "gate_proj": "w2a8",
    "up_proj": "mxfp4-amxfp4",
    "down_proj": "nvfp4-anvfp4",
}


def test_every_family_of_input_formats_runs_and_is_measured_as_it_is_exported(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    steps = [
        f"quantize/rtn: {{scheme: w8a8, modules: {SCHEMES}}}",
        "evaluate/perplexity: {source: demo:test, samples: 2, length: 32}",
        "export/qtool: {}",
    ]
    lines = "\n".join(f"  - {step}" for step in steps).replace("'", "")
    results = run_recipe(parse(f"model: {tiny_model('llama')}\npipeline:\n{lines}\n", "r"), tmp_path / "run", Silent())
    assert {row["name"].rsplit(".", 1)[-1]: row["scheme"] for row in results["blocks"]} == SCHEMES
    found = {row["subject"]: row["value"] for row in results["metrics"] if row["name"] == "perplexity"}
    assert found["export:qtool"] == found["compressed"] != pytest.approx(found["original"], rel=1e-6)
