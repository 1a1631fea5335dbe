"""What a recipe will make of a model, known before any weight is loaded: exports that cannot hold it refuse at once."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.pipeline.checks import check_recipe, planned_schemes
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, load

TinyModel = Callable[..., Path]
TEXT = {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}}
SEARCH = {"search/mixed_precision": {"budget": 4.6, "candidates": ["w4a16g32", "nf4g32"]}}


def recipe(model: Path, tmp_path: Path, *steps: dict[str, object]) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "pipeline": [TEXT, *steps]}))
    return load(path)


@pytest.mark.parametrize(
    ("steps", "refused"),
    [
        ([{"quantize/rtn": {"scheme": "nf4g32"}}], "nf4g32: this export holds whole numbers"),
        ([{"quantize/rtn": {"scheme": "w4a16g32", "modules": {"*.o_proj": "w4a16g32-asymf16"}}}], r"o_proj: w4a16g32-asymf16"),
        ([SEARCH, {"quantize/rtn": {"scheme": "search"}}], "nf4g32: this export holds whole numbers"),
        ([{"quantize/rtn": {"scheme": "w4a16g32-ic"}}], "w4a16g32-ic: this export holds plain scales along `in`"),
        ([], "no linear is quantized"),
    ],
)
def test_an_export_refuses_what_it_cannot_hold_before_any_work(
    steps: list[dict[str, object]], refused: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    made = recipe(tiny_model("llama"), tmp_path, *steps, {"export/compressed_tensors": None})
    with pytest.raises(QtoolError, match=f"recipe.yaml:.*{refused}"):
        run_recipe(made, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("steps", "options", "refused"),
    [
        ([{"quantize/rtn": {"scheme": "nf4g32"}}], {}, "nf4g32: no type has this grid; .* type: one of f32, .*, q6_k"),
        ([SEARCH, {"quantize/rtn": {"scheme": "search"}}], {}, "nf4g32: no type has this grid"),
        ([{"quantize/rtn": {"scheme": "w8a8"}}], {"type": "q8_0"}, "w8a8: llama.cpp rounds activations in its own way"),
        ([{"quantize/rtn": {"scheme": "nf4g32"}}], {"type": "q4_k"}, "64 columns do not divide into q4_k's blocks of 256"),
    ],
)
def test_a_gguf_file_refuses_what_it_cannot_hold_before_any_work(
    steps: list[dict[str, object]], options: dict[str, str], refused: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    made = recipe(tiny_model("llama"), tmp_path, *steps, {"export/gguf": options})
    with pytest.raises(QtoolError, match=f"recipe.yaml:.*{refused}"):
        run_recipe(made, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_the_plan_is_what_the_run_makes(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    steps = [
        {"quantize/rtn": {"scheme": "w4a16g32", "modules": {"*.down_proj": "w8a8"}, "ignore": ["lm_head", "*.q_proj"]}},
        {"quantize/rtn": {"scheme": "nf4g64", "ignore": ["*_proj"]}},
        {"export/safetensors": None},
    ]
    made = recipe(folder, tmp_path, *steps)
    model = ModelHandle(made.model)
    (planned,) = planned_schemes(model, made.steps[:2])
    run_recipe(recipe(folder, tmp_path, steps[0]), tmp_path / "out", Silent())
    changes = tuple(sorted(path.parent for path in (tmp_path / "out" / "state").glob("*/block_000.safetensors")))
    assert planned == ModelHandle(made.model, changes).schemes()
    assert {str(scheme) for scheme in planned.values()} == {"w4a16g32", "w8a8"}


def test_an_export_is_refused_where_the_runtime_asked_for_cannot_serve_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama", dtype="bfloat16", hidden_size=128, intermediate_size=256)

    def checked(scheme: str, runtime: str) -> None:
        steps: list[dict[str, object]] = [{"quantize/rtn": {"scheme": scheme}}, {"export/gptq": {"runtime": runtime}}]
        check_recipe(recipe(folder, tmp_path, *steps))

    checked("w4a16g32", "vllm")
    checked("w3a16g32", "gptqmodel")
    with pytest.raises(QtoolError, match=r"export/gptq: vllm .* does not serve it: .*w3a16g32.*; quantize so"):
        checked("w3a16g32", "vllm")
    with pytest.raises(QtoolError, match='nothing is known of "vlm" and this export; did you mean "vllm"'):
        checked("w4a16g32", "vlm")


def test_nvfp4_that_was_made_without_text_is_refused_where_a_runtime_joins_linears(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama", dtype="bfloat16", hidden_size=128, intermediate_size=256)
    export = {"export/compressed_tensors": {"runtime": "vllm"}}
    with pytest.raises(QtoolError, match="vllm joins linears .* quantize/rtn without text gives each its own; take"):
        check_recipe(recipe(folder, tmp_path, {"quantize/rtn": {"scheme": "nvfp4"}}, export))
    check_recipe(recipe(folder, tmp_path, {"quantize/gptq": {"scheme": "nvfp4"}}, export))


PERPLEXITY = {"source": "demo:test", "samples": 3, "length": 16}


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        ({"max": 9, "dataset": "demo:tset"}, 'no step measures it on "demo:tset"; did you mean "demo:test"?'),
        ({"baseline": {"results": "none/results.json", "max_drop": 0}}, "the file none/results.json does not exist"),
        ({"baseline": {"results": "STORED", "max_drop": 0}}, "by other options of evaluate/perplexity: length is 16, here 24"),
        ({"dataset": "demo:test", "baseline": {"results": "ELSEWHERE", "max_drop": 0}}, 'has none on "demo:test"'),
    ],
)
def test_a_gate_that_could_not_be_judged_is_refused_before_any_work(
    gate: dict[str, object], refused: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    for name, source in (("stored", "demo:test"), ("elsewhere", "other:test")):
        (tmp_path / name).mkdir()
        row = {"name": "perplexity", "dataset": source, "subject": "compressed", "value": 9.0, "stderr": 0.1, "part": None}
        (tmp_path / name / "results.json").write_text(json.dumps({"schema": 1, "metrics": [row]}))
        step = {"evaluate/perplexity": PERPLEXITY | {"source": source, "an_option_of_older_versions": 1}}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump({"model": "demo", "pipeline": [step]}))
    text = yaml.safe_dump(
        {
            "model": str(tiny_model("llama")),
            "pipeline": [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"evaluate/perplexity": PERPLEXITY | {"length": 24}}],
            "gates": {"perplexity": gate},
        }
    )
    for name in ("stored", "elsewhere"):
        text = text.replace(name.upper(), str(tmp_path / name / "results.json"))
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(QtoolError, match=f"gates: (perplexity|baseline): .*{re.escape(refused)}"):
        run_recipe(load(tmp_path / "r.yaml"), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()
    with pytest.raises(QtoolError, match="no step changes or exports the model"):
        check_recipe(load(tmp_path / "r.yaml", ['pipeline=[{"evaluate/perplexity": {"source": "demo:test", "length": 16}}]',
                                                'gates={"perplexity": {"max": 9}}']))  # fmt: skip


def test_gates_may_change_in_a_finished_run_and_its_work_stands(tiny_model: TinyModel, tmp_path: Path) -> None:
    made = recipe(tiny_model("llama"), tmp_path, {"quantize/rtn": {"scheme": "w4a16g32"}}, {"evaluate/perplexity": PERPLEXITY})
    before = run_recipe(made, tmp_path / "out", Silent())
    strict = load(tmp_path / "recipe.yaml", ['gates={"perplexity": {"max": 1}}'])
    after = run_recipe(strict, tmp_path / "out", Silent())
    assert (before["status"], after["status"]) == ("done", "gate-failed") and after["digest"] == strict.digest != made.digest
    assert after["stages"][1:] == before["stages"][1:]
    assert load(tmp_path / "out" / "recipe.yaml").gates == strict.gates
