"""The ONNX export: onnxruntime computes what the model in memory does, token by token too; qtool reads every code back."""

import copy
import gc
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnx as package
import onnxruntime
import pytest
import torch

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.methods.export.onnx import METHOD, OnnxOptions
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Export = Callable[..., Artifact]
Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], torch.Tensor]
SameCodes = Callable[[ModelHandle, ModelHandle], None]
TOKENS = torch.randint(2, 4096, (3, 40), generator=torch.Generator().manual_seed(0))
# Both sides compute in float32 and add up in other orders: what remains is a few times 2^-24, times the depth.
TOLERANCE = 1e-5


def opened(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder)))


class Session:
    """A folder in onnxruntime: what comes after `past`, None at first."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Else DequantizeLinear and MatMul become a product that rounds its inputs to eight bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.cache = [port for port in self.session.get_inputs() if port.name.startswith("past_key_values")]

    def run(
        self, tokens: torch.Tensor, past: list[np.ndarray] | None = None, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[np.ndarray]]:
        """Logits [batch, sequence, vocab] and the longer cache; mask [batch, total] is ones where None."""
        n_past = 0 if past is None else past[0].shape[2]
        mask = torch.ones(len(tokens), n_past + tokens.shape[1], dtype=torch.int64) if mask is None else mask
        if past is None:
            past = [np.zeros((len(tokens), port.shape[1], 0, port.shape[3]), np.float32) for port in self.cache]
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, n_past:]  # from each row's first token, as transformers counts them
        fed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        fed = {name: tensor.numpy() for name, tensor in fed.items()} | {
            port.name: part for port, part in zip(self.cache, past, strict=True)
        }
        logits, *present = self.session.run(None, fed)
        return torch.from_numpy(logits), present

    def greedy(self, tokens: torch.Tensor, n_new: int, mask: torch.Tensor | None = None) -> torch.Tensor:
        """The n_new tokens [batch, n_new] that follow, each from the cache of those before it."""
        logits, past = self.run(tokens, mask=mask)
        found = [logits[:, -1:].argmax(-1)]
        while len(found) < n_new:
            if mask is not None:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            logits, past = self.run(found[-1], past, mask)
            found.append(logits.argmax(-1))
        return torch.cat(found, 1)


def in_float32(model: ModelHandle) -> torch.nn.Module:
    """The model in memory with every tensor widened, so that it computes in float32."""
    with model.materialized() as module:
        return copy.deepcopy(module).float()


def expected_logits(model: ModelHandle) -> torch.Tensor:
    with torch.no_grad():
        return in_float32(model)(TOKENS).logits


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


CASES = [
    ("llama", "w4a16g32", "matmul_nbits", "float32", {}),
    ("llama", "w4a16g32-asym", "matmul_nbits", "bfloat16", {}),
    ("llama", "w4a16g32", "qdq", "bfloat16", {}),
    ("llama", "w8a16", "matmul_nbits", "bfloat16", {}),
    ("llama", "w2a16g16-asym", "matmul_nbits", "float16", {}),
    ("llama", "w8a16g64", "matmul_nbits", "float32", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {}, "matmul_nbits", "bfloat16", {}),
    ("llama", {"lm_head": "w8a16g32", "layers.1.*": "w4a16g16"}, "matmul_nbits", "bfloat16", {}),
    ("llama", "w4a16g32", "matmul_nbits", "bfloat16", {"tie_word_embeddings": True}),
    ("mistral", "w8a16g32-asym", "matmul_nbits", "bfloat16", {}),
    ("mistral", "w4a16-asym", "qdq", "float32", {"sliding_window": None, "num_key_value_heads": 1}),
    ("qwen2", "w4a16g64", "matmul_nbits", "bfloat16", {"tie_word_embeddings": True}),
    ("qwen2", "w2a16g32", "qdq", "bfloat16", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ("qwen3", "w4a16g32-asym", "qdq", "float32", {"head_dim": 32}),
    ("qwen3", "w8a16-asym", "qdq", "bfloat16", {"num_key_value_heads": 4}),
]


@pytest.mark.parametrize(("family", "scheme", "layout", "dtype", "fields"), CASES)
def test_onnxruntime_computes_the_model_in_memory_and_every_code_comes_back(
    export: Export,
    family: str,
    scheme: object,
    layout: str,
    dtype: str,
    fields: dict[str, object],
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
    same_codes: SameCodes,
    logits_of: LogitsOf,
) -> None:
    model = quantized(tiny_model(family, dtype=dtype, **fields), scheme)
    assert export("onnx", model, layout=layout).lossless
    package.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    logits, _ = Session(tmp_path / "out").run(TOKENS)
    assert distance(logits, expected_logits(model)) < TOLERANCE
    if scheme:
        same_codes(opened(tmp_path / "out"), model)
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0},
    ],
)
def test_positions_are_turned_as_the_models_own_module_does(
    export: Export, rope: dict[str, object], tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    stated = {"rope_theta": 100.0, "original_max_position_embeddings": 16}
    model = quantized(tiny_model("llama", rope_parameters=rope | stated), "w4a16g32")
    export("onnx", model)
    assert distance(Session(tmp_path / "out").run(TOKENS)[0], expected_logits(model)) < TOLERANCE


@pytest.mark.parametrize(("family", "layout"), [("llama", "qdq"), ("mistral", "matmul_nbits"), ("qwen3", "matmul_nbits")])
def test_64_tokens_from_a_cache_are_those_of_transformers(
    export: Export, family: str, layout: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model(family, dtype="bfloat16"), "w4a16g32")
    export("onnx", model, layout=layout)
    prompt = TOKENS[:, :7]
    theirs = in_float32(model).generate(  # mistral's windows, of 16 tokens, are left behind
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=64, min_new_tokens=64, do_sample=False
    )
    # transformers holds the end of a text back until then; so do we.
    session = Session(tmp_path / "out")
    logits, past = session.run(prompt)
    found = []
    for _ in range(64):
        logits[:, -1, 1] = -torch.inf
        found.append(logits[:, -1:].argmax(-1))
        logits, past = session.run(found[-1], past)
    assert past[0].shape == (3, 2, 71, 16)
    assert torch.equal(torch.cat(found, 1), theirs[:, 7:])


def test_a_text_in_pieces_gives_the_same_logits(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model("mistral"), "w4a16g32"))
    session = Session(tmp_path / "out")
    whole, cache = session.run(TOKENS)
    past, found = None, []
    for piece in TOKENS.split([1, 20, 3, 16], 1):
        logits, past = session.run(piece, past)
        found.append(logits)
    assert past is not None and distance(torch.cat(found, 1), whole) < TOLERANCE
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(past, cache, strict=True))


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_rows_padded_on_the_left_are_what_they_are_alone(
    export: Export, family: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model(family), "w4a16g32"))
    session, lengths = Session(tmp_path / "out"), (24, 9, 1)
    mask = torch.stack([(torch.arange(24) >= 24 - length).long() for length in lengths])
    tokens = torch.where(mask.bool(), TOKENS[:, :24], 1)
    logits, _ = session.run(tokens, mask=mask)
    assert bool(logits.isfinite().all())  # of padding too
    together = session.greedy(tokens, 20, mask)
    for row, length in enumerate(lengths):
        alone = tokens[row : row + 1, 24 - length :]
        assert distance(logits[row, 24 - length :], session.run(alone)[0][0]) < TOLERANCE
        assert torch.equal(together[row : row + 1], session.greedy(alone, 20))


def test_the_smallest_model_is_held(export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = quantized(tiny_model("llama", **sizes, num_key_value_heads=1, head_dim=2), {"o_proj": "w4a16", "*": "w4a16g16"})
    export("onnx", model)
    session = Session(tmp_path / "out")
    one = TOKENS[:1, :1]
    with torch.no_grad():
        assert distance(session.run(one)[0], in_float32(model)(one).logits) < TOLERANCE


def test_inputs_and_outputs_have_the_names_that_runtimes_know(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model("llama"), "w4a16g32"))
    session = Session(tmp_path / "out").session
    total = "past_sequence_length + sequence_length"
    found = {port.name: (port.type, port.shape) for port in (*session.get_inputs(), *session.get_outputs())}
    cache = {f"past_key_values.{index}.{part}": "past_sequence_length" for index in (0, 1) for part in ("key", "value")}
    cache |= {f"present.{index}.{part}": total for index in (0, 1) for part in ("key", "value")}
    assert found == {
        "input_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "attention_mask": ("tensor(int64)", ["batch_size", total]),
        "position_ids": ("tensor(int64)", ["batch_size", "sequence_length"]),
        "logits": ("tensor(float)", ["batch_size", "sequence_length", 4096]),
        **{name: ("tensor(float)", ["batch_size", 2, length, 16]) for name, length in cache.items()},
    }


@pytest.mark.parametrize(
    ("scheme", "layout", "ops", "opset"),
    [
        ("w4a16g32", "matmul_nbits", {"MatMulNBits": 14, "DequantizeLinear": 0}, 21),
        ("w8a16", "matmul_nbits", {"MatMulNBits": 0, "DequantizeLinear": 14}, 21),
        ("w4a16g32", "qdq", {"MatMulNBits": 0, "DequantizeLinear": 14}, 21),
        ("w2a16g32", "qdq", {"MatMulNBits": 0, "DequantizeLinear": 14}, 25),
    ],
)
def test_quantized_linears_are_the_operators_of_the_layout(
    export: Export,
    scheme: str,
    layout: str,
    ops: dict[str, int],
    opset: int,
    tiny_model: TinyModel,
    quantized: Quantized,
    tmp_path: Path,
) -> None:
    export("onnx", quantized(tiny_model("llama"), scheme), layout=layout)
    model = package.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    assert {op: kinds.count(op) for op in ops} == ops
    assert [entry.version for entry in model.opset_import if not entry.domain] == [opset]
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {entry.name: entry.i for entry in node.attribute}
            assert (attributes["bits"], attributes["block_size"], attributes["accuracy_level"]) == (4, 32, 1)
            assert len(node.input) == 3  # the default zero points


@pytest.mark.parametrize("scheme", ["w8a16g32", "w2a16g32-asym"])
def test_inputs_rounded_to_eight_bits_are_asked_for_by_the_node(
    export: Export, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    export("onnx", model, accuracy_level=4)
    graph = package.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert {entry.i for node in nodes for entry in node.attribute if entry.name == "accuracy_level"} == {4}
    # Rounding blocks of 32 inputs to steps of 1/127 of the largest costs a linear half a percent; fourteen add up as squares.
    assert distance(Session(tmp_path / "out").run(TOKENS)[0], expected_logits(model)) < 14**0.5 * 1e-2
    with pytest.raises(ValueError, match="accuracy_level is MatMulNBits'; with qdq the session that loads the file decides"):
        OnnxOptions(layout="qdq", accuracy_level=4)


def test_norms_are_a_pattern_that_onnxruntime_knows(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model("qwen3", dtype="bfloat16"), "w4a16g32"))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in package.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert kinds.count("SimplifiedLayerNormalization") == 2 * 4 + 1 and "ReduceMean" not in kinds
    # Of queries, keys, values and what they gave; not of dense weights, and keys' second ones went into their products.
    assert kinds.count("Transpose") == 2 * 4


def test_the_data_file_holds_codes_scales_and_dense_tensors_and_no_more(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model("llama", dtype="bfloat16"), "w4a16g32-asym"))
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128)
    outer = 2 * 4096 * 64 * 2 + 5 * 64 * 2
    linears = weights // 2 + weights // 32 * 4 + weights // 64  # two groups' zero points in a byte
    size = (tmp_path / "out" / "model.onnx.data").stat().st_size
    assert 0 <= size - (linears + outer) < 64 * 50  # each of the tensors begins at a multiple of 64


@pytest.mark.parametrize("scheme", ["mxint8", {"weights": {"bits": 4, "group": 16, "scale_dtype": "float8_e4m3fn"}}])
def test_scales_of_eight_bits_are_held_too(
    export: Export, scheme: object, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path, logits_of: LogitsOf
) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16"), scheme)
    assert export("onnx", model).lossless
    assert torch.equal(logits_of(opened(tmp_path / "out")), logits_of(model))
    assert distance(Session(tmp_path / "out").run(TOKENS)[0], expected_logits(model)) < TOLERANCE


def test_what_is_read_can_be_exported_again(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    export("onnx", quantized(tiny_model("qwen2"), "w4a16g32-asym"), layout="qdq")
    export("onnx", opened(tmp_path / "out"), out="again", layout="qdq")
    first, second = ((tmp_path / folder / "model.onnx.data").read_bytes() for folder in ("out", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w3a16g32", "q_proj: w3a16g32: kernels take 2 or 4 or 8 bits; quantize so, or use export/compressed_tensors"),
        ("nf4g64", "this export holds whole numbers; quantize to w4a16g32, or use export/safetensors"),
        ("w4a16g8", "kernels take groups of 16, 32, 64, 128, 256 or a whole row; quantize so"),
        ("w4a16g32-asymf16", "zero points must be codes, as in w4a16g128-asym; quantize so, or use export/safetensors"),
        ("w4a16g32-ic", "this export holds plain scales along `in`"),
        ("w4a16g32-dq", "this export holds plain scales along `in`"),
        ("w8a8", "this export holds weights alone; quantize to w8, or use export/compressed_tensors"),
        ("w8a16kv8", "this export holds weights alone"),
    ],
)
def test_schemes_that_operators_do_not_decode_are_refused_before_anything_is_written(
    export: Export, scheme: str, message: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    model = quantized(tiny_model("llama"), scheme)
    with pytest.raises(QtoolError, match=message):
        export("onnx", model)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("gpt2", {}, "export/onnx: gpt2 models cannot be written, llama, mistral, qwen2, qwen3 can; use export/safetensors"),
        ("mixtral", {}, "mixtral models cannot be written"),
        ("gemma3", {}, "gemma3_text models cannot be written"),
        ("llama", {"hidden_act": "gelu"}, "llama with gelu cannot be written, with silu it can"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "rotary positions of type dynamic cannot be written, default, linear, llama3, yarn can",
        ),
    ],
)
def test_models_without_a_graph_are_refused_by_the_plan_alone(
    family: str, fields: dict[str, object], message: str, tiny_model: TinyModel
) -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match=message):
        METHOD.check(opened(tiny_model(family, **fields)), OnnxOptions())


def test_a_tied_head_with_codes_of_its_own_is_refused(tiny_model: TinyModel) -> None:
    model = opened(tiny_model("llama", tie_word_embeddings=True))
    assert METHOD.holds is not None
    with pytest.raises(QtoolError, match="lm_head: a head that is the embedding has no codes of its own; add it to ignore"):
        METHOD.holds(model, {"lm_head": Scheme.model_validate("w8a16g32")}, OnnxOptions())


def test_without_the_package_the_plan_says_how_to_get_it(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match=r"export/onnx: ONNX files need the package onnx .*; pip install qtool\[onnx\]"):
        METHOD.check(opened(tiny_model("llama")), OnnxOptions())


def test_config_and_tokenizer_stand_beside_the_graph(
    export: Export, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    artifact = export("onnx", quantized(tiny_model("llama"), "w4a16g32"))
    assert set(artifact.sha256) == {
        "config.json",
        "generation_config.json",
        "model.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_one_block_is_in_memory_at_a_time(
    export: Export, tiny_model: TinyModel, quantized: Quantized, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny_model("llama", num_hidden_layers=4), "w4a16g32")
    left: list[int] = []
    inner = ModelHandle.block

    def block(self: ModelHandle, index: int) -> object:
        real = [name for name, p in self.model.named_parameters() if ".layers." in name and not p.is_meta]
        tensors = [found for found in gc.get_objects() if type(found) is torch.Tensor]
        packed = [found for found in tensors if found.dtype == torch.uint8 and found.numel() == 128 * 64 // 2]
        left.append(len(real) + len(packed))
        return inner(self, index)

    monkeypatch.setattr(ModelHandle, "block", block)
    export("onnx", model)
    assert left == [0] * 4  # whenever one is asked for, no other is there, nor the bytes of its wide linears


def test_a_full_disk_is_told(
    export: Export,
    tiny_model: TinyModel,
    quantized: Quantized,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    with full_disk(), pytest.raises(QtoolError, match="out: cannot write: .*; free space or choose another --out"):
        export("onnx", model)
