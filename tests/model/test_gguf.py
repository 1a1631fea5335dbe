"""The GGUF container: the package gguf reads what is written, and broken files are refused."""

import struct
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader

from qtool.errors import QtoolError
from qtool.formats.ggml import TYPES
from qtool.formats.ggml_rounding import round_to
from qtool.model.gguf import Value, file_size, read_header, read_tensor, write_gguf

METADATA: dict[str, Value] = {
    "general.architecture": "llama",
    "a.number": 7,
    "a.negative": -7,
    "a.float": 0.5,
    "a.bool": True,
    "a.texts": ["", "Ġa", "日本"],
    "a.numbers": [1, -1],
    "a.floats": [0.25, -1.0],
}
TENSORS = {"vector": ((5,), TYPES["f32"]), "matrix": ((3, 64), TYPES["q4_0"]), "half": ((2, 3), TYPES["f16"])}


def write(path: Path) -> dict[str, torch.Tensor]:
    """A small file; what its tensors decode to, but for rounding."""
    random = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=random) for name, (shape, _) in TENSORS.items()}
    with write_gguf(path, METADATA, TENSORS) as put:
        for name in reversed(found):  # in another order than the header's
            put(name, round_to(found[name].view(-1, found[name].shape[-1]), TENSORS[name][1]))
    return found


def test_the_package_reads_metadata_and_tensors(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf")
    reader = GGUFReader(tmp_path / "model.gguf")
    for key, value in METADATA.items():
        assert reader.fields[key].contents() == value, key
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        shape, kind = TENSORS[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == shape and tensor.tensor_type == kind.number
        own = round_to(expected[tensor.name].view(-1, shape[-1]), kind)
        assert tensor.data.tobytes() == own.numpy().tobytes()
        assert tensor.data_offset % 32 == 0


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    expected = write(tmp_path / "model.gguf")
    header = read_header(tmp_path / "model.gguf")
    assert header.metadata == {key: value for key, value in METADATA.items() if not isinstance(value, list)}
    assert torch.equal(read_tensor(tmp_path / "model.gguf", "vector"), expected["vector"])
    assert torch.equal(read_tensor(tmp_path / "model.gguf", "half"), expected["half"].half().float())
    assert read_tensor(tmp_path / "model.gguf", "matrix").shape == (3, 64)


def test_the_size_follows_from_shapes_and_types(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").stat().st_size == file_size(METADATA, TENSORS)


def test_a_file_that_is_written_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path)
    assert "a.more" not in read_header(path).metadata
    with write_gguf(path, METADATA | {"a.more": 1}, {}):
        pass
    assert read_header(path).metadata["a.more"] == 1


def test_a_tensor_that_is_missing_or_of_another_size_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="not written: half, matrix, vector"), write_gguf(tmp_path / "a", {}, TENSORS):
        pass
    with pytest.raises(AssertionError, match="4 bytes, not 20"), write_gguf(tmp_path / "b", {}, TENSORS) as put:
        put("vector", torch.zeros(4, dtype=torch.uint8))


@pytest.mark.parametrize("kept", [0, 3, 10, 60, 200])
def test_a_header_that_is_cut_off_is_refused(kept: int, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(QtoolError, match="no GGUF file"):
        read_header(path)


@pytest.mark.parametrize(
    "metadata",
    [struct.pack("<Q", 2**63), struct.pack("<Q1sI", 1, b"k", 99), struct.pack("<Q1s", 1, b"\xff")],
)
def test_a_header_that_says_nonsense_is_refused(metadata: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + metadata)
    with pytest.raises(QtoolError, match="is truncated or no GGUF file"):
        read_header(path)


def test_data_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write(path)
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(QtoolError, match="is truncated: half has 0 of 12 bytes"):
        read_tensor(path, "half")


def test_other_versions_and_types_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(QtoolError, match="GGUF version 1 cannot be read"):
        read_header(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q1sIQIQ", 1, b"x", 1, 256, 19, 0))
    with pytest.raises(QtoolError, match="x is of ggml's type 19, which cannot be read; f32,"):
        read_header(path)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="cannot write: .*; free space or choose another --out"):
        write_gguf(tmp_path / "nowhere" / "model.gguf", {}, {}).__enter__()
