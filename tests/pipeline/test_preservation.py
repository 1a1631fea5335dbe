"""A preservation set in a run: measured on exactly, by every subject, after a kill too, from other runs, or refused early."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from qtool.cli.main import app
from qtool.errors import QtoolError
from qtool.methods.calibrate.preservation import PreservationOptions, preservation
from qtool.model.handle import ModelHandle
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.estimate import estimate
from qtool.pipeline.run import evaluate_target, run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import Recipe, load

CHOOSE = {"source": "demo:calibration", "samples": 6, "preserved": 3, "length": 24, "candidates": 8, "clusters": 2}
MEASURE: dict[str, object] = {"source": "preservation", "length": 24}


def recipe_of(folder: Path, model: Path, *steps: Mapping[str, object]) -> Recipe:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "pipeline": list(steps)}))
    return load(path)


def perplexities(results: dict[str, Any]) -> dict[str, float]:
    rows = [row for row in results["metrics"] if (row["name"], row["dataset"]) == ("perplexity", "preservation")]
    return {row["subject"]: row["value"] for row in rows}


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture
def recipe(tmp_path: Path, model: Path) -> Recipe:
    prune: dict[str, object] = {"prune/wanda": {"sparsity": 0.5, "pattern": None}}
    choose, export = {"calibrate/preservation": CHOOSE}, {"export/safetensors": None}
    return recipe_of(tmp_path, model, choose, prune, {"evaluate/perplexity": MEASURE}, export)


def test_every_subject_is_measured_on_exactly_the_set_and_other_runs_may_name_it(
    recipe: Recipe, model: Path, tmp_path: Path
) -> None:
    found = perplexities(run_recipe(recipe, tmp_path / "out", Silent()))
    assert set(found) == {"original", "compressed", "export:safetensors"}
    assert found["compressed"] > 0 and found["compressed"] != found["original"]
    handle = ModelHandle(recipe.model)
    options = PreservationOptions.model_validate(CHOOSE)
    windows = preservation(handle, options, recipe.seed)[options.places()]
    rows = [json.loads(line) for line in (tmp_path / "out" / "preservation.jsonl").read_text().splitlines()]
    assert [row["ids"] for row in rows] == windows.tolist()
    with handle.materialized() as module:
        losses = [float(module(window[None], labels=window[None]).loss) for window in windows]
    assert found["original"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)

    again = perplexities(evaluate_target(str(tmp_path / "out"), [recipe.steps[2]], Silent(), device="cpu"))
    assert again == {name: found[name] for name in ("original", "compressed")}
    other: dict[str, object] = {"evaluate/perplexity": MEASURE | {"folder": str(tmp_path / "out")}}
    elsewhere = run_recipe(recipe_of(tmp_path, model, other), tmp_path / "other", Silent())
    assert perplexities(elsewhere) == {"original": found["original"]}
    mixed = {"sources": [{"source": "preservation", "folder": str(tmp_path / "out")}], "samples": 3, "length": 24}
    wanda = {"prune/wanda": {"sparsity": 0.5, "pattern": None}}
    tokens = recipe_of(tmp_path, model, {"calibrate/mixture": mixed}, wanda).steps[0]
    assert sorted(tokens.method.run(handle, tokens.options, 0).tolist()) == sorted(windows.tolist())


def test_a_killed_run_ends_with_the_same_set_and_figures(
    recipe: Recipe, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    whole = run_recipe(recipe, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "cut", interrupted(2))  # in the first block
    cut = run_recipe(recipe, tmp_path / "cut", Silent())
    assert perplexities(cut) == perplexities(whole)
    first, second = ((tmp_path / name / "preservation.jsonl").read_bytes() for name in ("whole", "cut"))
    assert first == second


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"length": 32}, "evaluate/perplexity: length is 32, the preservation set has 24; set length: 24"),
        ({"samples": 4}, "evaluate/perplexity: samples is 4, the preservation set has 3; set samples: 3"),
        ({"folder": "nowhere"}, "source: preservation: nowhere has no preservation.jsonl; name a run of"),
        ({"split": "test", "folder": "."}, "source: preservation says its config, split, field and revision itself"),
    ],
)
def test_what_the_set_will_not_hold_is_known_before_any_work(
    stated: dict[str, object], message: str, model: Path, tmp_path: Path
) -> None:
    wrong = recipe_of(tmp_path, model, {"calibrate/preservation": CHOOSE}, {"evaluate/perplexity": MEASURE | stated})
    with pytest.raises(QtoolError, match=message):
        check_recipe(wrong)


def test_without_a_step_that_chooses_there_is_no_set(model: Path, tmp_path: Path) -> None:
    late = recipe_of(tmp_path, model, {"evaluate/perplexity": MEASURE}, {"calibrate/preservation": CHOOSE})
    with pytest.raises(QtoolError, match="nothing here chooses such windows; put calibrate/preservation before the step"):
        check_recipe(late)
    with pytest.raises(QtoolError, match="windows of a preservation set stand alone and have no domain"):
        recipe_of(tmp_path, model, {"calibrate/preservation": CHOOSE}, {"evaluate/perplexity": MEASURE | {"stride": 4}})


def test_another_tokenizers_ids_and_a_damaged_file_are_refused(model: Path, tmp_path: Path) -> None:
    step = recipe_of(tmp_path, model, {"evaluate/perplexity": MEASURE | {"folder": str(tmp_path)}})
    file = tmp_path / "preservation.jsonl"
    for content, message in (
        ({"ids": [5] * 24, "text": "other"}, "its ids are another tokenizer's"),
        ({"ids": [99_999] * 24, "text": "other"}, "its ids are another tokenizer's"),
        ({"ids": [5] * 20, "text": "other"}, "its windows have 20 tokens, length is 24; set length: 20"),
        ({"text": "other"}, "is not as a run wrote it"),
    ):
        file.write_text(json.dumps(content) + "\n")
        with pytest.raises(QtoolError, match=message):
            check_recipe(step)


def test_a_plan_counts_the_set(recipe: Recipe) -> None:
    costs = {cost.key: cost for cost in estimate(ModelHandle(recipe.model), recipe.steps, 0, {"export/safetensors": 1})}
    assert costs["evaluate/perplexity"].operations > 0


def test_a_guard_of_each_class_fails_the_run_for_the_one_that_loses_and_names_it(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "two.jsonl"
    code, prose = "for i in range(10):\n    total += i\n" * 30, "The quick brown fox jumps over a lazy dog. " * 30
    text.write_text("".join(json.dumps({"text": one, "kind": kind}) + "\n" for one, kind in ((code, "code"), (prose, "prose"))))
    measure = {"source": str(text), "length": 24, "samples": 4, "domain": "kind"}
    choose, prune = {"calibrate/preservation": CHOOSE}, {"prune/magnitude": {"sparsity": 0.5, "pattern": None}}
    recipe = recipe_of(tmp_path, model, choose, prune, {"evaluate/kl_divergence": measure}, {"evaluate/perplexity": MEASURE})
    rows = run_recipe(recipe, tmp_path / "out", Silent())["breakdown"]
    chosen = [row for row in rows if (row["name"], row["subject"]) == ("top1_agreement", "compressed")]
    kept = {row["part"]: row["value"] for row in chosen if row["part"].startswith("domain: ")}
    assert len(set(kept.values())) == 2 and max(kept.values()) < 1
    (tmp_path / "guarded.yaml").write_text(
        "extends: r.yaml\ngates:\n  perplexity: {dataset: preservation, max: 1}\n"
        f"  top1_agreement: {{part: 'domain: *', max_drop: {1 - sum(kept.values()) / 2}}}\n"
    )
    done = CliRunner().invoke(app, ["run", str(tmp_path / "guarded.yaml"), "--out", str(tmp_path / "guarded")])
    assert done.exit_code == 3, done.output
    worse, better = sorted(kept, key=lambda part: kept[part])
    gates = json.loads((tmp_path / "guarded" / "results.json").read_text())["gates"]
    verdicts = {(gate["metric"], gate["part"]): gate["passed"] for gate in gates}
    top1 = "top1_agreement"
    assert verdicts == {("perplexity", None): False, (top1, worse): False, (top1, better): True}
    lines = "".join(done.stdout.split("\n"))  # as a narrow terminal wraps them
    assert f"on {text}, {worse}, allowed".replace(" ", "") in lines.replace(" ", "")
    assert "onpreservation,allowed1" in lines.replace(" ", "")
