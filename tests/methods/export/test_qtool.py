"""qtool's own export: whatever methods make of a linear comes back to the bit, from shards, mixtures and Conv1D too."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.export.qtool import METHOD, QtoolOptions
from qtool.model import writer
from qtool.model.handle import ModelHandle
from qtool.model.sizes import export_size
from qtool.model.store import low_rank_parts
from qtool.options import ModelOptions
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import Recipe, load

Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], Tensor]
ConfigOf = Callable[[Path], dict[str, Any]]
Export = Callable[..., Artifact]
Read = Callable[[Path], ModelHandle]


def all_of(model: ModelHandle) -> dict[str, dict[str, Any]]:
    """What each quantized linear is made of."""
    with model.materialized() as whole:
        layers = {name: layer for name, layer in whole.named_modules() if isinstance(layer, QuantLinear)}
    found: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        factors = {} if layer.low_rank is None else low_rank_parts(layer.low_rank)
        tensors = {**layer.qt.parts(), **{f"low_rank {part}": tensor for part, tensor in factors.items()}}
        found[name] = {part: as_bytes(tensor) for part, tensor in tensors.items()}
        found[name] |= {"facts": layer.qt.facts(), "activations": layer.activations, "bias": layer.bias is not None}
    return found


def as_bytes(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: ModelHandle, model: ModelHandle, logits_of: LogitsOf) -> None:
    expected = all_of(model)
    assert expected and all_of(found) == expected
    assert found.schemes() == model.schemes() and found.additions() == model.additions()
    assert torch.equal(logits_of(found), logits_of(model))


def test_every_feature_comes_back_to_the_bit_and_once_more(
    featured: ModelHandle, export: Export, tmp_path: Path, logits_of: LogitsOf, read: Read, config_of: ConfigOf
) -> None:
    artifact = export("qtool", featured)
    assert artifact.lossless and artifact.format == "qtool"
    assert config_of(artifact.path) == {"quant_method": "qtool", "version": 1}
    found = read(artifact.path)
    assert_same(found, featured, logits_of)
    assert len(found.schemes()) == 14 and set(found.additions().values()) == {"low-rank factors", "outliers", "column scales"}
    assert export("qtool", found, out="again").sha256 == artifact.sha256


def test_facts_lie_beside_the_codes_as_text(featured: ModelHandle, export: Export) -> None:
    path = export("qtool", featured).path / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        facts = json.loads(bytes(file.get_tensor("model.layers.0.mlp.gate_proj.weight::facts").tolist()))
    assert facts["scheme"]["weights"]["scale_dtype"] == "float8_e4m3fn" and facts["facts"]["of_tensor"] != 1
    assert facts["columns"] == [64] and facts["weight"]["codes"] == ["int32", [128, 8]]
    assert facts["low_rank"] == {"left": ["int8", [128, 5]], "right": ["int8", [5, 64]], "scale": ["float32", [5]]}


def test_shards_are_read_as_one(
    featured: ModelHandle, export: Export, logits_of: LogitsOf, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "write_checkpoint", functools.partial(writer.write_checkpoint, shard_bytes=10_000))
    out = export("qtool", featured).path
    assert len(list(out.glob("model-*.safetensors"))) == 3
    assert_same(read(out), featured, logits_of)


@pytest.mark.parametrize("family", ["gpt2", "falcon"])
def test_other_families_come_back_too(
    family: str, tiny_model: TinyModel, quantized: Quantized, export: Export, logits_of: LogitsOf, read: Read
) -> None:
    model = quantized(tiny_model(family), "w3a16g32-asym")
    assert_same(read(export("qtool", model).path), model, logits_of)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_experts_stand_one_by_one_dense_ones_among_them(
    family: str, tiny_mixture: TinyModel, quantized: Quantized, export: Export, logits_of: LogitsOf, read: Read
) -> None:
    schemes = {"layers.1.*.experts.gate_up.1": "nf4g32", "layers.1.*.experts.down.2": "w8a8", "layers.0.*": "w3a16g32"}
    model = quantized(tiny_mixture(family, dtype="bfloat16"), schemes)
    assert_same(read(export("qtool", model).path), model, logits_of)


def test_a_quantized_head_beside_the_embedding_that_it_was_tied_to_comes_back(
    tiny_model: TinyModel, quantized: Quantized, export: Export, logits_of: LogitsOf, read: Read
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), {"lm_head": "w8a16", "*": "w4a16g32"})
    assert_same(read(export("qtool", model).path), model, logits_of)


def test_the_plan_tells_the_size(tiny_model: TinyModel, quantized: Quantized, export: Export) -> None:
    model = quantized(tiny_model("mixtral", dtype="bfloat16"), {"*gate_up*": "nvfp4", "*": "power4g32"})
    told, written = export_size(METHOD, model, model.schemes(), QtoolOptions()), export("qtool", model).bytes
    assert written <= told <= 1.01 * written + 8192  # room for card and manifest


def test_a_dense_model_is_refused(refused: Callable[[str, str, object, str], None]) -> None:
    refused("qtool", "llama", {}, "export/qtool: no linear is quantized; put a quantize step before it")


def test_training_on_top_keeps_the_factors_and_other_exports_refuse_them(
    featured: ModelHandle, export: Export, tmp_path: Path
) -> None:
    folder, name = export("qtool", featured).path, "model.layers.1.self_attn.v_proj"
    text = {"calibrate/text": {"source": "demo:calibration", "samples": 2, "length": 16}}
    distill = {"steps": 1, "batch": 2, "lr": 0.1, "weight_decay": 5.0}  # of what is its own teacher, the decay alone moves it
    steps = [text, {"distill/logits": distill}, {"export/qtool": None}]
    run_recipe(recipe_of(tmp_path, folder, steps), tmp_path / "run", Silent())
    read = ModelHandle(ModelOptions(path=str(tmp_path / "run" / "exports" / "qtool")))
    before, after = all_of(featured), all_of(read)
    assert {of: row["facts"] for of, row in after.items()} == {of: row["facts"] for of, row in before.items()}
    assert {part for part in after[name] if after[name][part] != before[name][part]} == {"scale"}
    assert read.additions() == featured.additions()
    with pytest.raises(QtoolError, match=r"recipe.yaml:.*mlx cannot hold the low-rank factors of .*; use export/qtool or"):
        check_recipe(recipe_of(tmp_path, folder, [{"export/mlx": None}]))


def recipe_of(folder: Path, model: Path, steps: list[dict[str, object]]) -> Recipe:
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": str(model), "pipeline": steps}))
    return load(folder / "recipe.yaml")
