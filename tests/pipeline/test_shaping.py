"""A step that makes a model smaller: planned, resumed, measured against the original, followed by other steps, exported."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from qtool.errors import QtoolError, RecipeError
from qtool.model.shape import Shape
from qtool.pipeline.plan import make_plan
from qtool.pipeline.run import evaluate_target, export_run, run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import load

TEXT = {"source": "demo:calibration", "samples": 4, "length": 32}


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Callable[..., Path]) -> Callable[..., Path]:
    def write(*steps: dict[str, object], **fields: object) -> Path:
        model = tiny_model("llama", dtype="bfloat16", **{"num_hidden_layers": 4, **fields})
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(model), "pipeline": [{"calibrate/text": TEXT}, *steps]}))
        return path

    return write


SMALLER = (
    {"prune/depth": {"drop": 1}},
    {"prune/width": {"neurons": 96, "heads": 2, "hidden": 48}},
)
MEASURED = ({"evaluate/kl_divergence": TEXT | {"source": "demo:test"}}, {"export/safetensors": None})


def exported(out: Path) -> bytes:
    return (out / "exports" / "safetensors" / "model.safetensors").read_bytes()


def test_steps_after_it_work_on_the_smaller_model_and_exports_are_ordinary(recipe: Callable[..., Path], tmp_path: Path) -> None:
    after = ({"quantize/gptq": {"scheme": "w4a16g16"}}, {"distill/logits": {"steps": 2, "batch": 2}})
    path = recipe(*SMALLER, *after, *MEASURED)
    plan = make_plan(load(path))
    results = run_recipe(load(path), tmp_path / "out", Silent())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exports" / "safetensors")
    assert (plain.config.num_hidden_layers, plain.config.hidden_size, plain.config.intermediate_size) == (3, 48, 96)
    assert results["model"]["parameters_compressed"] == plain.num_parameters() == plan.parameters[1]
    assert results["model"]["parameters"] == plan.parameters[0]
    size = sum(file.stat().st_size for file in (tmp_path / "out" / "exports" / "safetensors").iterdir())
    assert size <= plan.exports[0].bytes <= 1.05 * size  # the smaller the model, the more its card weighs
    kl = {row["subject"]: row["value"] for row in results["metrics"] if row["name"] == "kl_divergence"}
    assert kl["original"] == 0 and kl["compressed"] > 0
    assert kl["export:safetensors"] == pytest.approx(kl["compressed"], rel=0.05)  # 16 bits, joined in another order
    shape = next(stage["shape"] for stage in results["stages"] if stage["name"] == "prune/width")
    assert Shape(**shape["after"]) == Shape(blocks=3, hidden=48, heads=2, kv_heads=2, neurons=96, experts=0)


def test_interrupts_anywhere_change_no_bit(
    recipe: Callable[..., Path], tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    path = recipe(*SMALLER, MEASURED[1])
    run_recipe(load(path), tmp_path / "whole", Silent())
    for after in (3, 7, 5):  # while depth looks, while it writes its units, while width looks
        with pytest.raises(KeyboardInterrupt):
            run_recipe(load(path), tmp_path / "cut", interrupted(after))
    run_recipe(load(path), tmp_path / "cut", Silent())
    assert exported(tmp_path / "cut") == exported(tmp_path / "whole")


def test_units_and_the_choice_that_stand_are_not_made_again(
    recipe: Callable[..., Path], tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    path = recipe(SMALLER[0], MEASURED[1])
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load(path), tmp_path / "out", interrupted(7))  # text, four blocks looked at, two written
    state = tmp_path / "out" / "state" / "01-prune-depth"
    before = {name: (state / name).stat().st_mtime_ns for name in ("cut.json", "block_000.safetensors")}
    assert not (state / "config.json").exists()
    run_recipe(load(path), tmp_path / "out", Silent())
    assert {name: (state / name).stat().st_mtime_ns for name in before} == before
    whole = exported(tmp_path / "out")
    (state / "done.json").unlink()  # killed after the last unit, before the step was recorded
    run_recipe(load(path), tmp_path / "out", Silent())
    assert {name: (state / name).stat().st_mtime_ns for name in before} == before
    assert exported(tmp_path / "out") == whole


def test_a_finished_run_is_measured_and_exported_anew(recipe: Callable[..., Path], tmp_path: Path) -> None:
    run_recipe(load(recipe(*SMALLER, *MEASURED)), tmp_path / "out", Silent())
    again = export_run(tmp_path / "out", "safetensors", tmp_path / "again", Silent())
    assert (again.path / "model.safetensors").read_bytes() == exported(tmp_path / "out")
    found = evaluate_target(str(tmp_path / "out"), load(tmp_path / "out" / "recipe.yaml").steps[3:4], Silent())
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["metrics"] == [row for row in results["metrics"] if not row["subject"].startswith("export")]


def test_zeros_pruned_before_stay_and_rotations_after_it_work(recipe: Callable[..., Path], tmp_path: Path) -> None:
    steps = ({"prune/magnitude": {"sparsity": 0.5}}, {"prune/width": {"hidden": 32}})
    run_recipe(load(recipe(*steps, MEASURED[1])), tmp_path / "out", Silent())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exports" / "safetensors")
    assert float((plain.model.layers[0].mlp.down_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)
    path = recipe({"prune/width": {"hidden": 32}}, {"transform/hadamard": None}, *MEASURED)
    results = run_recipe(load(path), tmp_path / "rotated", Silent())
    assert results["status"] == "done"


def test_tied_heads_stay_tied(recipe: Callable[..., Path], tmp_path: Path) -> None:
    run_recipe(load(recipe({"prune/width": {"hidden": 32}}, *MEASURED, tie_word_embeddings=True)), tmp_path / "out", Silent())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exports" / "safetensors")
    assert plain.lm_head.weight is plain.model.embed_tokens.weight and plain.config.tie_word_embeddings


def test_a_head_that_was_parted_stays_parted(recipe: Callable[..., Path], tmp_path: Path) -> None:
    steps = ({"transform/hadamard": None}, {"prune/width": {"hidden": 32}})
    run_recipe(load(recipe(*steps, *MEASURED, tie_word_embeddings=True)), tmp_path / "out", Silent())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "exports" / "safetensors")
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert not plain.config.tie_word_embeddings


def test_what_cannot_be_is_told_before_any_work(recipe: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"recipe.yaml:\d+: prune/width: 129 neurons are to stay of 128"):
        make_plan(load(recipe({"prune/width": {"neurons": 129}})))
    groups = recipe({"prune/width": {"neurons": 96}}, {"quantize/rtn": {"scheme": "w4a16g128"}})
    with pytest.raises(QtoolError, match="quantize/rtn: model.layers.0.self_attn.q_proj: 64 columns"):
        make_plan(load(groups))
    with pytest.raises(RecipeError, match="prune/depth makes dense weights smaller, but .* quantizes before it; put it first"):
        load(recipe({"quantize/rtn": {"scheme": "w4a16g16"}}, {"prune/depth": {"drop": 1}}))
    run = recipe({"prune/depth": {"drop": 1}})
    run.write_text(yaml.safe_dump({"model": "demo", "pipeline": [{"prune/depth": {"drop": 1}}]}))
    with pytest.raises(RecipeError, match="prune/depth needs calibration text"):
        load(run)
