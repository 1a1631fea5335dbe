"""KIVI in a recipe: what later steps and exports see, what is stored, what is refused before any work."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qtool
from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme
from qtool.methods.quantize.kivi import KiviOptions, kivi
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import KiviLayer
from qtool.model.store import load_changes
from qtool.options import ModelOptions
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.plan import make_plan
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, parse

TinyModel = Callable[..., Path]
KIVI = "quantize/kivi: {key_bits: 2, value_bits: 2, group: 16, residual: 8, sinks: 2}"
SCHEME = KiviScheme(group=16, residual=8, sinks=2)
TEXT = "calibrate/text: {source: demo:calibration, samples: 2, length: 40}"


def recipe_of(folder: Path, *steps: str) -> Recipe:
    return parse("\n".join([f"model: {folder}", "pipeline:", *(f"  - {step}" for step in steps)]), "r")


def test_two_groups_worked_by_hand() -> None:
    """Sixteen tokens of one channel, 0 to 15: a step of 5 from 0. A token's sixteen channels, 0 to 3: every one a level."""
    k = torch.arange(16.0).view(1, 1, 16, 1).expand(1, 1, 16, 16)
    v = torch.arange(16.0).remainder(4).expand(1, 1, 16, 16)
    found_k, found_v = kivi(k, v, KiviOptions(group=16, residual=0))
    expected = [0, 0, 0, 5, 5, 5, 5, 5, 10, 10, 10, 10, 10, 15, 15, 15]
    assert found_k[0, 0, :, 3].tolist() == expected and torch.equal(found_v, v)


def test_the_loaded_export_decodes_what_was_measured(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, measured = tiny_model("llama"), "evaluate/perplexity: {source: demo:test, samples: 2, length: 40}"
    recipe = recipe_of(folder, KIVI, TEXT, "quantize/gptq: {scheme: w4a16g32}", measured, "export/qtool: {}")
    planned = make_plan(recipe)
    assert planned.cache == str(SCHEME) and [why for _, why in planned.exports[0].runtimes] == [None]
    assert planned.cache_bytes == 2 * 2 * 2 * (16 * 2 / 8 + 4)  # blocks, heads, keys and values; codes, scale and zero
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert results["model"]["cache"] == str(SCHEME)
    perplexity = {row["subject"]: row["value"] for row in results["metrics"] if row["name"] == "perplexity"}
    assert perplexity["compressed"] == perplexity["export:qtool"] != perplexity["original"]

    export = tmp_path / "run" / "exports" / "qtool"
    read = ModelHandle(ModelOptions(path=str(export)))
    assert read.cache() == SCHEME
    assert sum(file.stat().st_size for file in export.iterdir()) <= planned.exports[0].bytes
    model, tokens = qtool.load(export), torch.randint(2, 4096, (1, 30), generator=torch.Generator().manual_seed(0))
    out = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, return_dict_in_generate=True)
    again = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
    assert torch.equal(out.sequences, again)
    assert all(isinstance(layer, KiviLayer) for layer in out.past_key_values.layers)

    # GPTQ saw the rounded cache: with the cache as it was it finds other codes.
    run_recipe(recipe_of(folder, TEXT, "quantize/gptq: {scheme: w4a16g32}"), tmp_path / "plain", Silent())
    codes = []
    for run in ("run", "plain"):
        (state,) = (tmp_path / run / "state").glob("*-quantize-gptq")
        changes = load_changes(state / "block_000.safetensors")
        codes.append([changes[f"model.layers.0.self_attn.{name}.weight"][0].codes for name in ("q_proj", "o_proj")])  # type: ignore[index,union-attr]
    assert torch.equal(codes[0][0], codes[1][0]) and not torch.equal(codes[0][1], codes[1][1])


def test_a_cache_alone_is_exported_beside_dense_weights(tiny_model: TinyModel, tmp_path: Path, logits_of: Callable) -> None:
    folder = tiny_model("llama")
    with pytest.raises(QtoolError, match="export/qtool: no linear is quantized"):
        check_recipe(recipe_of(folder, "export/qtool: {}"))
    recipe = recipe_of(folder, "quantize/kivi: {group: 16, residual: 0}", "export/qtool: {}")
    results = run_recipe(recipe, tmp_path / "run", Silent())
    read = ModelHandle(ModelOptions(path=str(tmp_path / "run" / "exports" / "qtool")))
    assert str(read.cache()) == results["model"]["cache"] == "kivi-k2v2g16r0" and read.schemes() == {}
    plain = logits_of(ModelHandle(ModelOptions(path=str(folder))))
    assert float((logits_of(read) - plain).norm() / plain.norm()) > 0.01


def test_a_run_that_was_stopped_goes_on(tiny_model: TinyModel, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_model("llama"), KIVI)
    run_recipe(recipe, tmp_path / "run", Silent())
    (state,) = (tmp_path / "run" / "state").glob("*-quantize-kivi")
    assert load_changes(state / "block_001.safetensors") == {"model.layers.1.self_attn": SCHEME}
    for name in ("block_001.safetensors", "block_001.json", "done.json"):
        (state / name).unlink()
    assert run_recipe(recipe, tmp_path / "run", Silent())["model"]["cache"] == str(SCHEME)
    assert load_changes(state / "block_001.safetensors") == {"model.layers.1.self_attn": SCHEME}


@pytest.mark.parametrize(
    "name", ["compressed_tensors", "safetensors", "gguf", "gptq", "awq", "hqq", "mlx", "onnx", "bitsandbytes", "torchao"]
)
def test_other_exports_refuse_it(name: str, tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match=f"export/{name} cannot hold a cache that KIVI keeps .*; use export/qtool"):
        recipe_of(tiny_model("llama"), "quantize/rtn: {scheme: w4a16g32}", KIVI, f"export/{name}: {{}}")


def test_the_cache_is_quantized_once(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    for second in (KIVI, "quantize/kv_cache: {}"):
        with pytest.raises(QtoolError, match=r"r:4 quantizes the cache already; quantize it once"):
            recipe_of(folder, TEXT, KIVI, second)
    run_recipe(recipe_of(folder, "quantize/rtn: {scheme: w4a16g32}", KIVI, "export/qtool: {}"), tmp_path / "run", Silent())
    export = tmp_path / "run" / "exports" / "qtool"
    with pytest.raises(QtoolError, match=f"quantize/kivi: the model's cache is {SCHEME} already; leave the step away"):
        check_recipe(recipe_of(export, KIVI))
    with pytest.raises(QtoolError, match="export/gptq cannot hold a cache that KIVI keeps; use export/qtool"):
        check_recipe(recipe_of(export, "export/gptq: {}"))


@pytest.mark.parametrize(
    ("family", "fields", "step", "message"),
    [
        ("falcon", {}, KIVI, "self_attention: its attention does not go through transformers' AttentionInterface"),
        ("llama", {}, "quantize/kivi: {}", "self_attn: a head's 16 channels of values do not divide into groups of 32"),
        (
            "llama",
            {"head_dim": 48},
            "quantize/kivi: {group: 16, rotate: hadamard}",
            "hadamard takes heads of a power of two of channels, not 48; use rotate: none",
        ),
    ],
)
def test_what_cannot_be_cached_so_is_refused_before_any_work(
    family: str, fields: dict[str, object], step: str, message: str, tiny_model: TinyModel
) -> None:
    with pytest.raises(QtoolError, match=f"r:3: quantize/kivi: .*{message}"):
        check_recipe(recipe_of(tiny_model(family, **fields), step))


def test_a_transform_comes_before(tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match=r"r:5: transform/smoothquant must .*, which rounding \(r:4\) hides; put it before"):
        recipe_of(tiny_model("llama"), TEXT, KIVI, "transform/smoothquant: {}")


def test_bits_that_no_word_packs_are_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match=r"quantize/kivi: key_bits is 5; valid: 2, 3, 4, 8"):
        recipe_of(tiny_model("llama"), "quantize/kivi: {key_bits: 5}")
