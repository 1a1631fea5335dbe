"""The reader of qtool's own checkpoints refuses what a newer qtool wrote, and files that are damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.model.handle import ModelHandle
from qtool.model.own_layout import VERSION, pack_linear, read_facts, unpack_linear, unpack_low_rank
from qtool.model.readers import reader_of

Change = Callable[[dict[str, Any]], object]
Export = Callable[..., Path]
ChangeFile = Callable[[Path, Change], ModelHandle]


def in_facts(change: Change) -> Change:
    """A change of tensors: of what their facts say."""

    def run(tensors: dict[str, Any]) -> None:
        facts = json.loads(bytes(tensors["x.weight::facts"].tolist()))
        change(facts)
        tensors["x.weight::facts"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)

    return run


def tensors_of_x() -> dict[str, Tensor]:
    """Those of a linear x [16, 64] in w4a16g32-asym with low-rank factors of rank 3."""
    W, scheme = torch.randn(16, 64, generator=torch.Generator().manual_seed(0)), Scheme.model_validate("w4a16g32-asym")
    return pack_linear("x", quantize(W, scheme.weights), scheme, LowRank(W[:, :3].clone(), W[:3].clone()))


def read_all(tensors: dict[str, Tensor]) -> None:
    def read(names: list[str]) -> dict[str, Tensor]:
        return {name: tensors[name] for name in names if name in tensors}

    stored = read_facts("x", read)
    assert stored is not None
    unpack_linear(stored, read)
    unpack_low_rank(stored, read)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("x.weight::zero"), r"no tensor x\.weight::zero; it is damaged, export it again"),
        (lambda t: t.pop("x.low_rank::right"), r"no tensor x\.low_rank::right; it is damaged, export it again"),
        (lambda t: t.pop("x.weight::facts"), r"x has codes but no x\.weight::facts; the checkpoint is damaged"),
        (lambda t: t.update({"x.weight::codes": torch.zeros(16, 4)}), r"::codes is float32 \[16, 4\], must be int32 \[16, 8\]"),
        (lambda t: t.update({"x.weight::scale": torch.ones(16, 2)}), r"::scale is float32 \[16, 2\], must be bfloat16"),
        (lambda t: t["x.weight::facts"].fill_(123), r"::facts cannot be read \(JSONDecodeError: "),
        (lambda t: t["x.weight::facts"].fill_(255), r"::facts cannot be read \(UnicodeDecodeError: "),
        (in_facts(lambda f: f.pop("scheme")), r"cannot be read \(KeyError: 'scheme'\)"),
        (in_facts(lambda f: f["weight"].pop("codes")), r"cannot be read \(KeyError: 'codes'\)"),
        (in_facts(lambda f: f["low_rank"].pop("left")), r"cannot be read \(KeyError: 'left'\)"),
        (in_facts(lambda f: f["facts"].pop("of_tensor")), r"cannot be read \(KeyError: 'of_tensor'\)"),
        (in_facts(lambda f: f["scheme"]["weights"].update(format="w9")), r"cannot be read \(ValidationError: "),
        (in_facts(lambda f: f["facts"]["scheme"].update(bits=5)), r"ValueError: 8 words of codes in a row, must be 10"),
        (in_facts(lambda f: f.update(columns=[128])), r"ValueError: 8 words of codes in a row, must be 16"),
        (in_facts(lambda f: f["facts"]["scheme"].update(group=16)), r"x: scale is \[16, 2\], must be \[16, 4\] for w4g16"),
        (in_facts(lambda f: f["facts"]["scheme"].update(symmetric=True)), "zero points do not go with w4g32"),
        (in_facts(lambda f: f.update(weight=[1])), r"cannot be read \(AttributeError: "),
    ],
)
def test_what_is_damaged_is_refused(change: Change, message: str) -> None:
    tensors = tensors_of_x()
    read_all(tensors)
    change(tensors)
    with pytest.raises(QtoolError, match=message):
        read_all(tensors)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (VERSION + 1, f"a newer qtool wrote version {VERSION + 1}, this one reads up to {VERSION}; update qtool"),
        (None, f"version is None, must be a whole number from 1 to {VERSION}; export the model again"),
        (0, "version is 0, must be a whole number"),
    ],
)
def test_a_version_that_is_not_known_is_refused(version: object, message: str) -> None:
    config = {"quant_method": "qtool", "version": version}
    reader = reader_of(config)
    for ask in (reader.read_scheme, reader.read_linear, reader.read_low_rank):
        with pytest.raises(QtoolError, match=f"quantization_config: {message}"):
            ask(None, "x", config)  # before it looks into the checkpoint


def test_a_file_that_lacks_or_contradicts_a_linear_is_refused(exported: Export, change_tensors: ChangeFile) -> None:
    folder, name = exported("qtool", {"*q_proj": "w4a16g32-asym"}), "model.layers.0.self_attn.q_proj"

    def narrow(tensors: dict[str, Any]) -> None:
        key = f"{name}.weight::facts"
        text = bytes(tensors[key].tolist()).replace(b'"columns": [64]', b'"columns": [63]')
        tensors[key] = torch.tensor(list(text), dtype=torch.uint8)

    with pytest.raises(QtoolError, match=r"q_proj is \[64, 63\], the config makes it \[64, 64\]; is it the right checkpoint"):
        change_tensors(folder, narrow).block(0)

    def leave_out(tensors: dict[str, Any]) -> None:
        for key in [key for key in tensors if key.startswith(name)]:
            del tensors[key]

    with pytest.raises(QtoolError, match=r"has no tensor .*q_proj\.weight \(1 missing\)"):
        change_tensors(folder, leave_out).block(0)


def test_signs_of_a_rotation_that_are_none_are_refused(exported: Export, change_tensors: ChangeFile) -> None:
    folder, name = exported("qtool", {"*": "w4a16g32"}), "model.layers.0.self_attn.o_proj"
    for signs, message in (
        (torch.zeros(64, dtype=torch.int8), r"o_proj\.rotation::signs is int8 \[64\], must be one sign"),
        (torch.ones(64), r"o_proj\.rotation::signs is float32 \[64\], must be one sign"),
        (torch.ones(32, dtype=torch.int8), "o_proj's input has 32 signs, must have 64"),
    ):

        def plant(tensors: dict[str, Any], signs: Tensor = signs) -> None:
            tensors[f"{name}.rotation::signs"] = signs

        with pytest.raises(QtoolError, match=message):
            change_tensors(folder, plant).block(0)
