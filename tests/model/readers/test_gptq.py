"""The reader of GPTQ checkpoints: takes what others write, refuses what it cannot decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.packing import pack_int32, unpack_int32
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

NAME = "model.layers.0.self_attn.q_proj"
Change = Callable[[dict[str, Any]], object]
Export = Callable[..., Path]
ChangeFile = Callable[[Path, Change], ModelHandle]


def layers(model: ModelHandle) -> dict[str, torch.Tensor]:
    return {name: weight_of(layer) for block in model.blocks() for name, layer in block.linears().items()}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_checkpoint_of_either_format_decodes_to_the_same_weights(
    bits: int, exported: Export, change_config: ChangeFile, change_tensors: ChangeFile
) -> None:
    folder = exported("gptq", f"w{bits}a16g32-asym")

    def to_v1(tensors: dict[str, Any]) -> None:
        for name in tensors:
            if name.endswith("qzeros"):
                columns = tensors[name].shape[1] * 32 // bits
                zero = unpack_int32(tensors[name], bits, columns).clamp(min=1)
                tensors[name] = pack_int32(zero, bits)
                ones[name] = pack_int32(zero - 1, bits)

    ones: dict[str, torch.Tensor] = {}
    expected = layers(change_tensors(folder, to_v1))
    change_tensors(folder, lambda tensors: tensors.update(ones))
    found = layers(change_config(folder, lambda config: config.update(checkpoint_format="gptq")))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.pop("checkpoint_format"),
        lambda config: config.update(format=config.pop("checkpoint_format")),
        lambda config: config.update(desc_act=True, damp_percent=0.1, static_groups=False, meta={"quantizer": ["other:1"]}),
        lambda config: config.update(dynamic={"-:.*lm_head": {}, r".*\.down_proj": {"bits": 4}}),
    ],
)
def test_configs_as_others_write_them_are_read(change: Change, exported: Export, change_config: ChangeFile) -> None:
    folder = exported("gptq", "w4a16g32")
    expected = layers(ModelHandle(ModelOptions(path=str(folder))))
    found = layers(change_config(folder, change))
    assert expected and all(torch.equal(found[name], expected[name]) for name in expected)


def test_g_idx_may_be_left_out(exported: Export, change_tensors: ChangeFile) -> None:
    folder = exported("gptq", "w4a16g32")
    model = change_tensors(folder, lambda tensors: [tensors.pop(name) for name in [*tensors] if name.endswith("g_idx")])
    assert isinstance(model.block(0).get(NAME), QuantLinear)


def test_the_first_pattern_that_fits_counts_and_minus_goes_before_plus(exported: Export, change_config: ChangeFile) -> None:
    folder = exported("gptq", {"self_attn.*": "w8a16g32", "mlp.*": "w4a16g32"})

    def change(config: dict[str, Any]) -> None:
        wide = {"bits": 8, "group_size": 32}
        config["dynamic"] = {
            r".*\.0\.self_attn": wide,
            r"+:.*\.self_attn\.": wide,
            r".*\.(q|down)_proj": {"bits": 2},
            "-:lm": {},
        }
        config["dynamic"] |= {r".*\.mlp\.": {"bits": 4}}
        config["dynamic"] = {key: config["dynamic"][key] for key in sorted(config["dynamic"], key=lambda key: "down" in key)}

    found = change_config(folder, change).schemes()
    assert {str(scheme) for name, scheme in found.items() if "attn" in name} == {"w8a16g32"}
    assert {str(scheme) for name, scheme in found.items() if "mlp" in name} == {"w4a16g32"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(checkpoint_format="gptq_p"),
            "GPTQ's checkpoint format gptq_p cannot be read, gptq and gptq_v2 can",
        ),
        (lambda c: c.update(is_marlin_format=True), "checkpoint format marlin cannot be read"),
        (lambda c: c.update(checkpoint_format="gptq_v2"), "q_proj: zero points other than 8 contradict its symmetric scheme"),
        (lambda c: c.update(bits=5), "q_proj: 5 bits in GPTQ's layout cannot be read, 2, 3, 4, 8 can"),
        (lambda c: c.update(bits=8), r"q_proj: qzeros is torch.int32 \[2, 8\], must be torch.int32 \[2, 16\] for w8g32"),
        (lambda c: c.update(group_size=64), "q_proj: 2 groups of scales do not belong to 64 columns of w4g64"),
        (lambda c: c.update(group_size=-1), "q_proj: 2 groups of scales do not belong to 64 columns of w4"),
        (lambda c: c.update(group_size=4), "q_proj: its scheme cannot be read: weights.group|group"),
        (
            lambda c: c.update(dynamic={"-:.*q_proj": {}}),
            "q_proj is quantized, but quantization_config's dynamic leaves it out",
        ),
        (lambda c: c.update(quant_method="awq", checkpoint_format="gemm"), "q_proj: qweight is torch.int32 .*, must be"),
    ],
)
def test_what_it_cannot_decode_is_refused(change: Change, message: str, exported: Export, change_config: ChangeFile) -> None:
    model = change_config(exported("gptq", "w4a16g32"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({f"{NAME}.g_idx": t[f"{NAME}.g_idx"].flip(0)}), r"q_proj: g_idx orders columns .*\(desc_act\)"),
        (lambda t: t.pop(f"{NAME}.qweight"), "q_proj has scales but no qweight; is it GPTQ's layout"),
        (lambda t: t.update({f"{NAME}.qweight": t[f"{NAME}.qweight"].long()}), "qweight is torch.int64 .* must be torch.int32"),
        (lambda t: t.update({f"{NAME}.qzeros": t[f"{NAME}.qzeros"][:1]}), r"qzeros is torch.int32 \[1, 8\], must be"),
        (lambda t: t[f"{NAME}.scales"].fill_(torch.nan), "scales holds 128 NaN or infinite values"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(
    change: Change, message: str, exported: Export, change_tensors: ChangeFile
) -> None:
    model = change_tensors(exported("gptq", "w4a16g32"), change)
    with pytest.raises(QtoolError, match=message):
        model.block(0)


def test_a_zero_point_of_0_is_read_from_the_older_format_where_gptqmodel_wrote_it(
    exported: Export, change_config: ChangeFile, change_tensors: ChangeFile
) -> None:
    folder = exported("gptq", "w4a16g32-asym")
    change_tensors(folder, lambda tensors: tensors[f"{NAME}.qzeros"].fill_(-1))
    model = change_config(folder, lambda config: config.update(checkpoint_format="gptq"))
    with pytest.raises(QtoolError, match="q_proj: a zero point of 0, which checkpoint format gptq cannot tell"):
        model.block(0)
    layer = change_config(folder, lambda config: config.update(meta={"quantizer": ["gptqmodel:7.7.0"]})).block(0).get(NAME)
    assert isinstance(layer, QuantLinear) and layer.qt.zero is not None  # -1 and a one for each nibble is 0x11111110
    assert layer.qt.zero[:, 0].tolist() == 8 * [0, 1, 1, 1, 1, 1, 1, 1]


def test_experts_in_this_layout_are_refused_by_name(tiny_model: Callable[..., Path], change_tensors: ChangeFile) -> None:
    folder = tiny_model("mixtral")

    def change(tensors: dict[str, Any]) -> None:
        expert = next(name for name in tensors if ".experts.0.w1.weight" in name).removesuffix(".weight")
        tensors[f"{expert}.scales"] = torch.ones(2, 128)

    change_tensors(folder, change)
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match="experts can be read from compressed-tensors checkpoints, not from this one"):
        ModelHandle(ModelOptions(path=str(folder))).block(0)


def test_a_dense_export_leaves_no_word_of_the_quantized_checkpoint(exported: Export, export: Callable[..., Artifact]) -> None:
    folder = exported("gptq", "w4a16g32")
    dense = export("safetensors", ModelHandle(ModelOptions(path=str(folder)))).path
    assert (folder / "quantize_config.json").is_file() and not (dense / "quantize_config.json").exists()
