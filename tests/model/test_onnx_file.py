"""The ONNX container: the package onnx reads what is written; broken files, and what others wrote, are refused."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper

from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import Part
from qtool.model.onnx_file import DATA, Graph, Node, OnnxFile, OnnxWriter, Port, dense, read_header

TENSORS = {"row": torch.arange(5.0), "matrix": torch.arange(6).view(2, 3).to(torch.bfloat16)}
GRAPH = Graph(
    nodes=[Node("Cast", ("matrix",), "wide", {"to": 1}), Node("Mul", ("wide", "three"), "y"), Node("Add", ("row", "x"), "z")],
    constants={"three": torch.tensor(3.0)},
    inputs=[Port("x", "FLOAT", ("n", 5))],
    outputs=[Port("y", "FLOAT", (2, 3)), Port("z", "FLOAT", ("n", 5))],
    tensors=list(TENSORS),
)


def write(folder: Path) -> Path:
    writer = OnnxWriter(folder)
    for name in reversed(TENSORS):  # in another order than the graph's
        writer.add(name, dense(TENSORS[name]))
    writer.close(GRAPH)
    return folder


def change(folder: Path, edit: Callable[[Any], object]) -> None:
    model = onnx.load(write(folder) / "model.onnx", load_external_data=False)
    edit(model.graph)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def test_the_package_reads_graph_and_tensors(tmp_path: Path) -> None:
    onnx.checker.check_model(write(tmp_path) / "model.onnx", full_check=True)
    model = onnx.load(tmp_path / "model.onnx")
    found = {tensor.name: torch.tensor(numpy_helper.to_array(tensor).astype("float32")) for tensor in model.graph.initializer}
    assert found.keys() == {"row", "matrix", "three"}
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in TENSORS.items())
    assert [(node.op_type, node.name) for node in model.graph.node] == [("Cast", "wide"), ("Mul", "y"), ("Add", "z")]
    assert model.producer_name == "qtool" and model.ir_version == 10


def test_what_is_written_is_read_again_without_constants(tmp_path: Path) -> None:
    with OnnxFile(write(tmp_path) / DATA) as file:
        assert sorted(file.keys()) == sorted(TENSORS)
        for name, tensor in TENSORS.items():
            assert torch.equal(file.get_tensor(name), tensor) and file.get_tensor(name).dtype == tensor.dtype


def test_every_tensor_begins_at_a_multiple_of_64_bytes(tmp_path: Path) -> None:
    assert all(place.start % 64 == 0 for place in read_header(write(tmp_path)).places.values())


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    write(tmp_path)
    assert "more" not in read_header(tmp_path).places
    (tmp_path / DATA).unlink()
    writer = OnnxWriter(tmp_path)
    writer.add("more", dense(torch.ones(3)))
    writer.close(Graph([], {}, [], [], ["more"]))
    assert list(read_header(tmp_path).places) == ["more"]


def test_a_tensor_that_is_missing_or_written_twice_is_a_fault(tmp_path: Path) -> None:
    writer = OnnxWriter(tmp_path)
    writer.add("row", dense(TENSORS["row"]))
    with pytest.raises(AssertionError, match="matrix"):
        writer.close(GRAPH)
    with pytest.raises(AssertionError, match="row is written twice"):
        writer.add("row", dense(TENSORS["row"]))


@pytest.mark.parametrize("kept", [10, 100])
def test_a_graph_that_is_cut_off_is_refused(kept: int, tmp_path: Path) -> None:
    path = write(tmp_path) / "model.onnx"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(QtoolError, match=r"model\.onnx is truncated or no ONNX file .*; export it again"):
        read_header(tmp_path)


def test_data_that_is_cut_off_or_missing_is_refused(tmp_path: Path) -> None:
    data = write(tmp_path) / DATA
    data.write_bytes(data.read_bytes()[:70])
    with pytest.raises(QtoolError, match="is truncated: row has 6 of 20 bytes; export it again"):
        OnnxFile(data).get_tensor("row")
    data.unlink()
    with pytest.raises(QtoolError, match="cannot be read .*; export it again"):
        OnnxFile(data).get_tensor("row")


def elsewhere(graph: Any) -> None:
    graph.initializer[1].external_data[0].value = "../model.onnx.data"


def shorter(graph: Any) -> None:
    graph.initializer[1].external_data[2].value = "8"


def unknown(graph: Any) -> None:
    graph.initializer[1].data_type = onnx.TensorProto.FLOAT4E2M1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (elsewhere, r"row lies in \.\./model\.onnx\.data, must be in model\.onnx\.data; export it again"),
        (shorter, r"row has 8 bytes, FLOAT \[5\] has 20; export it again"),
        (unknown, "row is of ONNX's type FLOAT4E2M1, which cannot be read; export it again"),
    ],
)
def test_places_that_make_no_sense_are_refused(edit: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    change(tmp_path, edit)
    with pytest.raises(QtoolError, match=message):
        read_header(tmp_path)


def test_bytes_of_four_bits_are_kept_as_they_are(tmp_path: Path) -> None:
    writer = OnnxWriter(tmp_path)
    writer.add("codes", Part("INT4", (3, 1), torch.tensor([0x21, 0x03], dtype=torch.uint8)))
    writer.close(Graph([], {}, [], [], ["codes"]))
    (tensor,) = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert numpy_helper.to_array(tensor).astype(int).tolist() == [[1], [2], [3]]


def test_without_the_package_reading_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(QtoolError, match=r"pip install qtool\[onnx\]"):
        OnnxFile(tmp_path / DATA)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    writer = OnnxWriter(tmp_path / "nowhere")
    with pytest.raises(QtoolError, match="cannot write: .*; free space or choose another --out"):
        writer.add("row", dense(TENSORS["row"]))
    with pytest.raises(QtoolError, match="cannot write: .*; free space or choose another --out"):
        writer.close(Graph([], {}, [], [], []))
