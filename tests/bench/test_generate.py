"""bench generate: every subject writes the same text, in the memory that it says, and times are of what they say."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qtool import registry
from qtool.bench.generate import Workload, bench_generate, decoded, speedups
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.layers.rotated_input import rotate_input
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.progress import Silent

WORK = Workload((1, 3), prompt=6, new=4, repetitions=2)


@pytest.fixture
def exported(tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], tmp_path: Path) -> ModelOptions:
    model = quantized(tiny_model("llama", dtype="bfloat16", num_key_value_heads=4), "w4a16g32")
    method = registry.load("export/qtool")
    (tmp_path / "out").mkdir()
    method.export(model, tmp_path / "out", method.options())
    return ModelOptions(path=str(tmp_path / "out"), device="cpu")


def test_subjects_batches_and_memory(exported: ModelOptions) -> None:
    results = bench_generate(exported, WORK, Silent(), with_reference=True)
    rows = results["rows"]
    assert [(row["subject"], row["batch"]) for row in rows] == [
        (subject, batch) for subject in ("16 bits", "fast", "reference") for batch in (1, 3)
    ]
    assert results["linears"] == ["14 of 14 linears: torch int4"]
    for row in rows:
        first, decode = row["first_token_seconds"], row["decode_tokens_per_second"]
        assert 0 < first["low"] <= first["median"] <= first["high"] and first["samples"] == WORK.repetitions
        assert 0 < decode["low"] <= decode["median"] <= decode["high"]
        assert row["decoding"] == {"form": "calls", "why": None}
    weights = {row["subject"]: row["weights_bytes"] for row in rows}
    in_blocks = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # weights of the linears
    assert weights["16 bits"] - weights["reference"] == pytest.approx(in_blocks * (2 - 1 - 2 / 32), rel=0.01)
    assert weights["16 bits"] - weights["fast"] == pytest.approx(in_blocks * (2 - 0.5 - 4 / 32), rel=0.01)  # scales in pairs


def test_speedups_are_over_sixteen_bits() -> None:
    def row(subject: str, first: float, decode: float) -> dict[str, object]:
        return {
            "subject": subject,
            "batch": 2,
            "first_token_seconds": {"median": first},
            "decode_tokens_per_second": {"median": decode},
        }

    assert speedups([row("16 bits", 3.0, 10.0), row("fast", 2.0, 40.0)], "fast") == [(2, 1.5, 4.0)]


def test_a_decoded_layer_has_the_weights_the_bias_and_the_rotation() -> None:
    random = torch.Generator().manual_seed(0)
    tensor = quantize(torch.randn(64, 64, generator=random), Scheme.model_validate("w4a16g32").weights)
    layer = QuantLinear(tensor, torch.randn(64, generator=random))
    rotate_input(layer, torch.randint(0, 2, (64,), generator=random) * 2 - 1)
    x = torch.randn(5, 64, generator=random)
    torch.testing.assert_close(decoded(layer, torch.float32)(x), layer(x))


def test_a_dense_model_and_too_long_a_text_are_refused(exported: ModelOptions, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(QtoolError, match="has no quantized linear; name an export or a run's folder"):
        bench_generate(ModelOptions(path=str(tiny_model("llama", name="dense")), device="cpu"), WORK, Silent())
    with pytest.raises(QtoolError, match="--prompt 510 and --new 4 come to more than the model's 512 positions"):
        bench_generate(exported, Workload((1,), 510, 4, 1), Silent())
