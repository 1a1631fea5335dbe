"""Linears that share one sparsity: by one threshold against sorting all weights, by ERK against its formula."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from qtool.formats.sparsity import SharedSparsity, count
from qtool.linalg.layerwise_density import erk_densities
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.pipeline.shares import shares_of
from qtool.progress import Silent
from qtool.recipe import load

Weights = dict[str, torch.Tensor]
Pruned = Callable[..., tuple[Weights, Weights]]


@pytest.fixture
def pruned(tiny_model: Callable[..., Path], tmp_path: Path) -> Pruned:
    """The linears' weights before and after a step, by name, in the model's order."""

    def run(key: str, **options: object) -> tuple[Weights, Weights]:
        model = tiny_model("llama", tie_word_embeddings=False)
        text = {"source": "demo:calibration", "samples": 2, "length": 32}
        steps = [{"calibrate/text": text}, {key: options}, {"export/safetensors": None}]
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump({"model": str(model), "pipeline": steps}))
        run_recipe(load(recipe), tmp_path / "out", Silent())
        names = ModelHandle(ModelOptions(path=str(model))).linear_names()
        folders = (model, tmp_path / "out" / "exports" / "safetensors")
        before, after = (load_file(folder / "model.safetensors") for folder in folders)
        return {name: before[f"{name}.weight"] for name in names}, {name: after[f"{name}.weight"] for name in names}

    return run


@pytest.mark.parametrize("ignore", [[], ["lm_head"]])
def test_one_threshold_for_all_is_that_of_all_weights_sorted(ignore: list[str], pruned: Pruned) -> None:
    before, after = pruned("prune/magnitude", sparsity=0.6, compare="linear", densities="magnitude", ignore=ignore)
    chosen = [name for name in before if name not in ignore]
    size = torch.cat([before[name].abs().flatten() for name in chosen])
    threshold = size.sort().values[count(0.6, len(size))]
    for name, W in before.items():
        expected = W.where(W.abs() >= threshold, 0) if name in chosen else W
        assert torch.equal(after[name], expected), name
    kept = [float((after[name] != 0).float().mean()) for name in chosen]
    assert max(kept) - min(kept) > 0.01  # the threshold says how much each loses


@pytest.mark.parametrize("key", ["prune/magnitude", "prune/wanda", "prune/sparsegpt"])
def test_densities_are_erks_in_one_shot(key: str, pruned: Pruned) -> None:
    before, after = pruned(key, sparsity=0.4, densities="erk", ignore=["lm_head"])
    shapes = {name: tuple(W.shape) for name, W in before.items() if name != "lm_head"}
    expected = erk_densities(shapes, 0.6)
    assert len(set(expected.values())) > 2
    for name, density in expected.items():
        out, columns = shapes[name]
        by_rows = out * count(1 - density, columns)
        n_zeros = count(1 - density, out * columns) if key == "prune/sparsegpt" else by_rows
        assert int((after[name] == 0).sum()) == n_zeros, name


def test_equal_weights_go_from_earlier_linears_first(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.ones_like(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors")
    model = ModelHandle(ModelOptions(path=str(folder)))
    sizes = {name: torch.Size(model.linear_shape(name)).numel() for name in model.linear_names() if name != "lm_head"}
    left = count(0.3, sum(sizes.values()))
    found = shares_of(model, SharedSparsity(sparsity=0.3, densities="magnitude", ignore=("lm_head",)))
    for name, size in sizes.items():
        assert found[name] == min(left, size) / size
        left -= min(left, size)
    assert left == 0


def test_nothing_and_nearly_all_may_go(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    assert set(shares_of(model, SharedSparsity(sparsity=0.0, densities="magnitude", ignore=("lm_head",))).values()) == {0.0}
    assert shares_of(model, SharedSparsity()) == {}
    with pytest.raises(ValidationError, match="pattern 2:4 is the same in every linear"):
        SharedSparsity(pattern="2:4", densities="erk")
