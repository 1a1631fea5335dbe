"""The verbs that need no weights: lists, schema, validate, init, doctor, and what every verb does with a mistake."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import qtool
from qtool import recipe, registry
from qtool.cli import doctor
from qtool.cli.init import Goal
from qtool.cli.main import VERBS, app

RECIPE = """\
model: demo
pipeline:
  - quantize/rtn: {scheme: w4a16g128}
  - evaluate/perplexity: {source: demo:test, samples: 2, length: 64}
gates:
  perplexity: {max_increase: 5%}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_shows_every_verb_and_every_verb_has_help() -> None:
    listing = call("--help")
    assert listing.exit_code == 0
    for verb in VERBS:
        assert verb in listing.stdout
        assert call(verb, "--help").exit_code == 0


def test_the_version_is_the_packages() -> None:
    assert call("--version").stdout == f"qtool {qtool.__version__}\n"


def test_methods_lists_every_method_with_its_summary_in_the_order_of_the_kinds() -> None:
    listing = call("methods").stdout
    places = [re.search(rf"^ *{key} ", listing, re.MULTILINE).start() for key in registry.list_methods()]  # type: ignore[union-attr]
    assert places == sorted(places)
    assert all(info.summary[:40] in listing for info in registry.list_methods().values())
    assert all(f"for: {info.purpose[:30]}" in listing for info in registry.list_methods().values())
    assert "costs: seconds, no calibration." in listing
    assert all(guide[:40] in listing for guide in registry.GUIDES.values())


@pytest.mark.parametrize("key", list(registry.list_methods()))
def test_a_method_is_described_with_its_source_and_all_its_options(key: str) -> None:
    described = call("methods", key)
    assert described.exit_code == 0
    assert registry.list_methods()[key].paper in described.stdout
    assert all(option in described.stdout for option in registry.load(key).options.model_fields)


def test_a_method_that_does_not_exist_is_a_mistake_with_the_nearest_name() -> None:
    refused = call("methods", "quantize/gtpq")
    assert refused.exit_code == 2
    assert refused.stderr == 'there is no method "quantize/gtpq"; did you mean "quantize/gptq"?\n'


def test_the_schema_is_json_for_editors() -> None:
    assert json.loads(call("schema").stdout) == json.loads(json.dumps(recipe.schema()))


def test_validate_shows_what_the_recipe_means(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    shown = call("validate", tmp_path / "r.yaml", "--set", "seed=7")
    assert shown.exit_code == 0
    assert "model demo, seed 7" in shown.stdout
    assert "quantize/rtn → evaluate/perplexity" in shown.stdout
    assert "gate perplexity: max_increase 5%" in shown.stdout
    assert recipe.load(tmp_path / "r.yaml", ["seed=7"]).digest in shown.stdout


def test_validate_prints_every_problem_on_stderr_and_exits_2(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace("w4a16g128", "w4", 1).replace("samples", "smaples"))
    refused = call("validate", tmp_path / "r.yaml", "--set", "sede=7")
    assert refused.exit_code == 2 and refused.stdout == ""
    assert refused.stderr.splitlines() == [
        '--set sede=7: there is no "sede"; did you mean "seed"?',
        f'{tmp_path / "r.yaml"}:4: evaluate/perplexity: there is no "smaples"; did you mean "samples"?',
    ]


@pytest.mark.parametrize("goal", list(Goal))
@pytest.mark.parametrize("model", ["demo", "meta-llama/Llama-3.1-8B", "./with: signs #1"])
def test_init_writes_a_commented_recipe_that_validates(goal: Goal, model: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert call("init", "--model", model, "--goal", goal, "--out", path).exit_code == 0
    assert path.read_text().startswith("# mine.yaml: ")
    loaded = recipe.load(path)
    assert loaded.model.path == model and loaded.gates and loaded.steps[-1].method.kind == "export"


def test_init_never_overwrites_and_says_where_it_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    refused = call("init", "--out", path)
    assert refused.exit_code == 2 and "exists already" in refused.stderr and path.read_text() == "mine"
    refused = call("init", "--out", tmp_path / "no" / "folder.yaml")
    assert refused.exit_code == 2 and "cannot be written" in refused.stderr


def test_doctor_names_versions_and_the_machine() -> None:
    shown = call("doctor")
    assert shown.exit_code == 0
    for word in ("torch", "transformers", "lm-eval", "cupy", "processor", "memory", "free disk", "GPU", "fast on the CPU"):
        assert word in shown.stdout
    if not torch.cuda.is_available():
        assert re.search("fast on a GPU +nothing: torch sees no CUDA GPU", shown.stdout)


def test_doctor_tells_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (*doctor.PARTS, doctor.Part(("surely-not-installed",), "nothing"))
    monkeypatch.setattr(doctor, "PARTS", parts)
    shown = call("doctor")
    assert shown.exit_code == 2
    assert shown.stderr == "qtool cannot run without surely-not-installed; pip install surely-not-installed\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml: the file does not exist"),
        (("eval", "demo"), "--source or --tasks"),
        (("eval", "demo", "--length", "64"), "name it with --source"),
        (("eval", "demo", "--source", "demo:tset"), "there is no demo:tset; valid: demo:calibration"),
        (("eval", "demo", "--source", "demo:test", "--set", "pipeline.2.x=1"), "the pipeline has no step 2"),
        (("export", ".", "--format", "safetensor"), 'there is no "safetensor"; did you mean "safetensors"'),
        (("export", ".", "--format", "safetensors"), "no run folder"),
    ],
)
def test_a_mistake_is_one_message_on_stderr_and_exit_2(arguments: tuple[str, ...], says: str) -> None:
    refused = call(*arguments)
    assert refused.exit_code == 2
    assert says in refused.stderr and "Traceback" not in refused.stderr


def test_an_internal_fault_is_not_taken_for_a_mistake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a broken invariant")

    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.setattr(recipe, "load", fail)
    broken = call("validate", tmp_path / "r.yaml")
    assert broken.exit_code == 1 and isinstance(broken.exception, AssertionError)
