"""Factorize sees what quantization took, is kept beside the codes, and goes on to the bit where a run was cut."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.factorize.lorc import LorcOptions, lorc
from qtool.model.handle import ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.options import ModelOptions
from qtool.pipeline.run import describe_model, export_run, finished_run, run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import load

CALIBRATION = {"calibrate/text": {"source": "demo:calibration", "samples": 6, "length": 32}}
SMOOTH = {"transform/smoothquant": {"alpha": 0.5}}
ROUND = {"quantize/rtn": {"scheme": "w3a16g32"}}
TinyModel = Callable[..., Path]
Run = Callable[..., tuple[dict[str, Any], list[ModelHandle]]]


def write_recipe(path: Path, model: Path, *steps: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump({"model": str(model), "pipeline": [CALIBRATION, *steps]}, sort_keys=False))
    return path


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs steps after calibration; returns the results, and the model before and after each step that changes it."""

    def carry_out(model: Path, *steps: dict[str, Any], name: str = "out") -> tuple[dict[str, Any], list[ModelHandle]]:
        recipe = load(write_recipe(tmp_path / f"{name}.yaml", model, *steps))
        results = run_recipe(recipe, tmp_path / name, Silent())
        changes = finished_run(tmp_path / name)[1]
        return results, [ModelHandle(recipe.model, changes[:count]) for count in range(len(changes) + 1)]

    return carry_out


def linears(model: ModelHandle, index: int = 0) -> dict[str, nn.Module]:
    return model.block(index).linears()


def low_rank_of(layer: nn.Module) -> torch.Tensor:
    assert isinstance(layer, QuantLinear) and layer.low_rank is not None
    return layer.low_rank.multiply()


def test_the_error_is_against_the_model_right_before_quantization_transforms_among_it(tiny_model: TinyModel, run: Run) -> None:
    lorc_step = {"factorize/lorc": {"rank": 4, "weighting": "plain"}}
    _, (original, smooth, rounded, repaired) = run(tiny_model("llama"), SMOOTH, ROUND, lorc_step)
    for index in range(2):
        for name, layer in linears(repaired, index).items():
            before, coded = weight_of(linears(smooth, index)[name]), weight_of(linears(rounded, index)[name])
            expected = lorc(before - coded, None, LorcOptions(rank=4, weighting="plain"), lambda text: None)
            assert torch.equal(low_rank_of(layer), expected.stored_in("bfloat16").multiply()), name
            assert torch.equal(layer.qt.dequantize(), coded), name
    name = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(weight_of(linears(original)[name]), weight_of(linears(smooth)[name]))


def test_linears_of_several_quantize_steps_are_made_up_for_and_dense_ones_stay(tiny_model: TinyModel, run: Run) -> None:
    steps = [
        {"quantize/rtn": {"scheme": "w3a16g32", "ignore": ["lm_head", "mlp.*"]}},
        {"evaluate/perplexity": {"source": "demo:test", "samples": 2, "length": 32}},
        {"quantize/gptq": {"scheme": "w4a16", "ignore": ["lm_head", "self_attn.*", "down_proj"]}},
        {"factorize/lorc": {"rank": 32, "weighting": "plain"}},
    ]
    results, models = run(tiny_model("llama"), *steps)
    before, after = linears(models[0]), linears(models[-1])
    for name, layer in after.items():
        W, gone = weight_of(before[name]), weight_of(before[name]) - weight_of(linears(models[-2])[name])
        if name.endswith("down_proj"):
            assert not isinstance(layer, QuantLinear) and torch.equal(weight_of(layer), W)
        elif min(W.shape) == 32:  # all its rank, in bfloat16
            assert float((weight_of(layer) - W).norm()) < 2**-7 * float(gone.norm()), name
        else:
            assert float((weight_of(layer) - W).norm()) < 0.7 * float(gone.norm()), name
    schemes = {row["name"].split(".")[-1]: row["scheme"] for row in results["blocks"]}
    assert schemes["q_proj"] == "w3a16g32 + rank 32" and schemes["up_proj"] == "w4a16 + rank 32"
    assert "down_proj" not in schemes


def test_inputs_are_those_of_the_compressed_model_and_less_of_its_outputs_is_lost(tiny_model: TinyModel, run: Run) -> None:
    folder = tiny_model("llama", hidden_size=96, intermediate_size=144)  # groups of 24: no power of two
    step = {"quantize/rtn": {"scheme": "w3a16g24", "range": "hessian"}}
    rows = {"none": run(folder, step, name="rounded")[0]["blocks"]}
    for weighting in ("plain", "activation", "hessian"):
        choice = {"rank": 8, "weighting": weighting}
        results, models = run(folder, step, {"factorize/lorc": choice}, {"export/safetensors": None}, name=weighting)
        tokens = torch.randint(2, 4096, (4, 32), generator=torch.Generator().manual_seed(0))
        original = models[0].final_hidden(tokens)
        rounded, repaired = (float((model.final_hidden(tokens) - original).square().mean()) for model in models[1:])
        assert repaired < rounded
        assert {row["scheme"] for row in results["blocks"]} == {"w3a16g24 + rank 8"} and results["fallbacks"] == []
        rows[weighting] = results["blocks"]
    for none, activation, hessian in zip(rows["none"][:3], rows["activation"][:3], rows["hessian"][:3], strict=True):
        assert none["name"] == hessian["name"] and "self_attn" in none["name"]  # they read what the original's read
        errors = [row["relative_output_error"] for row in (hessian, activation, none)]
        assert errors == sorted(errors) and errors[0] < 0.8 * errors[2], errors


@pytest.mark.parametrize(("dtype", "scale_bytes", "size"), [("bfloat16", 0, 2), ("float16", 0, 2), ("int8", 4, 1)])
def test_the_factors_are_counted_in_stored_bytes(
    dtype: str, scale_bytes: int, size: int, tiny_model: TinyModel, run: Run, tmp_path: Path
) -> None:
    results, models = run(tiny_model("llama"), ROUND, {"factorize/lorc": {"rank": 5, "dtype": dtype, "weighting": "plain"}})
    plain = describe_model(models[0], models[1])
    shapes = [shape_of(layer) for index in range(2) for layer in linears(models[0], index).values()]
    added = sum(5 * (n_out + n_in) * size + 5 * scale_bytes for n_out, n_in in shapes)
    assert results["model"]["bytes_compressed"] == plain["bytes_compressed"] + added
    n_weights = sum(n_out * n_in for n_out, n_in in shapes)
    assert results["model"]["bits_per_weight"] == pytest.approx(plain["bits_per_weight"] + 8 * added / n_weights)


def test_the_head_and_transposed_weights_and_experts_are_made_up_for(
    tiny_model: TinyModel, run: Run
) -> None:
    for family in ("llama", "gpt2", "mixtral"):
        ignore = [] if family == "llama" else ["lm_head"]
        steps = {"quantize/rtn": {"scheme": "w3a16g32", "ignore": ignore}}, {"factorize/lorc": {"rank": 8}}
        results, models = run(tiny_model(family, tie_word_embeddings=False), *steps, name=family)
        assert {row["scheme"] for row in results["blocks"]} == {"w3a16g32 + rank 8"}
        for name, layer in linears(models[-1], 1).items():
            W = weight_of(linears(models[0], 1)[name])
            assert float((weight_of(layer) - W).norm()) < float((layer.qt.dequantize() - W).norm()), (family, name)
        if family == "llama":
            with models[-1].outer():
                low_rank_of(models[-1].model.get_submodule("lm_head"))


@pytest.mark.parametrize("after", [6, 8, 9, 10])
def test_a_run_cut_in_its_factorize_step_ends_with_the_same_bits(
    after: int, tiny_model: TinyModel, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    steps = [SMOOTH, {"quantize/rtn": {"scheme": "w3a16g32", "ignore": []}}, {"factorize/lorc": {"rank": 4, "dtype": "int8"}}]
    model = tiny_model("llama", dtype="bfloat16")
    recipe = load(write_recipe(tmp_path / "recipe.yaml", model, *steps, {"export/safetensors": None}))
    whole = run_recipe(recipe, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe, tmp_path / "cut", interrupted(after))
    done = sorted(path.name for path in (tmp_path / "cut" / "state" / "03-factorize-lorc").glob("*.safetensors"))
    assert len(done) == {6: 0, 8: 2, 9: 3, 10: 3}[after]  # calibration 1, smoothing 2, rounding 3, then 3 of its own
    again = run_recipe(recipe, tmp_path / "cut", Silent())
    assert again["exports"] == whole["exports"]
    assert [drop_seconds(row) for row in again["blocks"]] == [drop_seconds(row) for row in whole["blocks"]]
    units = sorted(path.name for path in (tmp_path / "whole" / "state" / "03-factorize-lorc").glob("*.safetensors"))
    assert units == ["block_000.safetensors", "block_001.safetensors", "outer.safetensors"]
    for unit in units:
        files = [tmp_path / name / "state" / "03-factorize-lorc" / unit for name in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def drop_seconds(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "seconds"}


def test_a_dense_export_holds_the_sum_and_says_that_it_is_not_lossless(
    tiny_model: TinyModel, run: Run, tmp_path: Path
) -> None:
    results, models = run(tiny_model("llama"), ROUND, {"factorize/lorc": {"rank": 8}}, {"export/safetensors": None})
    assert [row["lossless"] for row in results["exports"]] == [False]
    exported = ModelHandle(ModelOptions(path=str(tmp_path / "out" / "exports" / "safetensors")))
    for name, layer in linears(exported, 1).items():
        assert torch.equal(weight_of(layer), weight_of(linears(models[-1], 1)[name])), name
    tokens = torch.randint(2, 4096, (2, 16), generator=torch.Generator().manual_seed(0))
    # The model is float32: sums in another order.
    torch.testing.assert_close(exported.final_hidden(tokens), models[-1].final_hidden(tokens), rtol=1e-4, atol=1e-4)


def test_an_export_of_codes_refuses_before_it_writes(tiny_model: TinyModel, run: Run, tmp_path: Path) -> None:
    run(tiny_model("llama"), ROUND, {"factorize/lorc": {"rank": 8}})
    with pytest.raises(QtoolError, match=r"export/compressed_tensors cannot hold the low-rank factors of model\.layers\.0\."):
        export_run(tmp_path / "out", "compressed_tensors", None, Silent())
    assert not (tmp_path / "out" / "exports").exists()


def test_more_rank_than_a_linear_has_is_refused_before_any_work(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "recipe.yaml", tiny_model("llama"), ROUND, {"factorize/lorc": {"rank": 33}})
    message = r"recipe\.yaml:\d+: factorize/lorc: model\.layers\.0\.self_attn\.k_proj: rank 33 is more than its 32; use 32"
    with pytest.raises(QtoolError, match=message):
        run_recipe(load(path), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()


def test_a_step_that_leaves_no_quantized_linear_is_refused(tiny_model: TinyModel, run: Run) -> None:
    quantize = {"quantize/rtn": {"scheme": "w3a16g32", "ignore": ["lm_head", "mlp.*"]}}
    with pytest.raises(QtoolError, match="ignore leaves none of the 8 quantized linears"):
        run(tiny_model("llama", tie_word_embeddings=True), quantize, {"factorize/lorc": {"ignore": ["self_attn.*"]}})


def test_what_was_quantized_before_training_cannot_be_made_up_for(tiny_model: TinyModel, run: Run) -> None:
    steps = [
        {"quantize/rtn": {"scheme": "w3a16g32", "ignore": ["lm_head", "mlp.*"]}},
        {"distill/logits": {"steps": 1, "batch": 2}},
        {"quantize/rtn": {"scheme": "w3a16g32", "ignore": ["lm_head", "self_attn.*"]}},
        {"factorize/lorc": {"rank": 4}},
    ]
    with pytest.raises(QtoolError, match=r"q_proj was quantized before the last quantize steps began; add it to ignore"):
        run(tiny_model("llama"), *steps)


def test_training_after_it_keeps_the_factors(tiny_model: TinyModel, run: Run, tmp_path: Path) -> None:
    lorc_step, train = {"factorize/lorc": {"rank": 4, "dtype": "int8"}}, {"distill/logits": {"steps": 2, "batch": 2}}
    _, models = run(tiny_model("llama"), ROUND, lorc_step, train)
    for name, layer in linears(models[-1]).items():
        assert torch.equal(low_rank_of(layer), low_rank_of(linears(models[-2])[name])), name
    assert any(json.loads(line)["event"] == "finished" for line in (tmp_path / "out" / "events.jsonl").read_text().splitlines())
