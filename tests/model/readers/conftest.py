"""What the tests of readers share: an export of a tiny Llama, and the model after its files were changed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from qtool.artifact import Artifact
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def exported(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle], export: Callable[..., Artifact]
) -> Callable[..., Path]:
    """`exported("gptq", "w4a16g32", checkpoint_format="gptq")`: the folder of a tiny Llama in that scheme."""

    def build(name: str, scheme: object, **options: object) -> Path:
        return export(name, quantized(tiny_model("llama"), scheme), out=name, **options).path

    return build


@pytest.fixture
def change_config() -> Callable[[Path, Change], ModelHandle]:
    """`change_config(folder, change)`: the model after `change` of config.json's quantization_config."""

    def run(folder: Path, change: Change) -> ModelHandle:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return ModelHandle(ModelOptions(path=str(folder)))

    return run


@pytest.fixture
def change_tensors() -> Callable[[Path, Change], ModelHandle]:
    """`change_tensors(folder, change)`: the model after `change` of the file's tensors by name."""

    def run(folder: Path, change: Change) -> ModelHandle:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return ModelHandle(ModelOptions(path=str(folder)))

    return run
