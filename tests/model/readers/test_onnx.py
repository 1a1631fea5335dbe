"""The reader of ONNX folders: the graph's nodes say how linears are held; what contradicts them is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

NAME = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def packed(exported: Callable[..., Path]) -> Path:
    return exported("onnx", {"q_proj": "w4a16g32-asym", "k_proj": "w8a16"})


def change(folder: Path, edit: Callable[[Any], object]) -> ModelHandle:
    """The folder after an edit of the graph."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return ModelHandle(ModelOptions(path=str(folder)))


def node_of(graph: Any, op: str) -> Any:
    return next(node for node in graph.node if node.op_type == op)


def test_nodes_say_how_linears_are_held(packed: Path) -> None:
    found = {name: str(scheme) for name, scheme in ModelHandle(ModelOptions(path=str(packed))).schemes().items()}
    parts = {"q_proj": "w4a16g32-asym", "k_proj": "w8a16"}
    assert found == {f"model.layers.{i}.self_attn.{part}": scheme for i in (0, 1) for part, scheme in parts.items()}


def test_attributes_that_contradict_the_tensors_are_refused(packed: Path) -> None:
    def edit(graph: Any) -> None:
        (attribute,) = (entry for entry in node_of(graph, "MatMulNBits").attribute if entry.name == "block_size")
        attribute.i = 16

    model = change(packed, edit)
    message = rf"model: {NAME}: qweight is UINT8 \[64, 2, 16\], must be UINT8 \[64, 4, 8\] for w4g16-asym"
    with pytest.raises(QtoolError, match=message):
        model.block(0)


def test_zero_points_that_a_node_does_not_take_change_its_scheme(packed: Path) -> None:
    model = change(packed, lambda graph: node_of(graph, "MatMulNBits").input.pop())
    assert str(model.schemes()[NAME]) == "w4a16g32"  # onnxruntime then takes 8 for all of them, and so does the reader


def test_attributes_that_are_missing_are_refused(packed: Path) -> None:
    with pytest.raises(QtoolError, match="is truncated or no ONNX file"):
        change(packed, lambda graph: node_of(graph, "MatMulNBits").ClearField("attribute"))


def test_a_part_that_is_missing_is_refused(packed: Path) -> None:
    def edit(graph: Any) -> None:
        graph.initializer.remove(next(part for part in graph.initializer if part.name == f"{NAME}.scales"))

    with pytest.raises(QtoolError, match=rf"model: {NAME}: scales is missing, must be FLOAT \[64, 2\] for w4g32-asym"):
        change(packed, edit).block(0)


def test_a_number_of_bits_that_no_scheme_has_is_refused(packed: Path) -> None:
    def edit(graph: Any) -> None:
        (attribute,) = (entry for entry in node_of(graph, "MatMulNBits").attribute if entry.name == "bits")
        attribute.i = 9

    with pytest.raises(QtoolError, match=f"model: {NAME}: its scheme cannot be read"):
        change(packed, edit).schemes()


def test_a_folder_without_its_graph_is_refused(packed: Path) -> None:
    (packed / "model.onnx").unlink()
    with pytest.raises(QtoolError, match="is truncated or no ONNX file"):
        ModelHandle(ModelOptions(path=str(packed)))
