"""The ONNX container: a graph in model.onnx, its tensors' bytes in model.onnx.data; written in pieces, read one by one.

A graph is plain data here: nodes, constants, inputs and outputs. Tensors are written into the data file as they come, each at a
multiple of 64 bytes; the graph, which names their places, at the end. So models of every size go through memory a block at a
time, and the graph stays small, as Protocol Buffers (2 GiB at most) ask for. Constants stand inside the graph.
A tensor's name tells whose it is: NAME.weight and NAME.bias as transformers calls them, NAME.qweight, NAME.scales and
NAME.zero_points of quantized linears, whose node tells the layout (see formats/onnx_layouts.py).
Source: the ONNX specification 1.23, https://onnx.ai/onnx, docs/IR.md and docs/ExternalData.md.
Why onnx is imported inside functions: it is asked for by those alone who write or read such files.
"""

import functools
import importlib
import math
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.errors import QtoolError
from qtool.formats.onnx_layouts import CODES, SCALES, ZEROS, Form, Part

ONNX, DATA = "model.onnx", "model.onnx.data"  # how the files are named in a folder
ALIGNMENT = 64
OPSET, OPSET_OF_INT2 = 21, 25  # of blocked DequantizeLinear; of INT2
MICROSOFT = "com.microsoft"
KINDS = {
    torch.float32: "FLOAT", torch.float16: "FLOAT16", torch.bfloat16: "BFLOAT16",
    torch.int64: "INT64", torch.int32: "INT32", torch.int8: "INT8", torch.uint8: "UINT8",
}  # fmt: skip
DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
NARROW = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2}  # types that torch does not have: their bits
PARTS = (CODES, SCALES, ZEROS)

Attribute = int | float | list[int]
Side = int | str  # of a tensor; a name stands for any number


@dataclass(frozen=True)
class Node:
    """One operation; it bears the name of its output."""

    op: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Attribute] = field(default_factory=dict)
    domain: str = ""


@dataclass(frozen=True)
class Port:
    """An input or an output of the graph."""

    name: str
    kind: str
    shape: tuple[Side, ...]


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they are computed; `tensors`: names of those whose bytes the data file is to hold."""

    nodes: list[Node]
    constants: dict[str, Tensor]
    inputs: list[Port]
    outputs: list[Port]
    tensors: list[str]


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes stand in the data file, and what they are."""

    kind: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """The tensors' places, and how quantized linears are held."""

    places: dict[str, Place]
    forms: dict[str, Form]


def require_onnx() -> ModuleType:
    """The package onnx; raises QtoolError where it is not installed."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise QtoolError(f"ONNX files need the package onnx ({error}); pip install qtool[onnx]") from error


# ---- writing ----


class OnnxWriter:
    """Tensors first, in any order, then `close` with the graph that uses them. Raises QtoolError where the disk refuses."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, Place] = {}
        self._size = 0

    def add(self, name: str, part: Part) -> None:
        """Append a tensor's bytes."""
        assert name not in self._places, f"{name} is written twice"
        gap = -self._size % ALIGNMENT
        try:
            with (self._folder / DATA).open("ab") as file:
                file.write(bytes(gap))
                file.write(part.data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._refusal(error) from error
        self._places[name] = Place(part.kind, part.shape, self._size + gap, part.data.nbytes)
        self._size += gap + part.data.nbytes

    def close(self, graph: Graph) -> None:
        """Write the graph."""
        assert set(graph.tensors) == set(self._places), f"{set(graph.tensors) ^ set(self._places)}: in the graph or the data"
        data = model_proto(graph, self._places).SerializeToString()
        try:
            (self._folder / ONNX).write_bytes(data)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> QtoolError:
        return QtoolError(f"{self._folder}: cannot write: {error}; free space or choose another --out")


def dense(tensor: Tensor) -> Part:
    """A tensor as it is."""
    return Part(KINDS[tensor.dtype], tuple(tensor.shape), tensor)


def bytes_of(kind: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return -(-math.prod(shape) * (NARROW.get(kind) or 8 * DTYPES[kind].itemsize) // 8)


def files_size(graph: Graph, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of both files at most, by the type and shape of each tensor."""
    sizes = {name: bytes_of(*tensors[name]) for name in graph.tensors}
    whole = sum(size + -size % ALIGNMENT for size in sizes.values())
    places = {name: Place(*tensors[name], start=whole, n_bytes=size) for name, size in sizes.items()}
    return whole + int(model_proto(graph, places).ByteSize())


def model_proto(graph: Graph, places: dict[str, Place]) -> Any:
    """The graph as onnx's ModelProto."""
    onnx = require_onnx()
    helper, kinds = onnx.helper, onnx.TensorProto
    nodes = [
        helper.make_node(node.op, node.inputs, [node.output], name=node.output, domain=node.domain, **node.attributes)
        for node in graph.nodes
    ]
    initializers = []
    for name, tensor in graph.constants.items():
        kind = kinds.DataType.Value(KINDS[tensor.dtype])
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        initializers.append(kinds(name=name, data_type=kind, dims=tensor.shape, raw_data=raw))
    for name in graph.tensors:
        place = places[name]
        tensor = kinds(name=name, data_type=kinds.DataType.Value(place.kind), dims=place.shape)
        tensor.data_location = kinds.EXTERNAL
        for key, value in (("location", DATA), ("offset", str(place.start)), ("length", str(place.n_bytes))):
            tensor.external_data.add(key=key, value=value)
        initializers.append(tensor)
    ports = [
        [helper.make_tensor_value_info(port.name, kinds.DataType.Value(port.kind), port.shape) for port in side]
        for side in (graph.inputs, graph.outputs)
    ]
    has_int2 = any(place.kind in ("INT2", "UINT2") for place in places.values())
    opsets = [helper.make_opsetid("", OPSET_OF_INT2 if has_int2 else OPSET), helper.make_opsetid(MICROSOFT, 1)]
    whole = helper.make_graph(nodes, "model", *ports, initializers)
    version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    return helper.make_model(
        whole, opset_imports=opsets, ir_version=version, producer_name="qtool", producer_version=__version__
    )


# ---- reading ----


class OnnxFile:
    """The dense tensors of an ONNX folder; opened as safetensors files are, by the path of the data file."""

    def __init__(self, path: Path) -> None:
        self._folder = path.parent
        self._places = read_header(path.parent).places

    def __enter__(self) -> "OnnxFile":
        return self

    def __exit__(self, *error: object) -> None: ...

    def keys(self) -> list[str]:
        return [name for name in self._places if not name.endswith(tuple(f".{part}" for part in PARTS))]

    def get_tensor(self, key: str) -> Tensor:
        place = self._places[key]
        return read_part(self._folder, key).data.view(DTYPES[place.kind]).view(place.shape)


def read_linear_parts(folder: Path, name: str) -> dict[str, Part]:
    """The parts of a quantized linear; raises QtoolError where the data file ends before they do."""
    places = read_header(folder).places
    return {part: read_part(folder, f"{name}.{part}") for part in PARTS if f"{name}.{part}" in places}


def read_part(folder: Path, name: str) -> Part:
    """One tensor as bytes; raises QtoolError where the data file ends before it does."""
    place = read_header(folder).places[name]
    try:
        with (folder / DATA).open("rb") as file:
            file.seek(place.start)
            data = bytearray(file.read(place.n_bytes))
    except OSError as error:
        raise QtoolError(f"model: {folder / DATA} cannot be read ({error}); export it again") from error
    if len(data) != place.n_bytes:
        raise QtoolError(
            f"model: {folder / DATA} is truncated: {name} has {len(data)} of {place.n_bytes} bytes; export it again"
        )
    return Part(place.kind, place.shape, torch.frombuffer(data, dtype=torch.uint8))


def read_header(folder: Path) -> Header:
    """What model.onnx says of its tensors; raises QtoolError where it is no such file. Kept for a file that has not changed."""
    path = folder / ONNX
    require_onnx()
    try:
        stat = path.stat()
        return _read_header(path, stat.st_mtime_ns, stat.st_size)
    except QtoolError:
        raise
    except Exception as error:  # protobuf has kinds of its own for what it cannot parse
        raise QtoolError(f"model: {path} is truncated or no ONNX file ({error}); export it again") from error


@functools.lru_cache(maxsize=4)
def _read_header(path: Path, changed: int, size: int) -> Header:
    onnx = require_onnx()
    kinds = onnx.TensorProto
    graph = onnx.load(path, load_external_data=False).graph
    places = {}
    for tensor in graph.initializer:
        if tensor.data_location != kinds.EXTERNAL:
            continue
        facts = {entry.key: entry.value for entry in tensor.external_data}
        if facts["location"] != DATA:
            raise QtoolError(f"model: {path}: {tensor.name} lies in {facts['location']}, must be in {DATA}; export it again")
        kind = kinds.DataType.Name(tensor.data_type)
        places[tensor.name] = Place(kind, tuple(tensor.dims), int(facts.get("offset", 0)), int(facts["length"]))
        _check_length(path, tensor.name, places[tensor.name])
    forms = {}
    for node in graph.node:
        name, dot, part = (node.input[1 if node.op_type == "MatMulNBits" else 0] if node.input else "").rpartition(f".{CODES}")
        if dot and not part and node.op_type in ("MatMulNBits", "DequantizeLinear"):
            attributes = {entry.name: entry.i for entry in node.attribute}
            forms[name] = _form_of(node.op_type, attributes, len(node.input), places[f"{name}.{CODES}"])
    return Header(places, forms)


def _check_length(path: Path, name: str, place: Place) -> None:
    """Raise QtoolError where a tensor's bytes are not as many as its type and shape say."""
    if place.kind not in (*NARROW, *DTYPES):
        raise QtoolError(f"model: {path}: {name} is of ONNX's type {place.kind}, which cannot be read; export it again")
    n_bytes = bytes_of(place.kind, place.shape)
    if n_bytes != place.n_bytes:
        raise QtoolError(
            f"model: {path}: {name} has {place.n_bytes} bytes, {place.kind} {list(place.shape)} has {n_bytes}; export it again"
        )


def _form_of(op: str, attributes: dict[str, int], n_inputs: int, codes: Place) -> Form:
    """The form of a linear's weights by the node that decodes them."""
    if op == "MatMulNBits":
        shape = (attributes["N"], attributes["K"])
        return Form("matmul_nbits", attributes["bits"], attributes["block_size"], n_inputs < 4, shape)
    bits = int(codes.kind[-1])
    return Form("qdq", bits, attributes.get("block_size"), n_inputs < 3, (codes.shape[1], codes.shape[0]))
