"""Static scales of inputs: those of plain hooks and of hand-worked ranges, kept by later steps and exports, and refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import qtool
from qtool import registry
from qtool.artifact import Artifact
from qtool.calibration.input_values import InputValues
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.errors import QtoolError
from qtool.formats.inputs import InputScales
from qtool.formats.scheme import ActivationScheme, Scheme, input_fields
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.methods.quantize.inputs import InputsOptions, inputs
from qtool.model.handle import ModelHandle
from qtool.model.store import load_changes
from qtool.options import ModelOptions
from qtool.pipeline.block_scope import make_static
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.plan import make_plan
from qtool.pipeline.run import run_recipe
from qtool.pipeline.work import Work
from qtool.progress import Silent
from qtool.recipe import parse

TinyModel = Callable[..., Path]
TEXT = "calibrate/text: {source: demo:calibration, samples: 3, length: 32}"
Q, K, V = (f"model.layers.0.self_attn.{name}_proj" for name in "qkv")


def recipe_of(folder: Path, *steps: str) -> Any:
    return parse("\n".join([f"model: {folder}", "pipeline:", *(f"  - {step}" for step in steps)]), "r")


def states(out: Path) -> tuple[Path, ...]:
    """The folders of a run's changing steps."""
    return tuple(sorted(path for path in (out / "state").iterdir() if any(path.glob("block_*.safetensors"))))


def scheme_of(word: str) -> ActivationScheme:
    return ActivationScheme.model_validate(input_fields(f"a{word}static"))


def found_for(word: str, x: torch.Tensor, **options: object) -> InputScales:
    scheme = scheme_of(word)
    seen = InputValues(scheme.group)
    seen.update(x)
    return inputs(seen, scheme, torch.float32, InputsOptions.model_validate(options), refuse)


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_scales_are_those_of_plain_hooks_in_a_model_whose_earlier_blocks_have_changed(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    results = run_recipe(
        recipe_of(folder, TEXT, "quantize/rtn: {scheme: w8-aint4asym}", "quantize/inputs: {}"), tmp_path / "run", Silent()
    )
    assert {row["scheme"] for row in results["blocks"]} == {"w8-aint4asymstatic"}
    assert all(row["sqnr_db"] > 0 for row in results["blocks"])  # as rounding has told it
    rounded, static = states(tmp_path / "run")
    before = ModelHandle(ModelOptions(path=str(folder)), (rounded,))
    after = ModelHandle(ModelOptions(path=str(folder)), (rounded, static))
    hidden = before.embed(read_tokens(TextOptions(source="demo:calibration", samples=3, length=32), before.tokenizer, 0))
    for index in range(2):
        caught: dict[str, torch.Tensor] = {}
        block = before.block(index)
        for full in (found for found in block.linears() if found.endswith(("q_proj", "down_proj"))):

            def catch(module: Any, args: Any, full: str = full, caught: dict[str, torch.Tensor] = caught) -> None:
                caught[full] = args[0]

            block.get(full).register_forward_pre_hook(catch)
        block.forward(hidden)
        changes = load_changes(static / f"block_{index:03d}.safetensors")
        for name, x in caught.items():
            low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
            zero = round(-16 * low / (high - low) - 0.5)
            found = changes[f"{name}.inputs"]
            assert isinstance(found, InputScales) and found.zero is not None
            assert int(found.zero) == zero
            assert float(found.scale) == pytest.approx(max(high / (15.5 - zero), -low / (zero + 0.5)), rel=1e-6)
        hidden = after.block(index).forward(hidden)


def test_linears_share_the_scale_of_the_input_that_they_share(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps = (
        "quantize/rtn: {scheme: w8a8, modules: {k_proj: e4m3-ae4m3, gate_proj: w8a16}}",
        "quantize/inputs: {ignore: [v_proj]}",
    )
    results = run_recipe(recipe_of(tiny_model("llama"), TEXT, *steps), tmp_path / "run", Silent())
    words = {row["name"].rsplit(".", 1)[-1]: row["scheme"] for row in results["blocks"]}
    assert words["q_proj"] == words["up_proj"] == "w8-aint8static" and words["k_proj"] == "e4m3-ae4m3static"
    assert words["v_proj"] == "w8a8" and words["gate_proj"] == "w8a16"
    changes = load_changes(states(tmp_path / "run")[-1] / "block_000.safetensors")
    scales = {name.removesuffix(".inputs"): value for name, value in changes.items() if isinstance(value, InputScales)}
    assert len(scales) == 5 and V not in scales
    amax = 127.5 * scales[Q].scale
    assert torch.allclose(scales[K].scale, amax / 448)


def test_ranges_of_few_values_are_those_worked_by_hand() -> None:
    x = torch.arange(-39.0, 61).view(4, 25)  # whole numbers, all of them bfloat16
    assert float(found_for("int8", x).scale) == pytest.approx(60 / 127.5)
    assert float(found_for("e4m3", x).scale) == pytest.approx(60 / 448)
    assert float(found_for("nvfp4", torch.arange(-39.0, 57).view(2, 48)).scale) == 2.0**-4  # above 56 / (224 * 6) = 0.042
    # Of the magnitudes 39 and less stand twice: 80 of 100 values are 40 or less.
    assert float(found_for("int8", x, range="percentile", percentile=80).scale) == pytest.approx(40 / 127.5)
    found = found_for("int4asym", x, range="percentile", percentile=80)  # ten values on each side are left out
    assert found.zero is not None and int(found.zero) == round(16 * 29 / 79 - 0.5) == 5
    assert float(found.scale) == pytest.approx(max(50 / 10.5, 29 / 5.5))
    # Of six groups of 16 the largest magnitudes are 39, 23, 8, 24, 40 and 56.
    groups = torch.arange(-39.0, 57).view(2, 48)
    assert float(found_for("nvfp4", groups, range="percentile", percentile=80).scale) == 2.0**-5  # 40 / (224 * 6) = 0.030


@pytest.mark.parametrize("word", ["int8", "int4", "int4asym", "e4m3"])
def test_the_range_of_least_error_is_that_of_a_search_over_the_tokens_themselves(word: str) -> None:
    random = torch.Generator().manual_seed(3)
    x = (torch.randn(40, 32, generator=random) * torch.rand(40, 1, generator=random).exp() * 3 + 1).to(torch.bfloat16).float()
    x[7] *= 30
    found, scheme = found_for(word, x, range="mse"), scheme_of(word)
    costs = {}
    for k in range(97):
        t = float(x.abs().max()) * 2 ** (-k / 8)
        low, high = max(min(float(x.min()), 0), -t), min(float(x.max()), t)
        params = scheme.grid.fit_range(torch.tensor([low]), torch.tensor([high]))
        tried = InputScales(scheme, params.scale, params.zero)
        error = (snap_inputs(x, scheme, tried) - x).double().square()
        costs[float(params.scale)] = float(error.sum())
    assert costs[float(found.scale)] <= min(costs.values()) * (1 + 1e-6)


@pytest.mark.parametrize(
    ("word", "options"),
    [
        ("int4", {"range": "mse"}),
        ("int4asym", {"range": "mse"}),
        ("int4", {"range": "percentile", "percentile": 99.9}),
        ("int6", {"range": "percentile", "percentile": 99.9}),
        ("int4asym", {"range": "percentile", "percentile": 99.9}),
    ],
)
def test_one_massive_token_does_not_decide_the_scale(word: str, options: dict[str, object]) -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 300
    ordinary = x[1:]

    def error(found: InputScales) -> float:
        return float((snap_inputs(ordinary, found.scheme, found) - ordinary).square().mean())

    assert error(found_for(word, x, **options)) < error(found_for(word, x)) / 10


def test_zeros_get_a_scale_and_are_told_and_one_token_is_enough() -> None:
    for word in ("int8", "int4asym", "e4m3", "nvfp4"):
        notes: list[str] = []
        seen = InputValues(scheme_of(word).group)
        seen.update(torch.zeros(3, 32))
        for choice in ("minmax", "percentile"):
            found = inputs(seen, scheme_of(word), torch.bfloat16, InputsOptions(range=choice), notes.append)
            assert float(found.scale) == 1, word
            assert torch.equal(snap_inputs(torch.zeros(2, 32), found.scheme, found), torch.zeros(2, 32))
        assert notes == 2 * ["all inputs are zero; they get a scale of 1"]
    assert float(found_for("int8", torch.tensor([[0.0, -255.0]]), range="mse").scale) == 2


def test_scales_are_stored_in_the_dtype_of_the_model() -> None:
    seen = InputValues()
    seen.update(torch.tensor([[0.0, 1.0]]))
    assert inputs(seen, scheme_of("int8"), torch.bfloat16, InputsOptions(), refuse).scale.dtype == torch.bfloat16


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(QtoolError, match="inputs hold NaN or infinity"):
        found_for("int8", torch.tensor([[1.0, float("nan")]]))


def test_an_input_that_no_token_came_to_is_told_and_stays_as_it_was(
    tiny_model: TinyModel, quantized: Callable[..., ModelHandle]
) -> None:
    block, work = quantized(tiny_model("llama"), "w8a8").block(0), Work({})
    make_static(block, (Q,), InputValues(), registry.load("quantize/inputs"), InputsOptions(), work)
    layer = block.get(Q)
    assert isinstance(layer, QuantLinear) and layer.inputs is None and work.changes == {}
    assert work.fallbacks == [f"{Q}: no token of the calibration text came here; its inputs are scaled at run time as before"]


def test_the_head_gets_a_scale_where_it_is_quantized_too(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps = "quantize/rtn: {scheme: w8a8, ignore: []}", "quantize/inputs: {ignore: []}", "export/qtool: {}"
    results = run_recipe(recipe_of(tiny_model("llama"), TEXT, *steps), tmp_path / "run", Silent())
    assert {row["scheme"] for row in results["blocks"]} == {"w8-aint8static"} and len(results["blocks"]) == 15
    head = qtool.load(tmp_path / "run" / "exports" / "qtool").lm_head
    assert isinstance(head, QuantLinear) and head.inputs is not None


def test_a_run_that_was_stopped_goes_on_with_the_same_scales(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps = "quantize/rtn: {scheme: nvfp4-anvfp4}", "quantize/inputs: {range: percentile, percentile: 99}"
    recipe = recipe_of(tiny_model("llama"), TEXT, *steps)
    run_recipe(recipe, tmp_path / "run", Silent())
    state = states(tmp_path / "run")[-1]
    expected = (state / "block_001.safetensors").read_bytes()
    for name in ("block_001.safetensors", "block_001.json", "done.json"):
        (state / name).unlink()
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert (state / "block_001.safetensors").read_bytes() == expected
    assert {row["scheme"] for row in results["blocks"]} == {"nvfp4-anvfp4static"}


def test_later_steps_keep_the_scales_and_the_export_brings_them_back_to_the_bit(tiny_model: TinyModel, tmp_path: Path) -> None:
    schemes = "{scheme: w4-aint8asym, modules: {q_proj: nvfp4-anvfp4, o_proj: e4m3-ae4m3}}"
    steps = (
        f"quantize/rtn: {schemes}",
        "quantize/inputs: {}",
        "factorize/lorc: {rank: 2}",
        "distill/logits: {steps: 2, batch: 2}",
    )
    measure = "evaluate/perplexity: {source: demo:test, samples: 2, length: 32}"
    recipe = recipe_of(tiny_model("llama"), TEXT, *steps, "export/qtool: {}", measure)
    results = run_recipe(recipe, tmp_path / "run", Silent())
    found = {row["subject"]: row["value"] for row in results["metrics"] if row["name"] == "perplexity"}
    assert found["export:qtool"] == found["compressed"]
    static = load_changes(states(tmp_path / "run")[1] / "block_000.safetensors")
    model = qtool.load(tmp_path / "run" / "exports" / "qtool")
    for name in (Q, K, "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"):
        layer, scales = model.get_submodule(name), static[f"{name}.inputs"]
        assert isinstance(layer, QuantLinear) and isinstance(scales, InputScales) and layer.inputs is not None
        assert layer.inputs.scheme == scales.scheme and torch.equal(layer.inputs.scale, scales.scale), name
        assert layer.inputs.scale.dtype == scales.scale.dtype
        assert scales.zero is None or (layer.inputs.zero is not None and torch.equal(layer.inputs.zero, scales.zero)), name
        assert layer.low_rank is not None


def test_a_checkpoint_without_its_scales_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model("llama"), TEXT, "quantize/rtn: {scheme: w8a8}", "quantize/inputs: {}", "export/qtool: {}")
    run_recipe(recipe, tmp_path / "run", Silent())
    out = tmp_path / "run" / "exports" / "qtool"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["version"] == 3
    tensors = load_file(out / "model.safetensors")
    save_file({name: t for name, t in tensors.items() if name != f"{Q}.inputs::scale"}, out / "model.safetensors")
    with pytest.raises(QtoolError, match=r"no tensor .*q_proj\.inputs::scale; it is damaged"):
        qtool.load(out)
    save_file(tensors | {f"{Q}.inputs::scale": torch.ones(2)}, out / "model.safetensors")
    with pytest.raises(QtoolError, match=r"q_proj\.inputs::scale is float32 \[2\], must be float32 \[1\]"):
        qtool.load(out)


def test_what_static_scales_do_not_fit_is_refused_before_any_work(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    for steps, options, message in (
        (["quantize/rtn: {scheme: w8a16}"], "{}", "no linear rounds its inputs; quantize to a scheme such as w8a8"),
        (["quantize/rtn: {scheme: w8-aint8g32}"], "{}", "w8-aint8g32: its inputs are rounded by groups, which find"),
        (["quantize/rtn: {scheme: mxfp4-amxfp4}"], "{}", "mxfp4-amxfp4: its inputs are rounded by groups"),
        (
            ["quantize/rtn: {scheme: w8a8}", "quantize/inputs: {}"],
            "{}",
            "w8-aint8static: its inputs have static scales already",
        ),
        (["quantize/rtn: {scheme: nvfp4-anvfp4}"], "{range: mse}", "groups of nvfp4 find their own ranges at run time; use"),
    ):
        with pytest.raises(QtoolError, match=message):
            check_recipe(recipe_of(folder, TEXT, *steps, f"quantize/inputs: {options}"))


def test_an_export_without_a_place_for_the_scales_is_refused_before_any_work(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    for export in ("torchao", "safetensors", "gptq", "awq", "gguf", "bitsandbytes", "onnx", "mlx", "hqq"):
        steps = "quantize/rtn: {scheme: w8a8}", "quantize/inputs: {}", f"export/{export}: {{}}"
        with pytest.raises(QtoolError, match=f"export/{export}: .*w8-aint8static"):
            check_recipe(recipe_of(folder, TEXT, *steps))


def test_static_scales_are_a_step_of_their_own(tiny_model: TinyModel) -> None:
    with pytest.raises(
        QtoolError, match="w8-aint8static: static scales are a step of their own, quantize/inputs; leave static"
    ):
        recipe_of(tiny_model("llama"), "quantize/rtn: {scheme: w8-aint8static}")
    with pytest.raises(QtoolError, match="quantize/inputs needs calibration text"):
        recipe_of(tiny_model("llama"), "quantize/rtn: {scheme: w8a8}", "quantize/inputs: {}")


def test_the_plan_tells_the_scheme_that_will_be_and_its_size(
    tiny_model: TinyModel, tmp_path: Path, export: Callable[..., Artifact]
) -> None:
    steps = "quantize/rtn: {scheme: w8-aint8asym}", "quantize/inputs: {}", "export/qtool: {}"
    recipe = recipe_of(tiny_model("llama"), TEXT, *steps)
    made = make_plan(recipe)
    q_proj = next(row for row in made.rows if row.name.endswith("q_proj"))
    assert (q_proj.scheme, q_proj.step) == ("w8-aint8asymstatic", "quantize/rtn, quantize/inputs")
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert results["exports"][0]["bytes"] <= made.exports[0].bytes <= 1.02 * results["exports"][0]["bytes"] + 8192


@pytest.mark.parametrize("word", ["int8static", "int4asymstatic", "e4m3static", "nvfp4static"])
def test_static_schemes_print_as_the_word_that_they_are_read_from(word: str) -> None:
    assert str(Scheme.model_validate(f"w8-a{word}")) == f"w8-a{word}"
    for bad in ("int8g32static", "mxfp4static"):
        with pytest.raises(ValueError, match="static scales serve whole tokens, or nvfp4"):
            Scheme.model_validate(f"w8-a{bad}")
