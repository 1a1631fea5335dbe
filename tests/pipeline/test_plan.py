"""The plan: modules, sizes, runtimes and costs told before any weight is loaded, as the run then finds them."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.pipeline.plan import make_plan, spans
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load, parse

TinyModel = Callable[..., Path]
TEXT = "{source: demo:calibration, samples: 4, length: 32}"


def recipe_of(model: object, *steps: str) -> str:
    return "\n".join([f"model: {model}", "pipeline:", *(f"  - {step}" for step in steps)])


def test_the_plan_names_every_linear_once_and_what_becomes_of_it(tiny_model: TinyModel) -> None:
    made = make_plan(
        parse(
            recipe_of(
                tiny_model("llama", num_hidden_layers=3),
                "quantize/rtn: {scheme: w4a16g32, modules: {'*layers.1.*.v_proj': w8a16}, ignore: [lm_head, '*.down_proj']}",
                "export/compressed_tensors: {}",
            ),
            "recipe",
        )
    )
    found = {row.name: (row.count, row.scheme, row.step) for row in made.rows}
    assert found["model.layers.{0-2}.self_attn.q_proj"] == (3, "w4a16g32", "quantize/rtn")
    assert found["model.layers.{0,2}.self_attn.v_proj"] == (2, "w4a16g32", "quantize/rtn")
    assert found["model.layers.1.self_attn.v_proj"] == (1, "w8a16", "quantize/rtn")
    assert found["model.layers.{0-2}.mlp.down_proj"] == (3, "dense", "")
    assert found["lm_head"] == (1, "dense", "")
    assert sum(row.count for row in made.rows) == 3 * 7 + 1


def test_nothing_is_loaded_for_it(tiny_model: TinyModel) -> None:
    """A checkpoint whose weights are cut off after the header can be planned."""
    folder = tiny_model("llama")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    with weights.open("r+b") as file:
        file.seek(header)
        file.write(b"\xff" * (len(whole) - header))  # every weight not a number, which loading would refuse
    recipe = recipe_of(folder, "quantize/rtn: {scheme: w4a16g32}", "export/gptq: {}")
    assert make_plan(parse(recipe, "recipe")).exports[0].bytes > 0


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (["quantize/rtn: {scheme: w4a16g32}"], "gptq"),
        ([f"calibrate/text: {TEXT}", "quantize/spqr: {scheme: w4a16g32, share: 0.3}"], "qtool"),
        ([f"calibrate/text: {TEXT}", "quantize/ptq161: {scheme: w8a16-asym, steps: 0}"], "qtool"),
        (["quantize/rtn: {scheme: w4a16g32}", "factorize/lorc: {rank: 32, weighting: plain}"], "qtool"),
        (["quantize/rtn: {scheme: w4a16g32}", "factorize/lorc: {rank: 32, weighting: plain, dtype: int8}"], "qtool"),
    ],
)
def test_the_size_is_that_of_the_folder_which_the_run_writes(
    steps: list[str], name: str, tiny_model: TinyModel, tmp_path: Path
) -> None:
    recipe = parse(recipe_of(tiny_model("llama", dtype="bfloat16"), *steps, f"export/{name}: {{}}"), "r")
    (export,) = make_plan(recipe).exports
    run_recipe(recipe, tmp_path / "run", Silent())
    written = sum(path.stat().st_size for path in (tmp_path / "run/exports" / name).iterdir())
    # In so small a model the card counts, and what is said of 14 linears with factors or outliers.
    assert written <= export.bytes <= 1.01 * written + 4096 + (18_000 if name == "qtool" else 0)


def test_a_searchs_size_is_at_its_budget(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = parse(
        recipe_of(
            tiny_model("llama", dtype="bfloat16"),
            f"calibrate/text: {TEXT}",
            "search/mixed_precision: {budget: 5.5, candidates: [w4a16g32, w8a16g32]}",
            "quantize/rtn: {scheme: search}",
            "export/compressed_tensors: {}",
        ),
        "recipe",
    )
    made = make_plan(recipe)
    assert {row.scheme for row in made.rows} == {"by search", "dense"}
    run_recipe(recipe, tmp_path / "run", Silent())
    written = sum(path.stat().st_size for path in (tmp_path / "run/exports/compressed_tensors").iterdir())
    assert written <= made.exports[0].bytes <= 1.02 * written + 4096  # the search may stay below its budget


def test_runtimes_that_serve_and_that_do_not(tiny_model: TinyModel) -> None:
    recipe = recipe_of(
        tiny_model("llama", dtype="bfloat16"), "quantize/rtn: {scheme: w4a16g32}", "export/compressed_tensors: {}"
    )
    ((served),) = make_plan(parse(recipe, "recipe")).exports
    outcome = {serving.runtime: why for serving, why in served.runtimes}
    assert outcome["transformers"] is None
    assert "ModelOpt" in str(outcome["tensorrt-llm"])


def test_what_a_run_refuses_is_refused(tiny_model: TinyModel) -> None:
    recipe = recipe_of(tiny_model("llama"), "quantize/rtn: {scheme: w4a16g48}", "export/gptq: {}")
    with pytest.raises(QtoolError, match="do not divide into groups"):
        make_plan(parse(recipe, "recipe"))


def test_more_work_is_told_to_take_longer_and_more_memory(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")

    def cost(text: str, step: str) -> tuple[float, float]:
        made = make_plan(parse(recipe_of(folder, f"calibrate/text: {text}", step), "recipe"))
        return made.costs[1].operations, made.costs[1].memory_bytes

    long = "{source: demo:calibration, samples: 16, length: 64}"
    gptq, tuned = "quantize/gptq: {scheme: w4a16g32}", "quantize/sign_round: {scheme: w4a16g32, steps: 20}"
    assert cost(TEXT, "quantize/rtn: {scheme: w4a16g32}")[0] < cost(TEXT, gptq)[0] < cost(long, gptq)[0]
    assert cost(TEXT, tuned)[0] < cost(TEXT, tuned.replace("20", "200"))[0]
    assert cost(TEXT, gptq)[1] < cost(long, gptq)[1]


@pytest.mark.parametrize(("numbers", "text"), [([3], "3"), ([0, 1, 2], "{0-2}"), ([0, 2, 3, 7], "{0,2-3,7}")])
def test_spans(numbers: list[int], text: str) -> None:
    assert spans(numbers) == text


@pytest.mark.parametrize("name", ["best-w2", "mixed-search"])
def test_recipes_that_ship_can_be_planned(name: str) -> None:
    recipe = load(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    made = make_plan(recipe)
    assert [cost.key for cost in made.costs] == [step.key for step in recipe.steps]
    assert made.seconds > 0 and made.peak_bytes > 2**28 and made.disk_bytes > 0
    assert all(export.bytes > 0 and export.runtimes for export in made.exports)
