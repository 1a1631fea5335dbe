"""Weights train in full precision while what computes is rounded, and what is kept is what computed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.methods.quantize.quantized_distillation import Master
from qtool.model.handle import ModelHandle
from qtool.model.store import load_changes
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load


def test_the_forward_is_rounded_and_the_gradient_passes_as_it_is() -> None:
    random = torch.Generator().manual_seed(0)
    W, G = torch.randn(2, 8, 32, generator=random)
    scheme = Scheme.model_validate("w3a16g16")
    form = Master(W.clone(), scheme)
    out = form()
    assert torch.allclose(out, quantize(W, scheme.weights).dequantize(), atol=1e-6)
    (out * G).sum().backward()
    assert torch.equal(form.w.grad, G)


def test_a_run_stores_codes_that_the_exports_hold(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    step = {"scheme": "w4a16g32", "modules": {"k_proj": "w8a16g32"}, "steps": 3, "batch": 2, "lr": 1e-3}
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 16}},
        {"quantize/quantized_distillation": step},
        {"export/compressed_tensors": {}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    recipe = load(path)
    results = run_recipe(recipe, tmp_path / "out", Silent())
    folder = tmp_path / "out" / "state" / "01-quantize-quantized_distillation"
    schemes = {name: str(scheme) for name, scheme in ModelHandle(recipe.model, (folder,)).schemes().items()}
    assert schemes["model.layers.1.self_attn.k_proj"] == "w8a16g32"
    assert schemes["model.layers.0.mlp.down_proj"] == "w4a16g32" and len(schemes) == 14
    stored = load_changes(folder / "block_000.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(stored, tuple)
    assert results["model"]["bits_per_weight"] < 5.5
    assert {row["scheme"] for row in results["blocks"]} == {"w4a16g32", "w8a16g32"}


def test_rounded_inputs_are_refused(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 2, "length": 16}},
        {"quantize/quantized_distillation": {"scheme": "w8a8", "steps": 1}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama")), "pipeline": steps}))
    with pytest.raises(QtoolError, match="w8a8: inputs stay as they are"):
        run_recipe(load(path), tmp_path / "out", Silent())
