"""The GGUF export: the package gguf decodes the model in memory from it, and qtool reads its own bytes back."""

import gc
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import gguf as package
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.ggml import TYPES
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.methods.export.gguf import METHOD, GgufOptions, contents, kinds_of
from qtool.model.gguf import file_size
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.model.store import save_changes
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
WIDE = {"hidden_size": 256, "intermediate_size": 512}


def opened(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder)))


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor as the package decodes it, [out, in] float32."""
    found = {}
    for tensor in GGUFReader(folder / "model.gguf").tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        found[tensor.name] = torch.from_numpy(quants.dequantize(tensor.data, tensor.tensor_type).copy()).view(shape)
    return found


def types(folder: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name.lower() for tensor in GGUFReader(folder / "model.gguf").tensors}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("scheme", ["w4a16g32", "w4a16g64", "w4a16", "w5a16g32", "w8a16g32", "iq4_nlg32", "mxfp4", "mxint8"])
def test_codes_are_written_as_they_are(
    export: Export, scheme: str, dtype: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama", dtype=dtype), scheme)
    assert export("gguf", model).lossless
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))
    theirs = decoded(tmp_path / "out")
    for block in model.blocks():
        weight = weight_of(block.get(f"{block.name}.mlp.down_proj"))
        assert torch.equal(theirs[f"blk.{block.index}.ffn_down.weight"], weight)


@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "w5a16g64-asym", "w4a16g32-asymf16"])
def test_offsets_lose_a_bit_and_the_artifact_says_so(
    export: Export, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    assert not export("gguf", model).lossless
    expected = logits_of(model)
    error = (logits_of(opened(tmp_path / "out")) - expected).norm() / expected.norm()
    assert 0 < error < 2**-9  # each offset by 2^-12 of itself at most


def test_rows_of_queries_and_keys_stand_where_llama_cpp_has_them(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama", attention_bias=True), "w4a16g32")
    export("gguf", model)
    theirs, block = decoded(tmp_path / "out"), model.block(0)
    for side, heads in (("q", 4), ("k", 2)):
        layer = block.get(f"{block.name}.self_attn.{side}_proj")
        for last, value in (("weight", weight_of(layer)), ("bias", layer.bias)):
            halves = value.view(heads, 2, -1, *value.shape[1:])  # [heads, 2, head / 2, ...]
            assert torch.equal(theirs[f"blk.0.attn_{side}.{last}"], halves.transpose(1, 2).reshape(value.shape))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox"])
def test_every_family_is_read_back(
    export: Export, family: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model(family), "w4a16g32")
    assert export("gguf", model).lossless
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize("family", ["gemma3", "phi3", "opt", "falcon", "mixtral"])
def test_other_families_are_refused_before_any_work(family: str, tiny_model: TinyModel) -> None:
    with pytest.raises(QtoolError, match=f"export/gguf: {family}.* models cannot be written; llama, mistral"):
        METHOD.check(opened(tiny_model(family)), GgufOptions())


def test_an_export_of_another_format_keeps_its_codes_too(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), "w4a16g32")
    packed = export("compressed_tensors", model, out="packed").path
    assert export("gguf", opened(packed)).lossless
    assert types(tmp_path / "out")["blk.0.ffn_up.weight"] == "q4_0"
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


def test_a_tied_head_is_written_once(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("qwen2", tie_word_embeddings=True), "w4a16g32")
    export("gguf", model)
    assert "output.weight" not in types(tmp_path / "out")
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


def test_a_quantized_head_keeps_its_codes(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama"), {"lm_head": "w8a16g32", "mlp.*": "w4a16g32"})
    assert export("gguf", model).lossless
    found = types(tmp_path / "out")
    assert (found["output.weight"], found["blk.0.ffn_up.weight"], found["blk.0.attn_q.weight"]) == ("q8_0", "q4_0", "f32")
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


def test_a_model_that_is_not_quantized_is_written_dense(
    export: Export, tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = opened(tiny_model("llama", dtype="bfloat16"))
    assert export("gguf", model).lossless
    assert set(types(tmp_path / "out").values()) == {"f32", "bf16"}
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))
    halves = export("gguf", model, out="halves", type="f16", embeddings="f16")
    assert not halves.lossless and set(types(tmp_path / "halves").values()) == {"f32", "f16"}  # bfloat16 has smaller numbers


@pytest.mark.parametrize("name", [kind.name for kind in TYPES.values() if kind.dtype is None])
def test_dense_linears_are_rounded_to_a_stated_type(
    export: Export, name: str, tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = opened(tiny_model("llama", **WIDE, initializer_range=0.02))
    assert not export("gguf", model, type=name, embeddings="q8_0").lossless
    found = types(tmp_path / "out")
    assert (found["blk.0.attn_q.weight"], found["token_embd.weight"], found["output.weight"]) == (name, "q8_0", "q8_0")
    again, theirs = opened(tmp_path / "out"), decoded(tmp_path / "out")
    rounded, W = (weight_of(m.block(1).get("model.layers.1.mlp.up_proj")) for m in (again, model))  # [out, in]
    assert torch.equal(rounded, theirs["blk.1.ffn_up.weight"])
    expected, error = logits_of(model), (rounded - W).norm() / W.norm()
    # The errors of fourteen linears add up as squares: the root of that many at most.
    assert 0 < (logits_of(again) - expected).norm() / expected.norm() < 14**0.5 * error


def test_schemes_that_match_keep_their_codes_beside_a_stated_type(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    schemes = {"q_proj": "w4a16g32", "k_proj": "w3a16g32", "up_proj": "nf4g64", "down_proj": "w6a16g16"}
    model = quantized(tiny_model("llama", **WIDE), schemes)
    export("gguf", model, type="q5_0")
    found = types(tmp_path / "out")
    kinds = [found[f"blk.0.{part}.weight"] for part in ("attn_q", "attn_k", "attn_v", "ffn_up", "ffn_down")]
    assert kinds == ["q4_0", "q5_0", "q5_0", "q5_0", "q5_0"]
    theirs, block = decoded(tmp_path / "out"), model.block(0)
    keys = weight_of(block.get("model.layers.0.self_attn.k_proj"))  # [out, in]
    assert torch.equal(theirs["blk.0.attn_k.weight"], keys.view(2, 2, 32, 256).transpose(1, 2).reshape(128, 256))


@pytest.mark.parametrize("scheme", ["w3a16g128", "nf4g64", "w4a16g16", "w8a16g32-asym", "w4a16g32-ic"])
def test_schemes_without_a_type_are_refused(
    export: Export, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama", **WIDE), scheme)
    with pytest.raises(QtoolError, match=rf"q_proj: {scheme.replace('a16', '.*')}: no type has this grid; .* type: one of f32"):
        export("gguf", model)
    assert list((tmp_path / "out").iterdir()) == []


def test_more_than_weights_is_refused(export: Export, tiny_model: TinyModel, quantized: Quantized) -> None:
    model = quantized(tiny_model("llama"), "w8a8g32")
    with pytest.raises(QtoolError, match="w8a8g32: llama.cpp rounds activations in its own way; quantize weights alone"):
        export("gguf", model, type="q8_0")


def test_columns_that_blocks_do_not_divide_are_refused_before_any_work(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama"))
    with pytest.raises(QtoolError, match="q_proj: 64 columns do not divide into q4_k's blocks of 256; use a type whose blocks"):
        METHOD.holds(model, {}, GgufOptions(type="q4_k"))
    METHOD.holds(model, {}, GgufOptions(type="q4_0"))
    blocks = [name for name in model.linear_names() if "layers" in name]
    METHOD.holds(model, dict.fromkeys(blocks, Scheme.model_validate("w4a16")), GgufOptions(type="q4_k"))  # all are q4_0


def test_a_tied_head_with_codes_of_its_own_is_refused(tiny_model: TinyModel) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama", tie_word_embeddings=True))))
    assert METHOD.holds is not None
    with pytest.raises(QtoolError, match="a head that is the embedding has no codes of its own; add it to ignore"):
        METHOD.holds(model, {"lm_head": Scheme.model_validate("w8a16g32")}, METHOD.options())


def test_a_tensor_that_the_architecture_lacks_is_refused(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("qwen3", attention_bias=True))
    with pytest.raises(QtoolError, match=r"proj\.bias: llama\.cpp's qwen3 has no such tensor"):
        METHOD.check(model, GgufOptions())


def test_the_file_is_what_arithmetic_says(export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path) -> None:
    model, options = quantized(tiny_model("llama", dtype="bfloat16"), "w4a16g32"), GgufOptions()
    export("gguf", model)
    size = (tmp_path / "out" / "model.gguf").stat().st_size
    assert size == file_size(*contents(model, kinds_of(model, model.schemes(), options), options))
    blocks = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128) * 18 // 32  # q4_0: 18 bytes for 32 weights
    outer = 2 * 4096 * 64 * 2 + 5 * 64 * 4
    header = GGUFReader(tmp_path / "out" / "model.gguf").data_offset
    assert size == header + blocks + outer


def test_metadata_is_complete(export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path) -> None:
    export("gguf", quantized(tiny_model("llama"), "w4a16g32"))
    fields = GGUFReader(tmp_path / "out" / "model.gguf").fields
    assert fields["GGUF.version"].contents() == 3
    assert fields["general.architecture"].contents() == "llama"
    assert fields["general.file_type"].contents() == package.LlamaFileType.MOSTLY_Q4_0
    assert fields["general.quantization_version"].contents() == package.GGML_QUANT_VERSION
    assert len(fields["tokenizer.ggml.tokens"].contents()) == fields["llama.vocab_size"].contents() == 4096


def test_llama3_positions_bring_their_factors(
    export: Export, tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf
) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = opened(tiny_model("llama", rope_parameters=rope | {"original_max_position_embeddings": 64}))
    export("gguf", model)
    factors = decoded(tmp_path / "out")["rope_freqs.weight"]
    assert factors.shape == (8,) and factors[0] == 1 and torch.allclose(factors[-1], torch.tensor(8.0))
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


def test_config_and_tokenizer_stand_beside_the_file(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    artifact = export("gguf", quantized(tiny_model("llama"), "w4a16g32"))
    assert set(artifact.sha256) == {
        "config.json",
        "generation_config.json",
        "model.gguf",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_one_block_is_in_memory_at_a_time(
    export: Export, tiny_model: TinyModel, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny_model("llama", num_hidden_layers=4), "w4a16g32")
    loaded: list[int] = []
    inner = ModelHandle.block

    def block(self: ModelHandle, index: int) -> object:
        real = [name for name, p in self.model.named_parameters() if name.startswith("model.") and not p.is_meta]
        loaded.append(len({name.split(".")[2] for name in real if ".layers." in name}))
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        loaded.append(len([found for found in tensors if found.shape == (128, 36) and found.dtype == torch.uint8]))  # q4_0
        return inner(self, index)

    monkeypatch.setattr(ModelHandle, "block", block)
    export("gguf", model, embeddings="q8_0")
    assert loaded == [0] * 8  # whenever one is asked for, no other is there, nor the bytes of its wide linears


def test_a_full_disk_is_told(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    with full_disk(), pytest.raises(QtoolError, match="out: cannot write: .*; free space or choose another --out"):
        export("gguf", model)


def test_a_file_of_an_unknown_architecture_is_refused(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("gguf", quantized(tiny_model("llama"), "w4a16g32"))
    file = tmp_path / "out" / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"llama", b"lamal", 1))
    with pytest.raises(QtoolError, match="llama.cpp's architecture lamal cannot be read; llama, qwen2"):
        opened(tmp_path / "out")


def test_the_types_of_options_are_all_types() -> None:
    names = GgufOptions.model_json_schema()["properties"]["type"]["anyOf"][0]["enum"]
    assert set(names) == set(TYPES) and {name.upper() for name in names} <= set(GGMLQuantizationType.__members__)


def test_scales_beyond_float16_are_refused_by_name(export: Export, tiny_model: TinyModel, tmp_path: Path) -> None:
    name, scheme = "model.layers.0.mlp.up_proj", Scheme.model_validate("w4a16g32")
    large = quantize(1e6 * torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), scheme.weights)
    save_changes(tmp_path / "changes" / "block_000.safetensors", {f"{name}.weight": (large, scheme)})
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))), changes=(tmp_path / "changes",))
    with pytest.raises(QtoolError, match=rf"{name}: its scales are beyond float16, up to .*; use export/safetensors"):
        export("gguf", model)
