"""What a model from elsewhere may not do: run code, or reach files outside its folder; and which revision was taken is told."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from qtool.artifact import MANIFEST
from qtool.cli.verify import verify
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

TinyModel = Callable[..., Path]
TOKENS = torch.arange(2, 34).unsqueeze(0)  # [samples, length]


class WritesAFile:
    """Unpickled by Python's own rules, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.write_text, (self.path, "run"))


def pickled(folder: Path) -> Path:
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_pickle_is_read_where_it_is_allowed(tiny_model: TinyModel) -> None:
    expected = ModelHandle(ModelOptions(path=str(tiny_model("llama")))).final_hidden(TOKENS)
    folder = pickled(tiny_model("llama"))
    with pytest.raises(QtoolError, match="pytorch_model.bin, a pickle that could run code; .* --allow-pickle"):
        ModelHandle(ModelOptions(path=str(folder)))
    allowed = ModelHandle(ModelOptions(path=str(folder), allow_pickle=True))
    assert torch.equal(allowed.final_hidden(TOKENS), expected)


def test_a_pickle_in_several_files_is_read_too(tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    expected = ModelHandle(ModelOptions(path=str(folder))).final_hidden(TOKENS)
    tensors, weight_map = load_file(folder / "model.safetensors"), {}
    for number, names in enumerate((list(tensors)[::2], list(tensors)[1::2])):
        torch.save({name: tensors[name] for name in names}, folder / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(names, f"pytorch_model-{number}.bin")
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert torch.equal(ModelHandle(ModelOptions(path=str(folder), allow_pickle=True)).final_hidden(TOKENS), expected)


def test_code_in_a_pickle_does_not_run_even_where_pickles_are_allowed(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = pickled(tiny_model("llama"))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": WritesAFile(tmp_path / "proof")}))
    with pytest.raises(QtoolError, match="is no plain state dict"):
        ModelHandle(ModelOptions(path=str(folder), allow_pickle=True)).final_hidden(TOKENS)
    assert not (tmp_path / "proof").exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert (tmp_path / "proof").exists()  # so it was no blank


def test_code_that_comes_with_a_model_runs_only_where_the_recipe_says_so(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder, proof = tiny_model("llama"), tmp_path / "proof"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\n\nPath({str(proof)!r}).write_text('run')\n\n\n{code}"
    )
    with pytest.raises(QtoolError, match="trust_remote_code"):
        ModelHandle(ModelOptions(path=str(folder)))
    assert not proof.exists()
    with pytest.raises(QtoolError):  # its config runs now; a model class it does not bring
        ModelHandle(ModelOptions(path=str(folder), trust_remote_code=True))
    assert proof.exists()


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/../../x.safetensors"])
def test_an_index_that_names_a_file_outside_the_folder_is_refused(name: str, tiny_model: TinyModel) -> None:
    folder = tiny_model("llama")
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(QtoolError, match="lies outside the folder"):
        ModelHandle(ModelOptions(path=str(folder)))


def test_a_manifest_that_names_a_file_outside_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "export" / MANIFEST).write_text(f"{'0' * 64}  ../secret\n")
    with pytest.raises(QtoolError, match=r"line 1 names \.\./secret, outside the folder"):
        verify(tmp_path / "export")


def test_the_revision_of_a_model_from_the_hub_is_told(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub client's own cache, offline: a branch is resolved to the commit that it pointed to."""
    commit, cache = "0123456789abcdef0123456789abcdef01234567", tmp_path / "hub" / "models--someone--tiny"
    (cache / "snapshots").mkdir(parents=True)
    tiny_model("llama").rename(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    steps = "  - quantize/rtn: {scheme: w8a16}\n  - export/safetensors: {}\n"
    recipe = parse(f"model: {{path: someone/tiny, revision: main}}\npipeline:\n{steps}", "recipe")
    results = run_recipe(recipe, tmp_path / "run", Silent())
    assert results["model"]["revision"] == commit
    card = (tmp_path / "run/exports/safetensors/README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model_revision"] == commit
