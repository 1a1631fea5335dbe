"""The compressed-tensors export: the library's own config model, plain transformers and qtool's reader all take it."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from qtool.artifact import Artifact, digest_file
from qtool.errors import QtoolError
from qtool.formats.compressed_layouts import activation_arguments, pack_inputs
from qtool.formats.inputs import InputScales
from qtool.formats.scheme import ActivationScheme, input_fields
from qtool.layers.quant_linear import snap_inputs
from qtool.methods.export.compressed_tensors import METHOD, CompressedTensorsOptions
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.model.writer import write_checkpoint
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
Reload = Callable[[Path], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
ConfigOf = Callable[[Path], dict[str, Any]]
FLOATS = ["nvfp4", "mxfp4", "mxfp8_e4m3", "e4m3", "e4m3g32"]


def assert_same_weights(model: ModelHandle, other: ModelHandle) -> None:
    for ours, theirs in zip(model.blocks(), other.blocks(), strict=True):
        assert ours.linears().keys() == theirs.linears().keys()
        for name, linear in ours.linears().items():
            assert torch.equal(weight_of(linear), weight_of(theirs.get(name))), name
    assert model.schemes() == other.schemes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w8a16", "w2a16g16", "w3a16", "w5a16g32", "w6a16g64", "w7a16"])
def test_transformers_computes_the_same_from_packed_weights(
    export: Export,
    scheme: str,
    dtype: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), scheme)
    assert export("compressed_tensors", model).lossless
    assert torch.equal(reload(tmp_path / "out"), logits_of(model))


@pytest.mark.parametrize("scheme", FLOATS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_transformers_computes_the_same_from_float_weights(
    export: Export,
    scheme: str,
    dtype: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    same_codes: SameCodes,
    config_of: ConfigOf,
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), scheme)
    assert export("compressed_tensors", model).lossless
    again, expected = ModelHandle(ModelOptions(path=str(tmp_path / "out"))), logits_of(model)
    same_codes(again, model)
    assert torch.equal(logits_of(again), expected)
    assert torch.equal(reload(tmp_path / "out"), expected)
    config = config_of(tmp_path / "out")
    assert config.get("dequantize", False) == (dtype != "bfloat16" and not scheme.startswith("e4m3"))


def test_formats_of_a_model_may_differ(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    same_codes: SameCodes,
    config_of: ConfigOf,
) -> None:
    floats = {"q_proj": "nvfp4", "k_proj": "mxfp4", "v_proj": "e4m3", "o_proj": "mxfp8_e4m3", "gate_proj": "w4a16g32"}
    model = quantized(tiny_model("llama", dtype="bfloat16"), floats | {"lm_head": "e4m3g32"})
    assert export("compressed_tensors", model).lossless
    config = config_of(tmp_path / "out")
    assert QuantizationConfig.model_validate(config).format == config["format"] == "mixed-precision"
    of_first = {g["targets"][0].rsplit(".", 1)[-1]: g["format"] for g in config["config_groups"].values()}
    assert of_first == {
        "q_proj": "nvfp4-pack-quantized",
        "k_proj": "mxfp4-pack-quantized",
        "v_proj": "float-quantized",
        "o_proj": "mxfp8-quantized",
        "gate_proj": "pack-quantized",
        "lm_head": "float-quantized",
    }
    assert torch.equal(reload(tmp_path / "out"), logits_of(model))
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    same_codes(again, model)
    assert torch.equal(logits_of(again), logits_of(model))


def test_transformers_does_not_multiply_bfloat16_weights_among_several_schemes(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama"), {"q_proj": "w8a16", "mlp.*": "mxfp4"})
    assert export("compressed_tensors", model).lossless
    with pytest.raises(RuntimeError, match="same dtype"):
        reload(tmp_path / "out")
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(tmp_path / "out")))), logits_of(model))


def test_the_config_says_which_activations_go_with_float_weights(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    config_of: ConfigOf,
) -> None:
    model = quantized(tiny_model("llama"), {"weights": {"format": "e4m3"}, "activations": {"bits": 8}})
    assert export("compressed_tensors", model).lossless
    group = config_of(tmp_path / "out")["config_groups"]["group_0"]
    assert group["format"] == "float-quantized"
    assert (group["weights"]["type"], group["weights"]["strategy"], group["weights"]["num_bits"]) == ("float", "channel", 8)
    inputs = group["input_activations"]
    assert (inputs["type"], inputs["strategy"], inputs["num_bits"], inputs["dynamic"]) == ("int", "token", 8, True)
    expected, weights_alone = logits_of(model), quantized(tiny_model("llama", name="other"), "e4m3")
    assert (reload(tmp_path / "out") - expected).norm() / expected.norm() < 1e-3  # as with integer weights below
    assert (logits_of(weights_alone) - expected).norm() / expected.norm() > 1e-2
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(tmp_path / "out")))), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "schemes", ["w4a16g32-asym", "w8a16-asym", "w3a16g16-asym", {"mlp.*": "w4a16g32-asym"}, {"lm_head": "w6a16g64-asym"}]
)
def test_transformers_decodes_zero_points_where_one_scheme_serves_all(
    export: Export,
    schemes: object,
    dtype: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), schemes)
    assert export("compressed_tensors", model).lossless
    assert torch.equal(reload(tmp_path / "out"), logits_of(model))
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(tmp_path / "out")))), logits_of(model))


def test_transformers_refuses_zero_points_among_several_schemes(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama"), {"q_proj": "w8a16", "mlp.*": "w4a16g32-asym"})
    assert export("compressed_tensors", model).lossless
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        reload(tmp_path / "out")
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(tmp_path / "out")))), logits_of(model))


def test_the_library_gives_transformers_modules_with_unpacked_zero_points() -> None:
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights})
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")

    def packed(device: str) -> torch.Size:
        parts = {
            "weight": torch.zeros(64, 64, device=device),
            "weight_scale": torch.ones(64, 2, device=device),
            "weight_zero_point": torch.zeros(64, 2, dtype=torch.int8, device=device),
        }
        return compressor.compress(parts, scheme)["weight_zero_point"].shape

    assert packed("cpu") == (8, 2)  # what is written, by this library and by qtool
    assert packed("meta") == (64, 2)  # what is read into; once this is mended, `dequantize` need not be written


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8g32-asym", "w4a8g32", "w4a6-asym", "e4m3-ae4m3"])
def test_transformers_computes_the_same_with_quantized_activations(
    export: Export,
    scheme: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    assert export("compressed_tensors", model).lossless
    expected = logits_of(model)
    error = (reload(tmp_path / "out") - expected).norm() / expected.norm()
    assert error < 1e-3  # float32 scales of tokens differ in the last bit, and then now and then a code


Static = Callable[[ModelHandle], ModelHandle]


@pytest.mark.parametrize(
    ("scheme", "said"),
    [
        ("w8a8", {"type": "int", "num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}),
        ("w4g32-aint6asym", {"type": "int", "num_bits": 6, "symmetric": False, "strategy": "tensor", "dynamic": False}),
        ("e4m3-ae4m3", {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False}),
    ],
)
def test_transformers_computes_the_same_with_static_scales_of_inputs(
    export: Export,
    scheme: str,
    said: dict[str, object],
    tiny_model: TinyModel,
    quantized: Quantized,
    static: Static,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    config_of: ConfigOf,
    same_codes: SameCodes,
) -> None:
    model = static(quantized(tiny_model("llama"), scheme))
    assert export("compressed_tensors", model).lossless
    group = config_of(tmp_path / "out")["config_groups"]["group_0"]
    assert {key: group["input_activations"][key] for key in said} == said
    expected, again = logits_of(model), ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    # One scale leaves nothing to find: only where both sides round x / s or sum another way does a code move.
    assert (reload(tmp_path / "out") - expected).norm() / expected.norm() < 1e-3
    same_codes(again, model)
    assert torch.equal(logits_of(again), expected)


def test_transformers_computes_the_same_with_nvfp4_weights_and_inputs(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    static: Static,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    config_of: ConfigOf,
    same_codes: SameCodes,
) -> None:
    model = static(quantized(tiny_model("llama", dtype="bfloat16"), "nvfp4-anvfp4"))
    assert export("compressed_tensors", model).lossless
    said = config_of(tmp_path / "out")["config_groups"]["group_0"]["input_activations"]
    assert (said["strategy"], said["group_size"], said["dynamic"]) == ("tensor_group", 16, "local")
    again, expected = ModelHandle(ModelOptions(path=str(tmp_path / "out"))), logits_of(model).float()
    same_codes(again, model)
    assert torch.equal(logits_of(again).float(), expected)
    weights_alone = logits_of(quantized(tiny_model("llama", dtype="bfloat16"), "nvfp4")).float()
    # They find ranges in bfloat16, so that some scales, and codes, move: see the next test for float32, where none do.
    assert (reload(tmp_path / "out").float() - expected).norm() < (weights_alone - expected).norm()


def test_the_library_rounds_nvfp4_inputs_as_the_layer_does() -> None:
    scheme = ActivationScheme.model_validate(input_fields("anvfp4static"))
    inputs = InputScales(scheme, 1 / torch.tensor([500.0]))  # values above 5.4 are clipped
    said = QuantizationArgs.model_validate(activation_arguments(scheme))
    x = 2 * torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(0))
    G = pack_inputs(inputs)["input_global_scale"]
    scale, zero = compute_dynamic_scales_and_zp(x, said, torch.nn.Module(), global_scale=G)
    torch.testing.assert_close(fake_quantize(x, scale, zero, said, global_scale=G), snap_inputs(x, scheme, inputs))


def test_nvfp4_inputs_without_a_static_scale_are_refused(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    with pytest.raises(QtoolError, match="nvfp4-anvfp4: this export can say of inputs .* or nvfp4 after quantize/inputs"):
        export("compressed_tensors", quantized(tiny_model("llama"), "nvfp4-anvfp4"))


@pytest.mark.parametrize(
    "scheme", ["w4a16g32", "w4a16g32-asym", "w3a16-asym", "w8a16g16-asym", "w8a8", "w8a8-asym", "w4a8g32-asym", *FLOATS]
)
def test_the_library_decodes_the_weights_of_the_model_in_memory(
    export: Export, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    export("compressed_tensors", model)
    group = QuantizationConfig.model_validate(config_of(tmp_path / "out")).config_groups["group_0"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for block in model.blocks():
            for name, linear in block.linears().items():
                own = [key for key in file.keys() if key.startswith(f"{name}.")]
                parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in own}
                decoded = BaseCompressor.get_value_from_registry(group.format).decompress(parts, group)["weight"]
                # The library multiplies in the scale's bfloat16, which rounds once more than float32.
                assert torch.equal(decoded, weight_of(linear).to(decoded.dtype)), name


@pytest.mark.parametrize("scheme", ["w4a16g32", "w3a16g16-asym", "w8a8", "w8a8g32-asym", "w4a8-asym"])
def test_qtool_reads_its_own_bytes_back(
    export: Export, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    export("compressed_tensors", model)
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    assert_same_weights(model, again)
    assert torch.equal(logits_of(again), logits_of(model))


def test_every_scheme_is_a_group_that_names_its_linears(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    config_of: ConfigOf,
) -> None:
    schemes = {"q_proj": "w8a16", "down_proj": "w4a8g32", "layers.0.mlp.*": "w3a16g32", "mlp.*": "w4a16g16"}
    model = quantized(tiny_model("llama"), schemes)
    export("compressed_tensors", model)
    config = config_of(tmp_path / "out")
    parsed = QuantizationConfig.model_validate(config)
    assert parsed.format == "mixed-precision"
    layers = "model.layers."
    targets = {
        (g["weights"]["num_bits"], g["weights"]["group_size"], g["format"]): set(g["targets"])
        for g in config["config_groups"].values()
    }
    assert targets == {
        (8, None, "pack-quantized"): {f"{layers}0.self_attn.q_proj", f"{layers}1.self_attn.q_proj"},
        (4, 32, "int-quantized"): {f"{layers}0.mlp.down_proj", f"{layers}1.mlp.down_proj"},
        (3, 32, "pack-quantized"): {f"{layers}0.mlp.gate_proj", f"{layers}0.mlp.up_proj"},
        (4, 16, "pack-quantized"): {f"{layers}1.mlp.gate_proj", f"{layers}1.mlp.up_proj"},
    }
    dense = {f"{layers}{i}.self_attn.{side}_proj" for i in (0, 1) for side in "kvo"} | {"lm_head"}
    assert set(config["ignore"]) == dense
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    assert_same_weights(model, again)
    expected = logits_of(model)
    assert (reload(tmp_path / "out") - expected).norm() / expected.norm() < 1e-3  # as with quantized activations above


@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a16g32-asym"])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox", "falcon"])
def test_other_families_reload_too(
    export: Export,
    family: str,
    scheme: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_model(family), scheme)
    export("compressed_tensors", model)
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(tmp_path / "out")))), logits_of(model))
    if (family, scheme) != ("falcon", "w4a16g32"):  # whose _init_weights in transformers 5.23 expects dense weights
        assert torch.equal(reload(tmp_path / "out"), logits_of(model))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "schemes",
    [
        "w4a16g32",
        {"experts.*": "w3a16"},
        {"experts.*": "w8a16", "self_attn.*": "w4a16g32"},
        {"experts.*": "w4a16g32", "self_attn.*": "w8a16g32-asym"},
        {"experts.*": "w4a16g32", "q_proj": "w8a16", "v_proj": "w4a16g16"},
    ],
)
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_transformers_loads_a_mixture_of_packed_experts(
    export: Export,
    family: str,
    schemes: object,
    dtype: str,
    tiny_mixture: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
) -> None:
    model = quantized(tiny_mixture(family, dtype=dtype), schemes)
    assert export("compressed_tensors", model).lossless
    again, expected = ModelHandle(ModelOptions(path=str(tmp_path / "out"))), logits_of(model)
    assert torch.equal(logits_of(again), expected)
    assert {name: str(scheme) for name, scheme in again.schemes().items()} == {n: str(s) for n, s in model.schemes().items()}
    reloaded = reload(tmp_path / "out")
    assert torch.equal(reloaded, reload(export("safetensors", model, out="dense").path))
    if dtype == "float32":  # in bfloat16 transformers and qtool round a mixture's sums at other places
        assert (reloaded - expected).norm() / expected.norm() < 1e-5


@pytest.mark.parametrize("schemes", ["mxfp4", {"experts.*": "mxfp4", "self_attn.*": "nvfp4"}])
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_transformers_loads_a_mixture_of_mxfp4_experts(
    export: Export,
    family: str,
    schemes: object,
    tiny_mixture: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    logits_of: LogitsOf,
    reload: Reload,
    same_codes: SameCodes,
) -> None:
    model = quantized(tiny_mixture(family, dtype="bfloat16"), schemes)  # in another dtype experts multiply in bfloat16
    assert export("compressed_tensors", model).lossless
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    same_codes(again, model)
    assert torch.equal(logits_of(again), logits_of(model))
    assert torch.equal(reload(tmp_path / "out"), reload(export("safetensors", model, out="dense").path))


@pytest.mark.parametrize(
    ("family", "expert", "sides"),
    [
        ("mixtral", "model.layers.0.block_sparse_moe.experts.3", {"w1": [128, 64], "w3": [128, 64], "w2": [64, 128]}),
        (
            "qwen2_moe",
            "model.layers.0.mlp.experts.3",
            {"gate_proj": [96, 64], "up_proj": [96, 64], "down_proj": [64, 96]},
        ),
    ],
)
def test_experts_stand_one_by_one_under_the_names_of_the_dense_checkpoint(
    export: Export,
    family: str,
    expert: str,
    sides: dict[str, list[int]],
    tiny_mixture: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    config_of: ConfigOf,
) -> None:
    folder = tiny_mixture(family)
    model = quantized(folder, {"experts.*": "w4a16g32", "self_attn.*": "w4a16g32"})
    export("compressed_tensors", model)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for side, shape in sides.items():
            assert file.get_tensor(f"{expert}.{side}.weight_shape").tolist() == shape
            assert file.get_slice(f"{expert}.{side}.weight_packed").get_shape() == [shape[0], shape[1] // 8]
            assert file.get_slice(f"{expert}.{side}.weight_scale").get_shape() == [shape[0], shape[1] // 32]
        found = {key.replace("_packed", "") for key in file.keys() if not key.endswith(("weight_scale", "weight_shape"))}
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert found == set(file.keys())
    config = config_of(tmp_path / "out")
    assert config["config_groups"]["group_1"]["targets"] == [r"re:.*\.experts\."]
    assert "model.layers.0.mlp.gate" in config["ignore"]


def test_a_quantized_head_is_held_packed(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, reload: Reload
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w8a16", "mlp.*": "w4a16g32"})
    export("compressed_tensors", model)
    assert torch.equal(reload(tmp_path / "out"), logits_of(model))
    again = ModelHandle(ModelOptions(path=str(tmp_path / "out")))
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.schemes().keys() == model.schemes().keys()


def test_many_files_reload_as_one(
    tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, reload: Reload
) -> None:
    folder = tiny_model("llama")
    out = tmp_path / "out"
    out.mkdir()
    model = quantized(folder, "w4a16g32")
    write_checkpoint(model, out, shard_bytes=150_000)  # the embedding is larger, a block of 148 kB fits
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in reloaded.parameters())
    assert torch.equal(reload(out), logits_of(model))
    assert torch.equal(logits_of(ModelHandle(ModelOptions(path=str(out)))), logits_of(model))


def test_scales_that_readers_cannot_hold_are_no_lossless_export(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    scheme = {"weights": {"bits": 4, "group": 32, "scale_dtype": "float32"}}
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    assert not export("compressed_tensors", model).lossless  # transformers keeps scales in the model's bfloat16
    assert_same_weights(model, ModelHandle(ModelOptions(path=str(tmp_path / "out"))))


def test_the_artifact_counts_and_digests_every_file(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    folder, out = tiny_model("llama"), tmp_path / "out"
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    artifact = export("compressed_tensors", quantized(folder, "w4a16g32"), out)
    assert artifact.bytes == sum(path.stat().st_size for path in out.iterdir())
    assert artifact.sha256 == {path.name: digest_file(path) for path in out.iterdir()}
    copied = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert set(artifact.sha256) == copied | {"config.json", "model.safetensors"}
    assert all((out / name).read_bytes() == (folder / name).read_bytes() for name in copied)


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("gpt2", "w4a16g32", r"h\.0\.attn\.c_attn: Conv1D cannot be held, nn\.Linear can; use export/safetensors"),
        (
            "mixtral",
            {"self_attn.*": "w4a16g32"},
            r"layers\.0\.mlp\.experts: experts are left dense; those .* can be held where",
        ),
        ("mixtral", {"experts.*": "w4a16g32-asym"}, r"experts are w4a16g32-asym; .*: quantize them so, or use export/safe"),
        ("mixtral", "w8a8", r"experts are w8a8; .* all share one symmetric scheme for weights alone"),
        ("mixtral", "nvfp4", r"experts are nvfp4; .* whole numbers such as w4a16g128 or mxfp4"),
        ("mixtral", "e4m3", r"experts are e4m3; .* whole numbers such as w4a16g128 or mxfp4"),
        ("mixtral", "mxfp8_e4m3", r"experts are mxfp8_e4m3; .* whole numbers such as w4a16g128 or mxfp4"),
        ("mixtral", {"experts.down.*": "w8a16", "experts.*": "w4a16g32"}, r"experts are w4a16g32, w8a16; "),
        ("mixtral", {"experts.*.0": "w4a16g32"}, r"experts are left dense, w4a16g32; "),
        ("llama", "w4a16kv8g32", r"w4a16kv8g32: write quantize/kv_cache as a step, and leave kv8 out"),
        ("llama", "w4a16g32-asymf16", "w4a16g32-asymf16: zero points must be codes, as in w4a16g128-asym"),
        ("llama", "nf4g32", "nf4g32: this export holds whole numbers and e4m3 with plain scales, nvfp4, mxfp4 and mxfp8_e4m3"),
        ("llama", "mxfp6_e2m3", "mxfp6_e2m3: this export holds .*; quantize so, or use export/safetensors"),
        ("llama", "mxfp8_e5m2", "mxfp8_e5m2: this export holds"),
        ("llama", "mxint8", "mxint8: this export holds"),
        ("llama", "e2m1g32", "e2m1g32: this export holds"),
        ("llama", {"weights": {"format": "e2m1", "group": 32, "scale_dtype": "float8_e4m3fn"}}, "e2m1g32: this export holds"),
        ("llama", "w4a16g32-dq", "w4a16g32-dq: this export holds plain scales along `in`"),
        ("llama", {}, "no linear is quantized; put a quantize step before it"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(
    export: Export, family: str, scheme: object, message: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model(family), scheme)
    with pytest.raises(QtoolError, match=message):
        export("compressed_tensors", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_model_that_does_not_fit_is_refused_before_any_step(tiny_model: TinyModel) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match=r"c_attn: Conv1D cannot be held"):
        METHOD.check(ModelHandle(ModelOptions(path=str(tiny_model("gpt2")))), CompressedTensorsOptions())
    METHOD.check(ModelHandle(ModelOptions(path=str(tiny_model("llama")))), CompressedTensorsOptions())


def test_experts_that_checkpoints_keep_fused_are_refused_before_any_step(tiny_mixture: TinyModel) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match=r"block_sparse_moe\.experts\.gate_up\.0: experts that checkpoints keep fused cannot"):
        METHOD.check(ModelHandle(ModelOptions(path=str(tiny_mixture("granitemoe")))), CompressedTensorsOptions())
    METHOD.check(ModelHandle(ModelOptions(path=str(tiny_mixture("mixtral")))), CompressedTensorsOptions())


def test_a_disk_that_refuses_is_a_clear_error(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    with full_disk(), pytest.raises(QtoolError, match="out: cannot write: .*; free space or choose another --out"):
        export("compressed_tensors", model)
