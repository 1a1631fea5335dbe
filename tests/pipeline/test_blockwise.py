"""The blockwise driver gives methods the right inputs, installs what they return, and says what it did."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, load

CALIBRATION = {"source": "demo:calibration", "samples": 6, "length": 32}


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], ModelHandle]]:
    """Runs steps after calibration on a model folder; returns the results and the compressed model."""

    def carry_out(model: Path, *steps: dict[str, Any], name: str = "out") -> tuple[dict[str, Any], ModelHandle]:
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({"model": str(model), "pipeline": [{"calibrate/text": CALIBRATION}, *steps]}, sort_keys=False)
        )
        recipe: Recipe = load(path)
        results = run_recipe(recipe, tmp_path / name, Silent())
        folders = tuple(
            sorted(folder for folder in (tmp_path / name / "state").glob("*-*") if list(folder.glob("*.safetensors")))
        )
        return results, ModelHandle(recipe.model, folders)

    return carry_out


def layers(model: ModelHandle, index: int = 0) -> dict[str, torch.nn.Module]:
    return {name.split(".")[-1]: module for name, module in model.block(index).linears().items()}


def test_every_family_is_quantized_in_all_its_linears(
    family: str, tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model(family)
    results, model = run(folder, {"quantize/gptq": {"scheme": "w4a16g32"}})
    block = model.block(0)
    assert block.linears() and all(isinstance(layer, QuantLinear) for layer in block.linears().values())
    inside = [name for name in model.linear_names() if name.startswith(model.blocks_name)]
    assert {row["name"] for row in results["blocks"]} == set(inside)
    assert all(row["sqnr_db"] > 10 for row in results["blocks"])


def test_rounding_without_data_installs_exactly_the_rounded_weights(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("gpt2")  # Conv1D keeps its weights transposed
    _, model = run(folder, {"quantize/rtn": {"scheme": "w4a16g32", "range": "minmax"}})
    original = ModelHandle(ModelOptions(path=str(folder)))
    for name, layer in layers(original, 1).items():
        scheme = layers(model, 1)[name].scheme
        assert torch.equal(weight_of(layers(model, 1)[name]), quantize(weight_of(layer), scheme).dequantize()), name


def test_the_first_pattern_that_fits_decides_the_scheme(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    modules = {"layers.1.mlp.down_proj": "w8a16", "down_proj": "w3a16g32", "re:.*self_attn.*": "w2a16g64"}
    results, _ = run(
        tiny_model("llama"),
        {"quantize/rtn": {"scheme": "w4a16g32", "modules": modules, "ignore": ["lm_head", "v_proj"]}},
    )
    schemes = {row["name"].removeprefix("model.layers."): row["scheme"] for row in results["blocks"]}
    assert schemes["1.mlp.down_proj"] == "w8a16" and schemes["0.mlp.down_proj"] == "w3a16g32"
    assert schemes["0.self_attn.q_proj"] == "w2a16g64" and schemes["0.mlp.up_proj"] == "w4a16g32"
    assert "0.self_attn.v_proj" not in schemes


def test_later_groups_see_what_earlier_ones_became_only_when_true_sequential(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("llama")
    step = {"scheme": "w2a16g32"}
    _, at_once = run(folder, {"quantize/gptq": step | {"true_sequential": False}}, name="at-once")
    _, in_turn = run(folder, {"quantize/gptq": step | {"true_sequential": True}}, name="in-turn")
    same = {name: torch.equal(weight_of(a), weight_of(layers(in_turn)[name])) for name, a in layers(at_once).items()}
    assert same["q_proj"] and same["k_proj"] and same["v_proj"]
    assert not same["down_proj"]


def test_the_output_error_is_that_of_the_layers_own_inputs(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("llama")
    results, model = run(folder, {"quantize/gptq": {"scheme": "w3a16g32"}})
    original = ModelHandle(ModelOptions(path=str(folder)))
    from qtool.calibration.tokens import TextOptions, read_tokens

    hidden = original.embed(read_tokens(TextOptions(**CALIBRATION), original.tokenizer, 0))
    seen: list[Tensor] = []
    block = original.block(0)
    block.get("model.layers.0.self_attn.q_proj").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    block.forward(hidden)
    x = torch.cat(seen).flatten(0, 1).double()
    before, after = (weight_of(layers(m)["q_proj"]).double() for m in (original, model))
    expected = ((x @ (after - before).T).square().sum() / (x @ before.T).square().sum()).item()
    row = next(row for row in results["blocks"] if row["name"].endswith("0.self_attn.q_proj"))
    assert row["relative_output_error"] == pytest.approx(expected, rel=1e-4)


def test_the_head_is_quantized_when_asked_for(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    results, model = run(tiny_model("llama"), {"quantize/gptq": {"scheme": "w4a16g32", "ignore": []}})
    row = next(row for row in results["blocks"] if row["name"] == "lm_head")
    assert row["relative_output_error"] < 0.05
    with model.outer():
        assert isinstance(model.model.get_submodule("lm_head"), QuantLinear)
        assert model.logits(torch.randn(1, 32, 64)).shape == (1, 32, 4096)


def test_experts_that_no_token_reached_are_counted(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("mixtral", num_local_experts=64, num_experts_per_tok=1)
    results, _ = run(folder, {"quantize/gptq": {"scheme": "w4a16g32"}})
    unreached = [text for text in results["fallbacks"] if "no calibration token" in text]
    assert unreached and all("experts" in text for text in unreached)
    assert not [row for row in results["blocks"] if row["name"].endswith("gate")]


def test_bits_per_weight_is_counted_in_stored_bytes(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    results, model = run(tiny_model("llama"), {"quantize/rtn": {"scheme": "w4a16g32"}})
    assert results["model"]["bits_per_weight"] == pytest.approx(4 + 16 / 32)
    n_quantized = sum(weight_of(layer).numel() for index in range(2) for layer in model.block(index).linears().values())
    saved = results["model"]["bytes_original"] - results["model"]["bytes_compressed"]
    assert saved == n_quantized * 4 - n_quantized * 4.5 / 8  # the tiny model is float32


@pytest.mark.parametrize("short", ["w3a16g32-asym", "nf4g32", "mxfp4", "nvfp4", "mxint8", "mxfp6_e2m3"])
def test_every_format_comes_back_from_disk_as_it_was_made(
    short: str, tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("llama")
    results, model = run(folder, {"quantize/rtn": {"scheme": short, "range": "minmax"}}, {"export/safetensors": None})
    original = ModelHandle(ModelOptions(path=str(folder)))
    before = {name: weight_of(layer) for name, layer in layers(original, 1).items()}
    for name, layer in layers(model, 1).items():
        assert torch.equal(weight_of(layer), quantize(before[name], layer.scheme).dequantize()), name
    assert {row["scheme"] for row in results["blocks"]} == {short}
    exported = ModelHandle(ModelOptions(path=str(folder.parent / "out" / results["exports"][0]["path"])))
    assert all(torch.equal(weight_of(layer), weight_of(layers(model, 1)[n])) for n, layer in layers(exported, 1).items())


def test_drifted_inputs_are_made_up_for_from_the_first_changed_linear_on(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder, step = tiny_model("llama"), {"scheme": "w2a16g32", "ignore": []}
    _, plain = run(folder, {"quantize/gptq": step}, name="plain")
    results, made_up = run(folder, {"quantize/gptq": step | {"alpha": 0.5}}, name="made-up")
    same = {name: torch.equal(weight_of(a), weight_of(layers(made_up)[name])) for name, a in layers(plain).items()}
    assert same["q_proj"] and same["k_proj"] and same["v_proj"]  # the first block's inputs are the original's
    assert not same["o_proj"] and not same["down_proj"]
    assert results["fallbacks"] == [] and any(row["name"] == "lm_head" for row in results["blocks"])


def test_a_mixtures_experts_see_other_tokens_and_say_so(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    results, _ = run(tiny_model("mixtral"), {"quantize/gptq": {"scheme": "w2a16g32", "alpha": 0.5}})
    assert results["fallbacks"] and all("experts" in text and "cannot be paired" in text for text in results["fallbacks"])


def test_blocks_are_tuned_to_the_original_models_outputs_and_feed_the_next(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("llama")
    results, model = run(folder, {"quantize/sign_round": {"scheme": "w3a16g32", "steps": 20}})
    assert all(isinstance(layer, QuantLinear) for index in range(2) for layer in layers(model, index).values())
    assert {row["scheme"] for row in results["blocks"]} == {"w3a16g32"}
    _, rounded = run(folder, {"quantize/rtn": {"scheme": "w3a16g32"}}, name="rounded")
    from qtool.calibration.tokens import TextOptions, read_tokens

    original = ModelHandle(ModelOptions(path=str(folder)))
    tokens = read_tokens(TextOptions(**CALIBRATION), original.tokenizer, 0)
    final = original.final_hidden(tokens)
    errors = [float((handle.final_hidden(tokens) - final).square().mean()) for handle in (model, rounded)]
    assert errors[0] < 0.9 * errors[1]


def test_a_head_outside_the_blocks_is_no_work_for_a_method_of_blocks(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    with pytest.raises(QtoolError, match="lm_head stands outside them; add it to ignore"):
        run(tiny_model("llama"), {"quantize/sign_round": {"scheme": "w4a16g32", "ignore": []}})


def test_linears_that_share_an_input_share_the_scale_of_a_tensor(
    tiny_model: Callable[..., Path], run: Callable[..., tuple[dict[str, Any], ModelHandle]]
) -> None:
    folder = tiny_model("llama")
    model = ModelHandle(ModelOptions(path=str(folder)))
    alone = {name: quantize(weight_of(layer), Scheme.model_validate("nvfp4").weights) for name, layer in layers(model).items()}
    results, model = run(folder, {"quantize/yaqa": {"scheme": "nvfp4", "gradient_tokens": 64}})
    shared = {name: layer.qt.of_tensor for name, layer in layers(model).items() if isinstance(layer, QuantLinear)}
    assert len(shared) == 7 and not results["fallbacks"]
    for names in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",)):
        assert {shared[name] for name in names} == {max(alone[name].of_tensor for name in names)}
