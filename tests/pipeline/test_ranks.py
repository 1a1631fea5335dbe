"""Two processes train as one does: each on its half of every batch, over gloo on the CPU."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtool.model.handle import ModelHandle
from qtool.pipeline.ranks import Ranks
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load

pytestmark = pytest.mark.no_cover  # counting lines in three processes would double the time


def start(*command: str) -> list[subprocess.Popen[bytes]]:
    """Python with these arguments as two processes, with the environment that torchrun would give them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    shared |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen([sys.executable, *command], env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for rank in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen[bytes]]) -> list[str]:
    """What each printed, once all have ended well."""
    try:
        ended = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], ended
    return [stdout.decode() for stdout, _ in ended]


def test_two_processes_give_the_losses_and_the_weights_of_one(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    training = {"steps": 6, "batch": 4, "lr": 1e-3, "checkpoint_every": 4, "validation": 2, "validate_every": 3}
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 10, "length": 32}},
        {"prune/gradual": {"sparsity": 0.5, "every": 1, "steps": 4, "batch": 4, "lr": 1e-3}},  # whole in each process
        {"distill/logits": training},
        {"evaluate/perplexity": {"source": "demo:test", "samples": 2, "length": 32}},
        {"export/safetensors": {}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    recipe = load(path)
    one = run_recipe(recipe, tmp_path / "one", Silent())
    said = finish(start("-m", "qtool", "run", str(path), "--out", str(tmp_path / "two")))
    assert "done in" in said[0] and "done in" not in said[1]
    first, second = (json.loads((tmp_path / name / "state/02-distill-logits/done.json").read_text()) for name in ("one", "two"))
    # A batch in halves: sums in another order, and bf16 products that differ with the shape of a batch by 2 ** -8.
    assert second["losses"] == pytest.approx(first["losses"], rel=1e-2)
    held = [[row["loss"] for row in done["validation"]] for done in (first, second)]
    assert held[1] == pytest.approx(held[0], rel=1e-2)
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["metrics"][1]["value"] == pytest.approx(one["metrics"][1]["value"], rel=1e-2)
    events = [json.loads(line) for line in (tmp_path / "two" / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["event"] == "training"] == [*range(4), *range(6)]
    folders = [sorted((tmp_path / name / "state").glob("*-*"))[1:3] for name in ("one", "two")]
    done = [json.loads((tmp_path / name / "state/01-prune-gradual/done.json").read_text()) for name in ("one", "two")]
    assert done[1]["losses"] == pytest.approx(done[0]["losses"], rel=1e-2)
    weights = [ModelHandle(recipe.model, tuple(found)).block(0).module.get_parameter("mlp.up_proj.weight") for found in folders]
    assert all(float((weight == 0).float().mean()) == 0.5 for weight in weights)
    # AdamW's first steps are signs of gradients, some near zero: the few that differ end a few steps of 1e-3 apart.
    assert float((weights[0].float() - weights[1].float()).norm() / weights[0].float().norm()) < 0.1


BOTH = """
import os, sys
from qtool.cli.main import app
recipe, out, port = sys.argv[1:]
steps = ["--tasks", "demo_cloze", "--set", "pipeline.evaluate/lm_eval.limit=5"]
assert app(["run", recipe, "--out", out], standalone_mode=False) is None  # the exit code of a mistake
os.environ["MASTER_PORT"] = port
assert app(["eval", out, *steps, "--out", out + "-eval"], standalone_mode=False) is None
"""


def test_two_processes_share_lm_evals_documents_and_the_first_writes(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    steps = [
        {"quantize/rtn": {"scheme": "w4a16g32"}},
        {"evaluate/lm_eval": {"tasks": ["demo_cloze"], "limit": 5, "log_samples": True}},  # three of one, two of the other
        {"evaluate/perplexity": {"source": "demo:test", "samples": 2, "length": 32}},
        {"export/safetensors": {}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama")), "pipeline": steps}))
    one = run_recipe(load(path), tmp_path / "one", Silent())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    said = finish(start("-c", BOTH, str(path), str(tmp_path / "two"), str(port)))
    assert "done in" in said[0] and "demo_cloze/acc" in said[0] and said[1] == ""
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["metrics"] == one["metrics"]
    assert {row["subject"] for row in two["metrics"]} == {"original", "compressed", "export:safetensors"}
    assert (tmp_path / "two" / "paired.json").read_text() == (tmp_path / "one" / "paired.json").read_text()
    samples = "evaluations/01-evaluate-lm_eval/compressed-samples_demo_cloze.jsonl"
    first, second = (list(map(json.loads, (tmp_path / name / samples).read_text().splitlines())) for name in ("one", "two"))
    assert [row["doc_id"] for row in second] == [0, 1, 2, 3, 4]
    losses = [[float(answer[0]) for row in rows for answer in row["filtered_resps"]] for rows in (first, second)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)  # in batches of other shapes
    again = json.loads((tmp_path / "two-eval" / "results.json").read_text())
    found = {(row["name"], row["subject"]): row["value"] for row in one["metrics"]}
    assert len(again["metrics"]) == 4
    assert all(row["value"] == found[row["name"], row["subject"]] for row in again["metrics"])


def test_shares_of_a_batch_are_all_of_it() -> None:
    rows = torch.arange(7)
    assert torch.equal(torch.cat([Ranks(rank, 3).share(rows) for rank in range(3)]), rows)
