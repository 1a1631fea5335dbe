"""The static cache: scales of what was seen, in the recipe and resumed, and what it refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.errors import QtoolError
from qtool.methods.quantize.kv_cache import KvCacheOptions, kv_cache
from qtool.model.handle import ModelHandle
from qtool.model.store import load_changes
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

TinyModel = Callable[..., Path]


def refuse(text: str) -> None:
    raise AssertionError(text)


def test_scales_are_those_of_plain_hooks_on_the_rotated_keys(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    text = "calibrate/text: {source: demo:calibration, samples: 3, length: 32}"
    recipe = parse(f"model: {folder}\npipeline:\n  - {text}\n  - quantize/kv_cache: {{format: int8}}\n", "r")
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert results["model"]["cache"] == "int8"
    (state,) = (tmp_path / "run" / "state").glob("*-quantize-kv_cache")
    found = load_changes(state / "block_000.safetensors")["model.layers.0.self_attn"]

    # An independent second form: the keys that transformers itself puts into its cache.
    from qtool.calibration.tokens import TextOptions, read_tokens

    model = ModelHandle(ModelOptions(path=str(folder)))
    tokens = read_tokens(TextOptions(source="demo:calibration", samples=3, length=32), model.tokenizer, 0)
    with model.materialized() as whole, torch.no_grad():
        cache = whole(tokens, use_cache=True).past_key_values
    assert float(found.k_scale) == pytest.approx(float(cache.layers[0].keys.abs().max()) / 127.5, rel=1e-6)
    assert float(found.v_scale) == pytest.approx(float(cache.layers[0].values.abs().max()) / 127.5, rel=1e-6)


def test_zeros_get_a_scale_and_are_told() -> None:
    notes: list[str] = []
    found = kv_cache(torch.zeros(2, 4), torch.ones(2, 4), torch.bfloat16, KvCacheOptions(), notes.append)
    assert float(found.k_scale) == 1 and float(found.v_scale) == pytest.approx(1 / 448, rel=2**-8)
    assert notes == ["all keys are zero; they get a scale of 1"] and found.k_scale.dtype == torch.bfloat16


def test_what_is_not_finite_is_refused() -> None:
    k = torch.tensor([[1.0, float("inf")]])
    with pytest.raises(QtoolError, match="keys hold NaN or infinity"):
        kv_cache(k, torch.ones(1, 2), torch.float32, KvCacheOptions(), refuse)


def test_a_run_that_was_stopped_goes_on_with_the_same_scales(tiny_model: TinyModel, tmp_path: Path) -> None:
    steps = "calibrate/text: {source: demo:calibration, samples: 2, length: 32}", "quantize/kv_cache: {}"
    lines = "\n".join(f"  - {step}" for step in steps)
    recipe = parse(f"model: {tiny_model('llama')}\npipeline:\n{lines}\n", "r")
    run_recipe(recipe, tmp_path / "run", Silent())
    (state,) = (tmp_path / "run" / "state").glob("*-quantize-kv_cache")
    expected = (state / "block_001.safetensors").read_bytes()
    for name in ("block_001.safetensors", "block_001.json", "done.json"):
        (state / name).unlink()
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert (state / "block_001.safetensors").read_bytes() == expected
    assert results["model"]["cache"] == "e4m3"


def test_a_cache_is_a_step_of_its_own(tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match="w8a8kv8: the cache is a step of its own, quantize/kv_cache; leave kv8 away"):
        parse(f"model: {tiny_model('llama')}\npipeline:\n  - quantize/rtn: {{scheme: w8a8kv8}}\n", "r")
    with pytest.raises(QtoolError, match="quantize/kv_cache needs calibration text"):
        parse(f"model: {tiny_model('llama')}\npipeline:\n  - quantize/kv_cache: {{}}\n", "r")
