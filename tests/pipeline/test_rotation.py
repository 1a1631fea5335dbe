"""A rotated model computes the same, exports hold it, a killed run goes on, and quantizers meet what is rotated."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.layers.rotated_input import rotate_rows, signs_of
from qtool.model.handle import ModelHandle
from qtool.model.rotation import Places, Rotations
from qtool.model.walk import Walk
from qtool.options import ModelOptions, Options
from qtool.pipeline.checks import check_recipe
from qtool.pipeline.plan import make_plan
from qtool.pipeline.rotation import run_rotation
from qtool.pipeline.run import run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import Recipe, load
from qtool.registry import Method

TinyModel = Callable[..., Path]
LogitsOf = Callable[[ModelHandle], Tensor]
TEXT = {"calibrate/text": {"source": "demo:calibration", "samples": 2, "length": 16}}


def recipe(model: Path, tmp_path: Path, *steps: dict[str, object]) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(model), "pipeline": list(steps)}))
    return load(path)


def rotated(model: Path, tmp_path: Path, out: str = "run", progress: Progress | None = None, **options: object) -> ModelHandle:
    """The model after transform/hadamard alone."""
    run_recipe(recipe(model, tmp_path, {"transform/hadamard": options}), tmp_path / out, progress or Silent())
    return ModelHandle(ModelOptions(path=str(model)), (tmp_path / out / "state" / "00-transform-hadamard",))


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_the_logits_of_every_family_stay(family: str, tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf) -> None:
    folder = tiny_model(family)
    model = rotated(folder, tmp_path, residual=family != "gemma3", online=True)
    expected = logits_of(ModelHandle(ModelOptions(path=str(folder))))
    assert relative(logits_of(model), expected) < 1e-5  # float32 through two blocks
    with model.outer():
        head = model.model.get_submodule(model.linear_names()[-1]).get_parameter("weight")
        assert (head is model.model.get_input_embeddings().weight) == (family == "gemma3")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sizes_without_a_hadamard_matrix_are_noted_and_work(
    family: str, tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf
) -> None:
    sizes: dict[str, object] = {"n_embd": 92, "n_inner": 184} if family == "gpt2" else {"hidden_size": 92, "head_dim": 16}
    folder = tiny_model(family, **sizes)
    model = rotated(folder, tmp_path, heads=family == "llama", online=True)
    assert relative(logits_of(model), logits_of(ModelHandle(ModelOptions(path=str(folder))))) < 1e-5
    notes = "\n".join(json.loads((tmp_path / "run" / "results.json").read_text())["fallbacks"])
    if family == "llama":
        assert "residual stream: no Hadamard matrix of order 92 is known; a random orthogonal one takes its place" in notes
    else:
        assert "mlp.c_proj: no Hadamard matrix of order 184 is known; its input is rotated in blocks of 8" in notes


def test_a_model_that_forbids_it_is_refused_before_anything_is_written(tiny_model: TinyModel, tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match=r"recipe.yaml:.*hadamard: .*post_attention_layernorm .*; set residual: false"):
        rotated(tiny_model("gemma3"), tmp_path)
    assert not list((tmp_path / "run" / "state").rglob("*.safetensors"))
    with pytest.raises(QtoolError, match="transform/hadamard: nothing is left to rotate"):
        rotated(tiny_model("llama"), tmp_path, "none", residual=False, heads=False)


def test_a_parted_head_stays_one_where_the_model_is_tied_once_more(tiny_model: TinyModel, tmp_path: Path) -> None:
    """As lm-eval does with every model that it is given."""
    made = recipe(tiny_model("llama", tie_word_embeddings=True), tmp_path, {"transform/hadamard": None})
    run_recipe(made, tmp_path / "run", Silent())
    changes = tuple(path.parent for path in (tmp_path / "run" / "state").rglob("block_000.safetensors"))
    model, tokens = ModelHandle(made.model, changes), torch.arange(12).view(1, 12)
    with model.materialized() as whole, torch.no_grad():
        before = whole(tokens).logits
        whole.tie_weights()
        assert torch.equal(whole(tokens).logits, before)
    assert model.config.tie_word_embeddings


def test_exports_of_a_tied_model_hold_a_head_of_its_own(tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf) -> None:
    folder = tiny_model("llama", tie_word_embeddings=True)
    expected = logits_of(original := ModelHandle(ModelOptions(path=str(folder))))
    assert original.is_tied
    steps = [{"transform/hadamard": None}, {"quantize/rtn": {"scheme": "w8a16g32", "ignore": []}}]
    exports = [{"export/safetensors": None}, {"export/compressed_tensors": None}, {"export/qtool": None}]
    with pytest.raises(QtoolError, match="lm_head is tied to the embedding"):
        check_recipe(recipe(folder, tmp_path, steps[1]))
    with pytest.raises(QtoolError, match="lm_head is tied to the embedding"):
        check_recipe(recipe(folder, tmp_path, {"transform/hadamard": {"residual": False}}, steps[1]))
    made = recipe(folder, tmp_path, *steps, *exports)
    told = {export.key.split("/")[1]: export.bytes for export in make_plan(made).exports}
    results = run_recipe(made, tmp_path / "run", Silent())
    for row in results["exports"]:
        assert row["bytes"] <= told[row["format"]] <= 1.02 * row["bytes"] + 8192, row["format"]  # room for card and manifest
    for name in ("safetensors", "compressed_tensors", "qtool"):
        read = ModelHandle(ModelOptions(path=str(tmp_path / "run" / "exports" / name)))
        assert not read.is_tied and ("lm_head" in read.schemes()) == (name != "safetensors")
        assert relative(logits_of(read), expected) < 0.02, name  # eight bits
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "exports" / "safetensors")
    assert not torch.equal(plain.lm_head.weight, plain.model.embed_tokens.weight)
    assert results["model"]["bytes_compressed"] > 4096 * 64 * (4 + 1)  # the embedding, and the head in eight bits


def test_a_run_that_was_stopped_ends_with_the_same_bits(
    tiny_model: TinyModel, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    folder = tiny_model("llama", dtype="bfloat16", tie_word_embeddings=True)
    rotated(folder, tmp_path, "whole", online=True)
    for after in (1, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            rotated(folder, tmp_path, "stopped", interrupted(after), online=True)
    rotated(folder, tmp_path, "stopped", online=True)
    files = sorted((tmp_path / "whole" / "state").rglob("*.safetensors"))
    assert [path.stem for path in files] == ["block_000", "block_001", "outer"]
    for path in files:
        other = tmp_path / "stopped" / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == other.read_bytes(), path.name


def test_a_run_stopped_while_it_applies_does_not_learn_anew(
    tiny_model: TinyModel, tmp_path: Path, interrupted: Callable[[int], Progress], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn: dict[str, object] = {"transform/spinquant": {"scheme": "w4a4", "steps": 2, "batch": 2, "online": True}}
    made = recipe(tiny_model("llama", dtype="bfloat16"), tmp_path, TEXT, learn)
    run_recipe(made, tmp_path / "whole", Silent())
    with pytest.raises(KeyboardInterrupt):  # the text, two updates, and the first block
        run_recipe(made, tmp_path / "stopped", interrupted(4))
    assert (tmp_path / "stopped" / "state" / "01-transform-spinquant" / "block_000.safetensors").is_file()
    monkeypatch.setattr("qtool.pipeline.rotation.RotatedNetwork", None)
    run_recipe(made, tmp_path / "stopped", Silent())
    files = sorted((tmp_path / "whole" / "state").rglob("*.safetensors"))
    assert [path.stem for path in files] == ["block_000", "block_001", "outer"]
    for path in files:
        assert path.read_bytes() == (tmp_path / "stopped" / path.relative_to(tmp_path / "whole")).read_bytes(), path.name


def test_exports_hold_rotations_of_inputs_or_refuse_them(tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf) -> None:
    folder = tiny_model("mixtral")
    steps: list[dict[str, object]] = [
        {"transform/hadamard": {"online": True}},
        {"quantize/rtn": {"scheme": "w8a16g32", "ignore": ["lm_head", "*experts.down.1", "*layers.1.self_attn.o_proj"]}},
    ]
    with pytest.raises(QtoolError, match="export/gguf cannot hold the rotations of inputs of transform/hadamard"):
        recipe(folder, tmp_path, *steps, {"export/gguf": None})
    made = recipe(folder, tmp_path, *steps, {"export/qtool": None}, {"export/safetensors": None})
    told = make_plan(made).exports[0].bytes
    written = run_recipe(made, tmp_path / "run", Silent())["exports"][0]["bytes"]
    assert written <= told <= 1.1 * written  # headers weigh much where matrices are tiny
    state = tmp_path / "run" / "state"
    changes = (state / "00-transform-hadamard", state / "01-quantize-rtn")
    model = ModelHandle(ModelOptions(path=str(folder)), changes)
    own, dense = (ModelHandle(ModelOptions(path=str(tmp_path / "run" / "exports" / n))) for n in ("qtool", "safetensors"))
    assert torch.equal(logits_of(own), logits_of(model)) and own.additions() == model.additions()
    assert "model.layers.1.self_attn.o_proj" in own.additions()  # dense, and rotated all the same
    assert dense.additions() == {} and relative(logits_of(dense), logits_of(model)) < 1e-5
    with pytest.raises(QtoolError, match="compressed_tensors cannot hold the rotation of the input of"):
        check_recipe(recipe(tmp_path / "run" / "exports" / "qtool", tmp_path, {"export/compressed_tensors": None}))
    with pytest.raises(QtoolError, match=r"transform/hadamard: model\..* is quantized already; rotate first"):
        rotated(tmp_path / "run" / "exports" / "qtool", tmp_path, "again")
    with pytest.raises(QtoolError, match="hadamard rotates dense weights, but .* quantizes before it; put it first"):
        recipe(folder, tmp_path, steps[1], steps[0])


def test_no_input_has_outliers_afterwards_and_observers_see_it(tiny_model: TinyModel, tmp_path: Path, windows: Tensor) -> None:
    folder = tiny_model("llama")
    planted = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in planted.named_parameters():
            if "layernorm" in name:
                parameter[5] = 30
            if name.endswith(("v_proj.weight", "up_proj.weight")):
                parameter[3] *= 30
    planted.save_pretrained(folder)
    before = kurtosis_of_inputs(ModelHandle(ModelOptions(path=str(folder))), windows)
    after = kurtosis_of_inputs(rotated(folder, tmp_path, online=True), windows)
    assert len(before) == 14 and min(before.values()) > 5
    for name, value in after.items():
        assert value < 4 and value < 0.5 * before[name], name  # 3 is a normal distribution's


def kurtosis_of_inputs(model: ModelHandle, tokens: Tensor) -> dict[str, float]:
    """Mean over tokens of each linear's input, across its channels."""

    class Observer:
        def update(self, x: Tensor) -> None:
            rows = x.reshape(-1, x.shape[-1])
            self.kurtosis = float((rows.pow(4).mean(1) / rows.square().mean(1).square()).mean())

    found: dict[str, float] = {}
    hidden = model.embed(tokens)
    for block in model.blocks():
        observers = {name: Observer() for name in block.linears()}
        hidden = block.forward_observed(hidden, observers)
        found |= {name: observer.kurtosis for name, observer in observers.items()}
    return found


def test_statistics_and_walks_meet_the_rotated_input(tiny_model: TinyModel, tmp_path: Path, windows: Tensor) -> None:
    folder, name = tiny_model("llama"), "model.layers.0.mlp.down_proj"
    plain = ModelHandle(ModelOptions(path=str(folder)))
    model = rotated(folder, tmp_path, residual=False, heads=False, online=True)
    hidden = plain.embed(windows)
    assert torch.equal(model.embed(windows), hidden)
    hessians = []
    for handle in (plain, model):
        stats, block = LayerStats(128, ("hessian",)), handle.block(0)
        block.observe(hidden, {name: stats})
        with Walk(block, hidden.clone(), [name]) as walk:
            ((stop, inputs),) = list(walk)
        assert stop == name
        x = torch.cat(inputs).reshape(-1, 128)
        assert torch.allclose(x.T @ x / len(x), stats.hessian(), atol=1e-5)
        hessians.append(stats.hessian())
    signs = signs_of(block.get(name))
    assert signs is not None
    R = rotate_rows(torch.eye(128), signs)  # [in, in]
    assert relative(hessians[1], R.T @ hessians[0] @ R) < 1e-5


def test_training_runs_through_the_rotation_and_keeps_it(tiny_model: TinyModel, tmp_path: Path, logits_of: LogitsOf) -> None:
    folder = tiny_model("llama")
    train = {"distill/logits": {"steps": 1, "batch": 2, "lr": 1e-9, "code_lr": 1e-9}}  # all but still
    steps: list[dict[str, object]] = [TEXT, {"transform/hadamard": {"online": True}}, {"quantize/rtn": {"scheme": "w8a16g32"}}]
    run_recipe(recipe(folder, tmp_path, *steps, train), tmp_path / "run", Silent())
    paths = [tmp_path / "run" / "state" / name for name in ("01-transform-hadamard", "02-quantize-rtn", "03-distill-logits")]
    before, after = (ModelHandle(ModelOptions(path=str(folder)), tuple(paths[:n])) for n in (2, 3))
    assert after.additions() == before.additions() and len(after.additions()) == 4
    assert relative(logits_of(after), logits_of(before)) < 1e-3
    losses = json.loads((paths[2] / "done.json").read_text())["losses"]
    assert losses[0] < 0.1  # KL at eight bits


def stretched(places: Places, options: Options, seed: int, note: Callable[[str], None]) -> Rotations:
    Q = torch.eye(places.hidden, dtype=torch.float64)
    Q[0, 0] = 2.0
    return Rotations(Q)


def test_what_is_no_rotation_is_not_applied(tiny_model: TinyModel, tmp_path: Path) -> None:
    from qtool.pipeline.folder import RunFolder, StepFolder

    method = Method(run=stretched, options=Options, scope="model", key="transform/stretched")
    folder = StepFolder(RunFolder(tmp_path / "run"), 0, method.key)
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))), (folder.path,))
    with pytest.raises(QtoolError, match=r"transform/stretched: model\.layers\.0: its output, rotated back, would change by"):
        run_rotation(model, method, Options(), None, 0, folder, Silent())
    assert not folder.unit("block_000").exists()
