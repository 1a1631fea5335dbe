"""Results kept of an original: the same to the bit, without a second pass; never one of another model or a damaged one."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.model.kept import Kept, kept_results, pack_text, unpack_text
from qtool.options import ModelOptions

TOKENS = torch.randint(2, 4096, (3, 24), generator=torch.Generator().manual_seed(0))
GIB = 2**30
KEY = {"what": "a test", "model": "m"}


def handle(folder: Path, kept: Kept) -> ModelHandle:
    model = ModelHandle(ModelOptions(path=str(folder)))
    model.kept = kept
    return model


def no_pass(model: ModelHandle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int) -> None:
        raise AssertionError("a block was loaded")

    monkeypatch.setattr(model, "block", refuse)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # gpt2's blocks return tuples where llama's return tensors
def test_a_second_run_gives_the_same_logits_without_a_pass(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kept = tiny_model(family, dtype="bfloat16"), Kept(tmp_path / "kept", GIB)
    first, second = handle(folder, kept), handle(folder, kept)
    hidden = first.final_hidden(TOKENS)
    with first.outer():
        logits = first.logits(hidden)
    no_pass(second, monkeypatch)
    assert torch.equal(second.final_hidden(TOKENS), hidden)
    with second.outer():
        assert torch.equal(second.logits(second.final_hidden(TOKENS)), logits)
    assert kept.notes == []


def test_other_weights_other_text_or_another_dtype_are_computed(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, kept = tiny_model("llama"), Kept(tmp_path / "kept", GIB)
    handle(folder, kept).final_hidden(TOKENS)
    assert len(list(kept.folder.iterdir())) == 1
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] += 1  # in the middle of the file, its size as it was
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert not torch.equal(handle(other, kept).final_hidden(TOKENS), handle(folder, kept).final_hidden(TOKENS))
    handle(folder, kept).final_hidden(TOKENS[:, :-1])
    narrow = ModelHandle(ModelOptions(path=str(folder), dtype="bfloat16"))
    narrow.kept = kept
    narrow.final_hidden(TOKENS)
    assert len(list(kept.folder.iterdir())) == 4


@pytest.mark.parametrize("damage", ["a byte", "the end", "all"])
def test_a_damaged_entry_is_noted_and_computed_again(damage: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder, kept = tiny_model("llama"), Kept(tmp_path / "kept", GIB)
    hidden = handle(folder, kept).final_hidden(TOKENS)
    (path,) = kept.folder.iterdir()
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes({"a byte": data, "the end": data[:-50], "all": b""}[damage])
    assert torch.equal(handle(folder, kept).final_hidden(TOKENS), hidden)
    (note,) = kept.notes
    assert "is damaged" in note and "computed again" in note
    assert torch.equal(handle(folder, kept).final_hidden(TOKENS), hidden) and len(kept.notes) == 1


def test_an_entry_under_another_keys_name_is_not_used(tmp_path: Path) -> None:
    kept = Kept(tmp_path, GIB)
    kept.write(KEY, pack_text("a"))
    (path,) = tmp_path.iterdir()
    other = KEY | {"model": "n"}
    kept.write(other, pack_text("b"))
    (moved,) = [one for one in tmp_path.iterdir() if one != path]
    path.replace(moved)
    assert kept.read(other) is None and "damaged" in kept.notes[0]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    import os

    kept = Kept(tmp_path, 10_000)
    for index in range(3):
        kept.write(KEY | {"inputs": str(index)}, pack_text("x" * 3000))
        for path in tmp_path.iterdir():  # writes in one tick of the clock would tie
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
    assert kept.read(KEY | {"inputs": "0"}) is not None
    kept.write(KEY | {"inputs": "3"}, pack_text("x" * 3000))
    found = [kept.read(KEY | {"inputs": str(index)}) is not None for index in range(4)]
    assert found[0] and found[3] and not found[1]
    kept.write(KEY | {"inputs": "4"}, pack_text("x" * 20_000))
    assert "more than QTOOL_CACHE_GIB" in kept.notes[0]


def test_a_disk_that_refuses_is_noted(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Kept(tmp_path / "file", GIB)
    kept.write(KEY, pack_text("a"))
    assert "is not kept for other runs" in kept.notes[0] and kept.read(KEY) is None


def test_the_environment_says_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept_results() is None  # the tests' own setting
    monkeypatch.setenv("QTOOL_CACHE", str(tmp_path))
    monkeypatch.setenv("QTOOL_CACHE_GIB", "0.5")
    kept = kept_results()
    assert kept is not None and (kept.folder, kept.limit_bytes) == (tmp_path, GIB // 2)
    monkeypatch.delenv("QTOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert (default := kept_results()) is not None and default.folder == tmp_path / "x" / "qtool"
    monkeypatch.setenv("QTOOL_CACHE_GIB", "much")
    with pytest.raises(QtoolError, match="QTOOL_CACHE_GIB is 'much'"):
        kept_results()


def test_text_comes_back() -> None:
    assert unpack_text(pack_text("naïve ✓")) == "naïve ✓"
