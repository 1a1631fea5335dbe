"""The GPTQ export: qtool's reader gives back every code, the config says what lies in the file, misfits are refused first."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qtool.artifact import Artifact, digest_file
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.gptq import METHOD, GptqOptions
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
ConfigOf = Callable[[Path], dict[str, Any]]
Read = Callable[[Path], ModelHandle]
SCHEMES = [f"w{bits}a16{group}" for bits in (2, 3, 4, 8) for group in ("", "g32")]


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_code_of_symmetric_weights_comes_back(
    export: Export,
    scheme: str,
    layout: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    assert export("gptq", model, checkpoint_format=layout).lossless
    assert config_of(tmp_path / "out")["checkpoint_format"] == layout
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("scheme", [f"{scheme}-asym" for scheme in SCHEMES])
def test_every_code_of_asymmetric_weights_comes_back_from_v2(
    export: Export,
    scheme: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    assert export("gptq", model).lossless
    assert config_of(tmp_path / "out")["checkpoint_format"] == "gptq_v2"
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_file_holds_five_tensors_a_linear_in_the_shapes_of_the_layout(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("qwen2", dtype="bfloat16"), "w3a16g32")
    export("gptq", model)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        name = "model.layers.1.self_attn.k_proj"  # [32, 64], with a bias
        parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in file.keys() if key.startswith(name)}
    assert {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items()} == {
        "qweight": ("torch.int32", (6, 32)),
        "qzeros": ("torch.int32", (2, 3)),
        "scales": ("torch.float16", (2, 32)),
        "g_idx": ("torch.int32", (64,)),
        "bias": ("torch.bfloat16", (32,)),
    }


def test_the_config_says_what_the_file_holds(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf
) -> None:
    artifact = export("gptq", quantized(tiny_model("llama"), "w4a16"))
    config = config_of(tmp_path / "out")
    assert config == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": -1,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
    }
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == config
    assert artifact.sha256["quantize_config.json"] == digest_file(tmp_path / "out" / "quantize_config.json")


def test_several_schemes_and_dense_linears_stand_in_dynamic_by_name(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    config_of: ConfigOf,
    read: Read,
) -> None:
    schemes = {"layers.0.mlp.down_proj": "w3a16", "mlp.*": "w4a16g32", "layers.1.self_attn.[qkv]_proj": "w8a16g64-asym"}
    model = quantized(tiny_model("llama"), schemes)
    export("gptq", model)
    config = config_of(tmp_path / "out")
    assert (config["bits"], config["group_size"], config["sym"], config["lm_head"]) == (4, 32, True, False)
    dense = ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj", "0.self_attn.o_proj", "1.self_attn.o_proj"]
    minus = {f"-:^{re.escape(f'model.layers.{name}')}$": {} for name in (*dense, "0.self_attn.qkv_proj")}
    wide = {"bits": 8, "group_size": 64, "sym": False}
    plus = {rf"+:^model\.layers\.1\.self_attn\.{name}_proj$": wide for name in ("q", "k", "v", "qkv")}
    plus |= {r"+:^model\.layers\.0\.mlp\.down_proj$": {"bits": 3, "group_size": -1, "sym": True}}
    assert config["dynamic"] == minus | plus
    same_codes(read(tmp_path / "out"), model)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox", "falcon"])
def test_other_families_come_back_too(
    export: Export,
    family: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    read: Read,
) -> None:
    model = quantized(tiny_model(family), "w4a16g32")
    assert export("gptq", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_a_quantized_head_is_said_to_be_one(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w8a16g32", "*": "w4a16g32"})
    export("gptq", model)
    config = config_of(tmp_path / "out")
    assert config["lm_head"] and config["bits"] == 4
    assert config["dynamic"] == {"+:^lm_head$": {"bits": 8, "group_size": 32, "sym": True}}
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_head_alone_may_be_quantized(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf, read: Read
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w4a16g32"})
    export("gptq", model)
    config = config_of(tmp_path / "out")
    assert config["lm_head"] and len(config["dynamic"]) == 2 * (7 + 2)  # a minus for each linear and each joined name
    assert read(tmp_path / "out").schemes().keys() == {"lm_head"}


def test_tied_embeddings_are_written_once_and_dense(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, read: Read
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "w4a16g32")
    export("gptq", model)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [key for key in file.keys() if key.startswith("lm_head")]
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [4096, 64]
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_smallest_matrices_that_kernels_take_come_back(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, same_codes: SameCodes, read: Read
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = quantized(tiny_model("llama", **sizes), "w3a16g16-asym")
    export("gptq", model)
    same_codes(read(tmp_path / "out"), model)


def test_scales_that_float16_loses_are_reported(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    wide = {"weights": {"bits": 4, "group": 32, "scale_dtype": "float32"}}
    assert not export("gptq", quantized(tiny_model("llama"), wide)).lossless
    small = {"weights": {"bits": 4, "group": 32, "scale_dtype": "float16"}}
    assert export("gptq", quantized(tiny_model("llama", name="again"), small), out="again-out").lossless


REFUSED = [
    ("llama", {}, {}, "export/gptq: no linear is quantized; put a quantize step before it"),
    ("llama", "w5a16g32", {}, r"q_proj: w5a16g32: kernels take 2 or 3 or 4 or 8 bits; quantize so, or use export/compressed"),
    ("llama", "w4a16g8", {}, r"q_proj: w4a16g8: kernels take groups of 16, 32, .* or a whole row; quantize so"),
    ("llama", "w8a8", {}, r"q_proj: w8a8: this export holds weights alone; quantize to w8, or use export/compressed_tensors"),
    ("llama", "w4a16kv8g32", {}, "this export holds weights alone"),
    ("llama", "w4a16g32-asymf16", {}, "zero points must be codes, as in w4a16g128-asym"),
    ("llama", "nf4g32", {}, r"q_proj: nf4g32: this export holds whole numbers; quantize to w4a16g32"),
    ("llama", "mxint8", {}, "this export holds plain scales along `in`"),
    ("llama", "w4a16g32-ic", {}, "this export holds plain scales along `in`"),
    ("llama", "w4a16g32-dq", {}, "this export holds plain scales along `in`"),
    ("llama", "w4a16g32-asym", {"checkpoint_format": "gptq"}, r"q_proj: .*: checkpoint_format gptq cannot .*; use gptq_v2"),
    (
        "llama",
        {"q_proj": "w8a16g32", "*": "w4a16g32"},
        {},
        r"self_attn: q_proj w8a16g32, k_proj w4.*; runtimes join .* qkv_proj",
    ),
    ("llama", {"v_proj": "w4a16g32-asym", "*": "w4a16g32"}, {}, r"v_proj w4a16g32-asym; runtimes join them"),
    ("llama", {"up_proj": "w4a16g32"}, {}, r"mlp: gate_proj dense, up_proj w4a16g32; runtimes join them as gate_up_proj"),
    ("gpt2", "w4a16g32", {}, r"h\.0\.attn\.c_attn: Conv1D cannot be held, nn\.Linear can; use export/safetensors"),
    ("mixtral", "w4a16g32", {}, r"mlp\.experts\.gate_up\.0: a mixture's experts cannot be held; use export/compressed_tensors"),
]


@pytest.mark.parametrize(("family", "scheme", "options", "message"), REFUSED)
def test_what_format_or_kernels_cannot_hold_is_refused_before_anything_is_written(
    export: Export,
    family: str,
    scheme: object,
    options: dict[str, object],
    message: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
) -> None:
    model = quantized(tiny_model(family), scheme)
    with pytest.raises(QtoolError, match=message):
        export("gptq", model, **options)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_key_value_heads": 1}, r"k_proj: 16 outputs are no multiple of 32, which kernels ask for; add it to ignore, or"),
        ({"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 3}, r"q_proj: 48 outputs are no multiple of 32"),
        ({"intermediate_size": 112}, r"gate_proj: 112 outputs are no multiple of 32"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused_by_the_plan_alone(
    sizes: dict[str, int], message: str, tiny_model: TinyModel
) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama", **sizes))))
    planned = dict.fromkeys(model.linear_names()[:-1], Scheme.model_validate("w4a16g16"))
    assert METHOD.holds is not None and METHOD.check is not None
    METHOD.check(model, GptqOptions())
    with pytest.raises(QtoolError, match=message):
        METHOD.holds(model, planned, GptqOptions())


def test_a_mixture_is_refused_before_any_step(tiny_model: TinyModel) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="a mixture's experts cannot be held"):
        METHOD.check(ModelHandle(ModelOptions(path=str(tiny_model("mixtral")))), GptqOptions())


def test_a_scale_beyond_float16_names_its_linear(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    folder, name = tiny_model("llama"), "model.layers.1.mlp.up_proj"
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"] *= 1e7
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(QtoolError, match=rf"export/gptq: {name}: a scale of .* is beyond float16"):
        export("gptq", quantized(folder, "w4a16g32"))
