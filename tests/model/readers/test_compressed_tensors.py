"""The reader of compressed-tensors checkpoints: takes what the library itself wrote, refuses what it cannot decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationStatus,
    apply_quantization_config,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.compressed_layouts import unpack_inputs
from qtool.formats.integer import IntegerGrid
from qtool.formats.packing import pack_int32, unpack_int32
from qtool.formats.scheme import ActivationScheme, WeightScheme
from qtool.formats.tensor import to_groups
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

ChangeFile = Callable[[Path, Callable[[dict[str, Any]], None]], ModelHandle]

ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def grouping(weights: dict[str, Any]) -> WeightScheme:
    return WeightScheme(bits=weights["num_bits"], group=weights.get("group_size"))


def save_by_the_library(folder: Path, out: Path, target: str, weights: dict[str, Any], activations: Any) -> None:
    """Quantize a checkpoint's block linears with compressed-tensors' own code and save it with its own layout."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    group = {"targets": [target], "weights": weights | {"type": "int"}, "input_activations": activations}
    config = QuantizationConfig.model_validate({"config_groups": {"g": group}, "ignore": ["lm_head"]})
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            grid = IntegerGrid(weights["num_bits"], weights["symmetric"], "float32")
            params = grid.fit(to_groups(module.weight.detach(), grouping(weights)))
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
            grouped = to_groups(weight_of(linear), grouping(weights))
            assert torch.equal(weight_of(layer), grid.snap(grouped, grid.fit(grouped)).flatten(1))
            assert (layer.activations is None) == (activations is None)
    assert "lm_head" not in model.schemes()


def floats_by_the_library(folder: Path, out: Path, groups: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Round a checkpoint's linears with compressed-tensors' own scales and save them; the weights [out, in] that it decodes."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = QuantizationConfig.model_validate({"config_groups": groups, "ignore": ["lm_head"]})
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        weights, w = scheme.weights, module.weight.detach()
        grouped = w.unflatten(-1, (-1, weights.group_size)) if weights.group_size else w.unsqueeze(1)
        low, high = grouped.amin(-1), grouped.amax(-1)  # [out, groups]
        if weights.strategy == "tensor":
            low, high = low.amin().reshape(1), high.amax().reshape(1)
        shared = generate_gparam(w.amin().reshape(1), w.amax().reshape(1)) if weights.strategy == "tensor_group" else None
        if shared is not None:
            module.weight_global_scale.data = shared
        scale, _ = calculate_qparams(low, high, weights, global_scale=shared)
        module.weight_scale.data = scale.to(module.weight_scale.dtype)
        for part, value in (("input_scale", 0.0625), ("input_global_scale", 300.0)):  # of inputs that are static
            if hasattr(module, part):
                getattr(module, part).data.fill_(value)
        module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (out / file).write_bytes((folder / file).read_bytes())
    compressor.decompress_model(model)
    return {name: m.weight.detach() for name, m in model.named_modules() if hasattr(m, "quantization_scheme")}


def preset(name: str, *targets: str) -> dict[str, Any]:
    return preset_name_to_scheme(name, list(targets)).model_dump()


FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
FLOATS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "nvfp4": ({"g": preset("NVFP4A16", "Linear")}, {"_proj": "nvfp4"}),
    "mxfp4": ({"g": preset("MXFP4A16", "Linear")}, {"_proj": "mxfp4"}),
    "mxfp8": ({"g": preset("MXFP8A16", "Linear")}, {"_proj": "mxfp8_e4m3"}),
    "fp8 by row": ({"g": {"targets": ["Linear"], "weights": FP8 | {"strategy": "channel"}}}, {"_proj": "e4m3"}),
    "fp8 by tensor": ({"g": {"targets": ["Linear"], "weights": FP8 | {"strategy": "tensor"}}}, {"_proj": "e4m3"}),
    "fp8 by group": ({"g": {"targets": ["Linear"], "weights": FP8 | {"group_size": 32}}}, {"_proj": "e4m3g32"}),
    "mixed": (
        {
            "a": preset("NVFP4A16", "re:.*self_attn.*"),
            "b": preset("MXFP4A16", "re:.*(gate|up)_proj"),
            "c": {"targets": ["re:.*down_proj"], "weights": FP8 | {"strategy": "channel"}},
        },
        {"down_proj": "e4m3", "gate_proj": "mxfp4", "up_proj": "mxfp4", "_proj": "nvfp4"},
    ),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_it_reads_floats_that_the_library_wrote(kind: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    groups, schemes = FLOATS[kind]
    decoded = floats_by_the_library(tiny_model("llama", dtype="bfloat16"), tmp_path / "out", groups)
    model = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    assert model.schemes().keys() == decoded.keys()
    for name, scheme in model.schemes().items():
        assert str(scheme) == next(word for ending, word in schemes.items() if name.endswith(ending)), name
    for block in model.blocks():
        for name, layer in block.linears().items():
            assert isinstance(layer, QuantLinear)
            assert torch.equal(weight_of(layer).to(torch.bfloat16), decoded[name]), name


@pytest.mark.parametrize(("name", "word"), [("MXFP4", "mxfp4"), ("MXFP8", "mxfp8_e4m3"), ("FP8_DYNAMIC", "e4m3")])
def test_float_activations_are_read(name: str, word: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    floats_by_the_library(tiny_model("llama", dtype="bfloat16"), tmp_path / "out", {"g": preset(name, "Linear")})
    layer = ModelHandle(ModelOptions(path=str(tmp_path / "out"))).block(0).get("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantLinear) and str(layer.activations) == word


@pytest.mark.parametrize(("name", "word", "scale"), [("NVFP4", "nvfp4static", 1 / 300), ("FP8", "e4m3static", 0.0625)])
def test_static_activations_are_read(
    name: str, word: str, scale: float, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    floats_by_the_library(tiny_model("llama", dtype="bfloat16"), tmp_path / "out", {"g": preset(name, "Linear")})
    layer = ModelHandle(ModelOptions(path=str(tmp_path / "out"))).block(0).get("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, QuantLinear) and layer.inputs is not None
    assert str(layer.inputs.scheme) == word and float(layer.inputs.scale) == pytest.approx(scale, rel=1e-6)


def test_static_scales_that_contradict_the_config_are_refused(packed: Path, change_config: ChangeFile) -> None:
    group = {"input_activations": ACTIVATIONS | {"strategy": "tensor", "dynamic": False}}
    model = change_config(packed, lambda c: c["config_groups"]["group_0"].update(group))
    with pytest.raises(QtoolError, match=r"q_proj: input_scale must be one positive number, not \[\]; calibrate it again"):
        model.block(0)
    scheme = ActivationScheme(bits=8, symmetric=False, static=True)
    for parts, message in (
        ({"input_scale": torch.zeros(1)}, r"input_scale must be one positive number, not \[0.0\]"),
        ({"input_scale": torch.ones(1)}, "input_zero_point must be one number in int8"),
        ({"input_scale": torch.ones(1), "input_zero_point": torch.ones(1)}, "input_zero_point must be one number in int8"),
    ):
        with pytest.raises(QtoolError, match=message):
            unpack_inputs(parts, scheme)
    with pytest.raises(QtoolError, match=r"input_zero_point is \[3\], but inputs have no zero points"):
        unpack_inputs(
            {"input_scale": torch.ones(1), "input_zero_point": torch.tensor([3])}, ActivationScheme(bits=8, static=True)
        )


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 200])
def test_words_are_packed_as_the_library_packs_them(bits: int, columns: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, columns), generator=torch.Generator().manual_seed(bits))
    words = pack_int32(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - (1 << (bits - 1))).to(torch.int8), bits))
    assert torch.equal(unpack_int32(words, bits, columns), codes.to(torch.int16))


@pytest.fixture
def packed(exported: Callable[..., Path]) -> Path:
    return exported("compressed_tensors", "w4a16g32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(quant_method="quip"), "quantization by quip cannot be read; .*compressed-tensors.* can"),
        (lambda c: c["config_groups"]["group_0"].update(targets=["other"]), "q_proj is quantized, but no group"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(type="float"), "float group weights of 4 bits .* cannot"),
        (
            lambda c: c["config_groups"]["group_0"].update(preset("MXFP6A16", "Linear")),
            "float group weights of 6 bits",
        ),
        (
            lambda c: c["config_groups"]["group_0"].update(preset("FP8_BLOCK", "Linear")),
            "float block weights of 8 bits",
        ),
        (
            lambda c: c["config_groups"]["group_0"].update(preset("NVFP4A16", "Linear")),
            "float tensor_group weights of 4",
        ),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(strategy="block"), "int block weights of 4 bits .* cannot"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(symmetric=False), "contradict each other"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "8 words do not hold 64 codes of 3"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="dynamic"), "int group .* without reordering"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=1), "scheme cannot be read: .* one bit"),
        (lambda c: c["config_groups"]["group_0"].update(weights=None), "group_0 quantizes no weights"),
        (lambda c: c["config_groups"].update(W4A16=["Linear"]), "W4A16 quantizes no weights"),
        (lambda c: c["config_groups"]["group_0"].update(output_activations=ACTIVATIONS), "quantized outputs .* cannot be read"),
        (
            lambda c: c.update(kv_cache_scheme=ACTIVATIONS),
            "kv_cache_scheme: a cache of int 8 bits, strategy token, cannot be read",
        ),
        (
            lambda c: c.update(transform_config={"config_groups": {"R3": {}}}),
            r"rotations at run time \(transform_config\) cannot",
        ),
    ],
)
def test_what_it_cannot_decode_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, packed: Path, change_config: ChangeFile
) -> None:
    model = change_config(packed, change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


@pytest.mark.parametrize(
    "wrong", [{"dynamic": False}, {"dynamic": "local"}, {"strategy": "tensor"}, {"num_bits": 16}, {"num_bits": 1}]
)
def test_activations_that_it_would_round_otherwise_are_refused(
    wrong: dict[str, Any], packed: Path, change_config: ChangeFile
) -> None:
    group = {"input_activations": ACTIVATIONS | wrong}
    model = change_config(packed, lambda c: c["config_groups"]["group_0"].update(group))
    with pytest.raises(QtoolError, match=r"q_proj: activations of int \d+ bits by \w+ cannot be read"):
        model.block(0)


def test_a_config_without_groups_leaves_every_linear_dense(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelHandle(ModelOptions(path=str(folder)))
    assert model.schemes() == {} and len(model.block(0).linears()) == 7


def test_weights_that_are_only_rounded_are_no_codes(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    tensors[f"{name}.weight"] = torch.zeros(tensors.pop(f"{name}.weight_shape").tolist())
    del tensors[f"{name}.weight_packed"]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(QtoolError, match=f"{name}: it has a scale but neither packed codes nor int8 codes"):
        ModelHandle(ModelOptions(path=str(packed))).block(0)


def test_a_name_goes_before_a_pattern_and_a_pattern_before_the_class(packed: Path, change_config: ChangeFile) -> None:
    def change(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        wide, other = (group | {"weights": group["weights"] | {"num_bits": bits}} for bits in (8, 5))
        names = [name for name in group["targets"] if "0.self_attn" in name]
        groups = [wide | {"targets": ["Linear"]}, other | {"targets": [r"re:.*\.0\.self_attn"]}, group | {"targets": names}]
        config["config_groups"] = dict(enumerate([*groups, group | {"targets": [r"re:.*\.mlp\.", r"re:.*\.1\."]}]))

    assert {str(scheme) for scheme in change_config(packed, change).schemes().values()} == {"w4a16g32"}


def test_halves_of_an_expert_must_be_stored_alike(
    tiny_model: Callable[..., Path],
    quantized: Callable[..., ModelHandle],
    export: Callable[..., Artifact],
    change_config: ChangeFile,
) -> None:
    out = export("compressed_tensors", quantized(tiny_model("mixtral"), {"experts.*": "w4a16g32"})).path

    def change(config: dict[str, Any]) -> None:
        group = config["config_groups"]["group_0"]
        config["config_groups"]["group_1"] = group | {
            "targets": [r"re:.*\.0\.mlp\.experts\.2\.w3"],
            "weights": group["weights"] | {"num_bits": 8},
        }
        group["targets"] = [r"re:.*\.w[12]$", r"re:.*\.1\.mlp\.", r"re:.*\.experts\.[013]\."]

    with pytest.raises(QtoolError, match=r"experts\.gate_up\.2: gate and up of one expert are stored as w4a16g32 and w8a16g32"):
        change_config(out, change).block(0)


def test_only_the_block_that_is_asked_for_is_loaded(packed: Path) -> None:
    model = ModelHandle(ModelOptions(path=str(packed)))
    with model.outer():
        inside = [p for name, p in model.model.named_parameters() if name.startswith("model.layers.")]
        assert inside and all(parameter.is_meta for parameter in inside)
