"""Sub-models against ordinary small models whose weights are sliced by hand, from their gradients to their checkpoints."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from qtool import registry
from qtool.errors import QtoolError
from qtool.laws.course import in_training
from qtool.laws.model import sample_tokens, tiny_checkpoint
from qtool.methods.distill.sortednet import SortednetOptions, check, drawn_at, logits_of
from qtool.model.handle import ModelHandle
from qtool.model.submodels import cutter_of
from qtool.options import ModelOptions, Sizes
from qtool.pipeline.run import export_run, run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

HEADS = torch.tensor([*range(16), *range(32, 48)])  # the first of the two heads of each group
SLICES = {  # of one block with two heads, 48 neurons and 32 hidden channels: which rows, which columns
    "q_proj": (HEADS, slice(32)), "k_proj": (slice(None), slice(32)), "v_proj": (slice(None), slice(32)),
    "o_proj": (slice(32), HEADS), "gate_proj": (slice(48), slice(32)), "up_proj": (slice(48), slice(32)),
    "down_proj": (slice(32), slice(48)), "embed_tokens": (slice(None), slice(32)), "lm_head": (slice(None), slice(32)),
}  # fmt: skip


def sliced(name: str, tensor: torch.Tensor) -> torch.Tensor:
    rows, columns = SLICES.get(name.split(".")[-2], (slice(32), None))
    return tensor[rows] if columns is None else tensor[rows][:, columns]


@pytest.mark.parametrize("tied", [False, True])
def test_a_sub_model_and_its_gradients_are_those_of_a_model_sliced_by_hand(tied: bool, tiny_model: Callable[..., Path]) -> None:
    handle = ModelHandle(ModelOptions(path=str(tiny_model("llama", tie_word_embeddings=tied))))
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48, "hidden_size": 32, "head_dim": 16}
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**{**handle.config.to_dict(), **sizes})).float()
    rows = torch.randint(2, 4096, (2, 12), generator=torch.Generator().manual_seed(0))
    with handle.materialized() as student:
        whole = dict(student.named_parameters())
        with torch.no_grad():
            for name, p in plain.named_parameters():
                p.copy_(sliced(name, whole[name]))
        for p in whole.values():
            p.requires_grad_(True)
        cutter = cutter_of(handle, Sizes(blocks=1, heads=2, neurons=48, hidden=32))
        logits, expected = logits_of(cutter, student, rows), plain(rows).logits
        # Sums of float32 in another order.
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        for found in (logits, expected):
            F.cross_entropy(found.flatten(0, 1), rows.flatten()).backward()
        inside = dict(plain.named_parameters())
        for name, p in whole.items():
            if name in inside:
                torch.testing.assert_close(sliced(name, p.grad), inside[name].grad, rtol=1e-3, atol=1e-6)
                assert int((p.grad != 0).sum()) <= inside[name].numel(), name  # and nothing reaches the rest
            else:
                assert p.grad is None, name


def test_gradients_of_the_models_drawn_are_averaged() -> None:
    draws = {"draws": 3, "full": 0.5, "submodels": {"a": {"blocks": 1}, "b": {"neurons": 32}}}
    method = registry.load("distill/sortednet")
    options = SortednetOptions(**draws)
    step = next(step for step in range(50) if set(drawn_at(step, 0, 2, options)) == {None, 0, 1})
    with tiny_checkpoint() as folder, in_training(method, folder, **draws) as trial:
        handle = ModelHandle(ModelOptions(path=str(folder)))
        rows = sample_tokens()[:1]

        def backward() -> float:
            loss = trial.course.logits(trial.student, rows).square().mean()
            loss.backward()
            return float(loss.detach())

        total, parameters = trial.course.gradients(step, backward), list(trial.student.parameters())
        found = [p.grad.clone() for p in parameters]
        trial.student.zero_grad()
        losses = [trial.student(rows, use_cache=False).logits.square().mean()]
        cutters = [cutter_of(handle, sizes) for sizes in options.submodels.values()]
        losses += [logits_of(cutter, trial.student, rows).square().mean() for cutter in cutters]
        (sum(losses) / 3).backward()
        assert total == pytest.approx(float(sum(losses).detach()) / 3, rel=1e-5)
        for p, grad in zip(parameters, found, strict=True):
            torch.testing.assert_close(grad, p.grad, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(trial.logits(), trial.student(sample_tokens(), use_cache=False).logits)


def test_the_whole_model_is_drawn_as_often_as_asked_and_the_others_alike() -> None:
    submodels = {name: {"blocks": 1} for name in "abc"}
    options = SortednetOptions(submodels=submodels, full=0.4, draws=10)
    drawn = [number for step in range(300) for number in drawn_at(step, 0, 3, options)]
    assert drawn.count(None) / 3000 == pytest.approx(0.4, abs=0.03)  # three standard errors
    assert all(drawn.count(number) / 3000 == pytest.approx(0.2, abs=0.022) for number in range(3))
    assert drawn_at(7, 0, 3, options) == drawn_at(7, 0, 3, options) != drawn_at(8, 0, 3, options)
    assert set(drawn_at(0, 0, 3, options.model_copy(update={"full": 1.0}))) == {None}


def test_a_run_holds_sub_models_that_transformers_loads(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}},
        {"distill/sortednet": {"submodels": {"small": {"blocks": 1, "neurons": 48}}, "steps": 2, "batch": 2, "lr": 1e-2}},
        {"export/safetensors": {}},
        {"quantize/rtn": {"scheme": "w4a16g16"}},
    ]
    recipe = parse(json.dumps({"model": str(tiny_model("llama")), "pipeline": steps}), "test")
    run_recipe(recipe, tmp_path / "run", Silent())
    artifact = export_run(tmp_path / "run", "safetensors", None, Silent(), "small")
    assert artifact.path == tmp_path / "run" / "exports" / "safetensors-small" and artifact.lossless
    small = AutoModelForCausalLM.from_pretrained(artifact.path)
    assert (small.config.num_hidden_layers, small.config.intermediate_size) == (1, 48)
    whole = load_file(tmp_path / "run" / "exports" / "safetensors" / "model.safetensors")
    for name, p in small.named_parameters():  # of the model as the step left it, before it was quantized
        place = tuple(slice(n) for n in p.shape)
        assert torch.equal(p, whole[name][place]), name
    card = (artifact.path / "README.md").read_text()
    assert "holds the sub-model small" in card and "Measured" not in card  # by the run, that is
    assert sorted(path.name for path in artifact.path.parent.iterdir()) == ["safetensors", "safetensors-small"]
    with pytest.raises(QtoolError, match='distill/sortednet has none named "smal".*small'):
        export_run(tmp_path / "run", "safetensors", None, Silent(), "smal")


def test_a_sub_model_that_cannot_be_is_refused_before_any_work(tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    for sizes, message in (({"blocks": 3}, "big: 3 blocks are to stay of 2"), ({"blocks": 2}, "big: nothing is to go")):
        with pytest.raises(QtoolError, match=message):
            check(model, SortednetOptions(submodels={"big": sizes}))
    with pytest.raises(QtoolError, match="leave recompute away"):
        check(model, SortednetOptions(submodels={"small": {"blocks": 1}}, recompute=True))
    for submodels, message in (({}, "submodels"), ({"a/b": {"blocks": 1}}, "is no name"), ({"a": {}}, "states no size")):
        with pytest.raises(ValidationError, match=message):
            SortednetOptions(submodels=submodels)
