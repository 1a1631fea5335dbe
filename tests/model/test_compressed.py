"""The reader of compressed-tensors checkpoints: takes what the library itself wrote, refuses what it cannot decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus, apply_quantization_config
from transformers import AutoModelForCausalLM

from qtool.errors import QtoolError
from qtool.formats.integer import IntegerGrid
from qtool.formats.packing import pack_int32, unpack_int32
from qtool.formats.tensor import to_groups
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.export.compressed_tensors import CompressedTensorsOptions, compressed_tensors
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def save_by_the_library(folder: Path, out: Path, target: str, weights: dict[str, Any], activations: Any) -> None:
    """Quantize a checkpoint's block linears with compressed-tensors' own code and save it with its own layout."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    group = {"targets": [target], "weights": weights | {"type": "int"}, "input_activations": activations}
    config = QuantizationConfig.model_validate({"config_groups": {"g": group}, "ignore": ["lm_head"]})
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            grid = IntegerGrid(weights["num_bits"], weights["symmetric"], "float32")
            params = grid.fit(to_groups(module.weight.detach(), weights.get("group_size")))
            module.weight_scale.data = params.scale.squeeze(-1)
            if params.zero is not None:
                signed = params.zero.squeeze(-1) - (1 << (weights["num_bits"] - 1))
                module.weight_zero_point.data = signed.to(torch.int8)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((folder / file).read_bytes())


@pytest.mark.parametrize("target", ["Linear", r"re:.*(attn|mlp)\..*_proj"])
@pytest.mark.parametrize(
    ("weights", "activations"),
    [
        ({"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}, None),
        ({"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": 32}, None),
        ({"num_bits": 3, "symmetric": False, "strategy": "channel"}, None),
        ({"num_bits": 8, "symmetric": True, "strategy": "channel"}, ACTIVATIONS),
    ],
)
def test_it_reads_what_the_library_wrote(
    target: str, weights: dict[str, Any], activations: Any, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    save_by_the_library(folder, tmp_path / "out", target, weights, activations)
    original, model = ModelHandle(ModelOptions(path=str(folder))), ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    grid = IntegerGrid(weights["num_bits"], weights["symmetric"], "float32")
    for before, after in zip(original.blocks(), model.blocks(), strict=True):
        for name, linear in before.linears().items():
            layer = after.get(name)
            assert isinstance(layer, QuantLinear)
            grouped = to_groups(weight_of(linear), weights.get("group_size"))
            assert torch.equal(weight_of(layer), grid.snap(grouped, grid.fit(grouped)).flatten(1))
            assert (layer.activations is None) == (activations is None)
    assert "lm_head" not in model.schemes()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 200])
def test_words_are_packed_as_the_library_packs_them(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(bits))
    words = pack_int32(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - (1 << (bits - 1))).to(torch.int8), bits))
    assert torch.equal(unpack_int32(words, bits, columns), codes.to(torch.int16))


@pytest.fixture
def packed(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], tmp_path: Path) -> Path:
    out = tmp_path / "packed"
    out.mkdir()
    compressed_tensors(quantized(tiny_model("llama"), "w4a16g32"), out, CompressedTensorsOptions())
    return out


def change_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> ModelHandle:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    return ModelHandle(ModelOptions(path=str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quant_method="gptq"), "quantization by gptq cannot be read; compressed-tensors can"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["other"]), "q_proj is quantized, but no group"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(type="float"), "float group weights cannot be read"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), "int block weights cannot"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "contradict each other"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "8 words do not hold 64 codes of 3"),
        (
            lambda c: c["config_groups"]["group_0"].update(input_activations=ACTIVATIONS | {"dynamic": False}),
            "only int activations scaled at run time",
        ),
    ],
)
def test_what_it_cannot_decode_is_refused(change: Callable[[dict[str, Any]], None], message: str, packed: Path) -> None:
    model = change_config(packed, change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


def test_only_the_block_that_is_asked_for_is_loaded(packed: Path) -> None:
    model = ModelHandle(ModelOptions(path=str(packed)))
    with model.outer():
        inside = [p for name, p in model.model.named_parameters() if name.startswith("model.layers.")]
        assert inside and all(parameter.is_meta for parameter in inside)
