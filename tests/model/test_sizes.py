"""The size of an export, told before any weight is loaded: never less than what is written, at most 1 % more."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool.artifact import write_manifest
from qtool.formats.scheme import Scheme
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.sizes import export_size, packed_size
from qtool.model.writer import Storage
from qtool.registry import load

Quantized = Callable[..., ModelHandle]
TinyModel = Callable[..., Path]


def told_and_written(key: str, model: ModelHandle, out: Path) -> tuple[int, int]:
    method = load(key)
    out.mkdir()
    artifact = method.export(model, out, method.options())
    write_manifest(out, artifact.sha256)
    return export_size(method, model, model.schemes(), method.options()), sum(path.stat().st_size for path in out.iterdir())


@pytest.mark.parametrize(
    ("key", "scheme"),
    [
        ("export/compressed_tensors", "w4a16g32-asym"),
        ("export/compressed_tensors", "nvfp4"),
        ("export/gptq", "w3a16g32"),
        ("export/gptq", "w4a16g32-asym"),
        ("export/awq", "w4a16g32"),
        ("export/bitsandbytes", "fp4_bnbg32-dq"),
        ("export/torchao", "w8a8"),
        ("export/gguf", "w4a16g32"),
        ("export/onnx", "w4a16g32-asym"),
        ("export/safetensors", "w2a16g32"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_of_a_dense_model(
    family: str, key: str, scheme: str, tiny_model: TinyModel, quantized: Quantized, tmp_path: Path
) -> None:
    told, written = told_and_written(key, quantized(tiny_model(family, dtype="bfloat16"), scheme), tmp_path / "out")
    assert written <= told <= 1.01 * written


def test_of_a_head_that_is_the_embedding(tiny_model: TinyModel, quantized: Quantized, tmp_path: Path) -> None:
    model = quantized(tiny_model("llama", dtype="bfloat16", tie_word_embeddings=True), "w4a16g32")
    told, written = told_and_written("export/compressed_tensors", model, tmp_path / "out")
    assert written <= told <= 1.01 * written


@pytest.mark.parametrize("shape", [(1024, 64), (3072, 64), (3104, 64)])
@pytest.mark.parametrize("scheme", ["w4a16g32-asym", "nf4g64-dq", "w3a16", "e8pg64"])
def test_a_tall_matrix_is_told_from_two_flat_ones(shape: tuple[int, int], scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many bytes as the whole matrix has; scales quantized by 256 leave a remainder of less than ten bytes."""
    read = Scheme.model_validate(scheme)

    def encode(name: str, layer: QuantLinear) -> tuple[dict[str, torch.Tensor], bool]:
        return layer.qt.parts(), True

    told, _ = packed_size("x", shape, read, Storage(encode))
    monkeypatch.setattr("qtool.model.sizes.FLAT", 10**6)
    whole, _ = packed_size("x", shape, read, Storage(encode))
    assert abs(told - whole) < 10
