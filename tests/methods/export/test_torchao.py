"""The torchao export: qtool's reader gives back every code, metadata and config say what lies in the file."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.torchao import METHOD, TorchaoOptions
from qtool.model import writer
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
ConfigOf = Callable[[Path], dict[str, Any]]
Read = Callable[[Path], ModelHandle]
NAME = "model.layers.1.self_attn.k_proj"  # [32, 64]


def metadata_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return {key: text if key == "format" else json.loads(text) for key, text in file.metadata().items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a16g32", "w8a8"])
def test_every_code_comes_back(
    export: Export,
    scheme: str,
    dtype: str,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), scheme)
    assert export("torchao", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_the_file_holds_three_tensors_a_linear(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("torchao", quantized(tiny_model("qwen2", dtype="bfloat16"), "w8a16g32"))
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        parts = {key.removeprefix(f"{NAME}."): file.get_tensor(key) for key in file.keys() if key.startswith(NAME)}
    assert {key: (str(part.dtype), tuple(part.shape)) for key, part in parts.items()} == {
        "_weight_qdata": ("torch.int8", (32, 64)),
        "_weight_scale": ("torch.float32", (32, 2)),
        "_weight_zero_point": ("torch.int8", (32, 2)),
        "bias": ("torch.bfloat16", (32,)),
    }
    assert not parts["_weight_zero_point"].any()


@pytest.mark.parametrize(("scheme", "columns"), [("w8a16", 64), ("w8a16g32", 32)])
def test_the_metadata_tells_class_and_fields_of_each_tensor(
    export: Export, scheme: str, columns: int, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("torchao", quantized(tiny_model("llama", dtype="bfloat16"), scheme))
    metadata = metadata_of(tmp_path / "out" / "model.safetensors")
    assert metadata[f"{NAME}.weight"] == {
        "_type": "Int8Tensor",
        "_data": {
            "act_quant_kwargs": None,
            "reduce_range": False,
            "block_size": [1, columns],
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
        },
        "_tensor_data_names": ["zero_point", "qdata", "scale"],
    }
    assert metadata["model.norm.weight"] == metadata["lm_head.weight"] == {"_type": "Tensor"}
    assert sorted(metadata["tensor_names"]) == sorted(metadata.keys() - {"format", "tensor_names"})
    assert len(metadata["tensor_names"]) == 2 * (7 + 2) + 3  # of each block seven linears and two norms


def test_each_files_metadata_names_what_the_files_before_it_hold_too(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    same_codes: SameCodes,
    read: Read,
) -> None:
    monkeypatch.setattr(writer, "write_checkpoint", functools.partial(writer.write_checkpoint, shard_bytes=10_000))
    model = quantized(tiny_model("llama"), "w8a16")
    export("torchao", model)
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    found = [metadata_of(path)["tensor_names"] for path in files]
    assert len(files) == 3 and all(len(a) < len(b) and b[: len(a)] == a for a, b in zip(found, found[1:], strict=False))
    assert {f"{name}.weight" for name in model.schemes()} <= set(found[-1])
    same_codes(read(tmp_path / "out"), model)


def test_the_config_is_that_of_torchao(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, config_of: ConfigOf
) -> None:
    export("torchao", quantized(tiny_model("llama"), "w8a8"), out="w8a8")
    row = {"_data": {"dim": -1}, "_type": "PerRow", "_version": 1}
    fields = {
        "granularity": row,
        "set_inductor_config": True,
        "act_mapping_type": {"_data": "SYMMETRIC", "_type": "MappingType"},
    }
    assert config_of(tmp_path / "w8a8") == {
        "quant_method": "torchao",
        "quant_type": {"default": {"_data": fields, "_type": "Int8DynamicActivationInt8WeightConfig", "_version": 2}},
        "modules_to_not_convert": ["lm_head"],
        "include_input_output_embeddings": False,
        "untie_embedding_weights": False,
    }
    rule = metadata_of(tmp_path / "w8a8" / "model.safetensors")[f"{NAME}.weight"]["_data"]["act_quant_kwargs"]
    assert rule["_data"]["granularity"] == {"_type": "PerRow", "_data": {"dim": -1}}
    export("torchao", quantized(tiny_model("llama", name="other"), "w8a16g32"), out="groups")
    groups = {"_data": {"group_size": 32}, "_type": "PerGroup", "_version": 1}
    assert config_of(tmp_path / "groups")["quant_type"] == {
        "default": {
            "_data": {"granularity": groups, "set_inductor_config": True},
            "_type": "Int8WeightOnlyConfig",
            "_version": 2,
        }
    }


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3", "gemma3", "phi3", "opt", "gpt_neox"])
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
    model = quantized(tiny_model(family), "w8a16")
    assert export("torchao", model).lossless
    same_codes(read(tmp_path / "out"), model)
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


def test_a_dense_block_and_a_quantized_head_go_together(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    config_of: ConfigOf,
    read: Read,
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w8a16", "layers.1.*": "w8a16"})
    export("torchao", model)
    dense = config_of(tmp_path / "out")["modules_to_not_convert"]
    assert len(dense) == 7 and all(name.startswith("model.layers.0.") for name in dense)
    same_codes(read(tmp_path / "out"), model)


def test_tied_embeddings_are_written_once_and_dense(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf, read: Read
) -> None:
    model = quantized(tiny_model("llama", tie_word_embeddings=True), "w8a16")
    export("torchao", model)
    assert not [key for key in metadata_of(tmp_path / "out" / "model.safetensors") if key.startswith("lm_head")]
    assert torch.equal(logits_of(read(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("llama", {}, "export/torchao: no linear is quantized; put a quantize step before it"),
        ("llama", "w4a16g64", r"q_proj: w4a16g64: this export holds int of 8 bits; quantize to w8a16 or w8a8, or use another"),
        ("llama", "e4m3", "this export holds int of 8 bits"),
        ("llama", "w8a16-asym", r"this export holds plain scales along `in`; quantize without -asym$"),
        ("llama", "w8a16-dq", r"quantize without -dq$"),
        ("llama", "w8a16g32-ic", r"quantize without -ic$"),
        ("llama", "w8a16kv8", r"a cache cannot be held; leave kv8 out"),
        ("llama", "w8a4", r"activations have 8 bits and no zero points here; quantize to w8a8 or w8a16"),
        ("llama", "w8a8g32", r"activations go with whole rows here; quantize to w8a8, or to w8a16g32"),
        ("llama", {"mlp.*": "w8a16g32", "*": "w8a16"}, r"q_proj is w8a16, .*gate_proj is w8a16g32, but the config says one"),
        ("llama", {"mlp.*": "w8a8", "*": "w8a16"}, r"gate_proj is w8a8, but the config says one of all"),
        ("falcon", "w8a16", r"FalconLinear cannot be held, nn.Linear can; use export/safetensors"),
        ("gpt2", "w8a16", r"Conv1D cannot be held, nn.Linear can"),
        ("mixtral", "w8a16", "a mixture's experts cannot be held"),
    ],
)
def test_what_torchao_cannot_hold_is_refused_before_anything_is_written(
    export: Export, family: str, scheme: object, message: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model(family), scheme)
    with pytest.raises(QtoolError, match=message):
        export("torchao", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_misfits_are_refused_by_the_plan_alone(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    planned = dict.fromkeys(model.linear_names()[:-1], Scheme.model_validate("w4a16"))
    assert METHOD.holds is not None and METHOD.check is not None
    METHOD.check(model, TorchaoOptions())
    with pytest.raises(QtoolError, match="this export holds int of 8 bits"):
        METHOD.holds(model, planned, TorchaoOptions())
    with pytest.raises(QtoolError, match="a mixture's experts cannot be held"):
        METHOD.check(ModelHandle(ModelOptions(path=str(tiny_model("mixtral")))), TorchaoOptions())
