"""The training driver: it learns, keeps what must be kept, and resumes to the bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from qtool import registry
from qtool.errors import QtoolError
from qtool.methods.distill.logits import LogitsOptions
from qtool.model.handle import ModelHandle
from qtool.model.store import load_changes
from qtool.options import ModelOptions, TrainingOptions
from qtool.pipeline.folder import RunFolder, StepFolder
from qtool.pipeline.run import run_recipe
from qtool.pipeline.training import rate_at, run_training, seeded_order
from qtool.progress import Silent
from qtool.recipe import load

Distill = Callable[..., tuple[list[float], Path]]


class StopAfter(Silent):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, detail: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture
def distill(tmp_path: Path, tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]) -> Distill:
    """Distills a rounded tiny model back towards the original; returns the losses and the folder of the changes."""
    folder = tiny_model("llama", dtype="bfloat16")
    student = quantized(folder, {"q_proj": "w2a16g32", "down_proj": "w2a16g32"})
    tokens = torch.randint(0, 4096, (12, 16), generator=torch.Generator().manual_seed(0))

    def carry_out(name: str, progress: Silent | None = None, **options: object) -> tuple[list[float], Path]:
        defaults = {"steps": 12, "batch": 4, "lr": 3e-3, "checkpoint_every": 4}
        state = StepFolder(RunFolder(tmp_path / name), 0, "distill/logits")
        model = ModelHandle(student.options, (*student.changes, state.path))
        result = run_training(
            model,
            ModelHandle(ModelOptions(path=str(folder))),
            registry.load("distill/logits"),
            LogitsOptions.model_validate(defaults | options),
            tokens,
            seed=3,
            folder=state,
            progress=progress or Silent(),
        )
        return result["losses"], state.path

    return carry_out


def read_all(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_the_loss_falls(distill: Distill) -> None:
    losses, _ = distill("run", steps=30)
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_killed_training_resumes_to_the_bit(distill: Distill) -> None:
    whole, folder = distill("whole")
    with pytest.raises(KeyboardInterrupt):
        distill("cut", progress=StopAfter(7))
    resumed, cut = distill("cut")
    assert resumed == whole
    assert read_all(cut) == read_all(folder)
    assert not (cut / "checkpoint.pt").exists()


def test_accumulation_gives_the_gradient_of_the_whole_batch(distill: Distill) -> None:
    at_once, _ = distill("at-once", steps=1)
    split, _ = distill("split", steps=1, accumulate=4)
    assert split == pytest.approx(at_once, rel=2e-2)  # bf16 products differ with the shape of the batch


def test_no_steps_change_nothing(distill: Distill, tiny_model: Callable[..., Path]) -> None:
    losses, folder = distill("none", steps=0)
    assert losses == []
    original = ModelHandle(ModelOptions(path=str(tiny_model("llama", dtype="bfloat16"))))
    changed = ModelHandle(original.options, (folder,))
    name = "self_attn.o_proj.weight"
    assert torch.equal(changed.block(1).module.get_parameter(name), original.block(1).module.get_parameter(name))


def test_codes_stay_and_scales_learn(distill: Distill) -> None:
    _, before = distill("before", steps=0)
    _, after = distill("after", steps=12)
    old, new = (load_changes(folder / "block_000.safetensors") for folder in (before, after))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(old[name][0].codes, new[name][0].codes)  # type: ignore[index,union-attr]
    assert not torch.equal(old[name][0].scale, new[name][0].scale)  # type: ignore[index,union-attr]


def test_codes_learn_where_they_may(distill: Distill) -> None:
    _, before = distill("before", steps=0, code_lr=0.05)
    _, after = distill("after", steps=30, code_lr=0.05)
    old, new = (load_changes(folder / "block_000.safetensors") for folder in (before, after))
    name = "model.layers.0.self_attn.q_proj.weight"
    changed = (old[name][0].codes != new[name][0].codes).float().mean()  # type: ignore[index,union-attr]
    assert 0 < changed < 0.5
    assert set(new[name][0].codes.unique().tolist()) <= {-2, -1, 0, 1}  # type: ignore[index,union-attr]


def test_without_a_step_codes_that_may_learn_stay(distill: Distill) -> None:
    _, asked = distill("asked", steps=0, code_lr=0.2)
    _, left = distill("left", steps=0)
    assert read_all(asked) == read_all(left)


def test_a_training_of_codes_on_written_windows_resumes_to_the_bit(distill: Distill) -> None:
    options = {"code_lr": 0.05, "generate": 8}
    whole, folder = distill("whole", **options)
    with pytest.raises(KeyboardInterrupt):
        distill("cut", progress=StopAfter(7), **options)
    assert (folder.parent.parent.parent / "cut" / "state" / folder.name / "written.safetensors").is_file()
    resumed, cut = distill("cut", **options)
    assert resumed == whole
    assert read_all(cut) == read_all(folder)
    assert not (cut / "written.safetensors").exists()


def test_codes_of_a_lattice_cannot_learn(
    tmp_path: Path, tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    student = quantized(tiny_model("llama"), "e8pg64")
    state = StepFolder(RunFolder(tmp_path / "run"), 0, "distill/logits")
    with pytest.raises(QtoolError, match="e8pg64: codes learn where scales and zero points are all that stands beside them"):
        run_training(
            ModelHandle(student.options, (*student.changes, state.path)),
            ModelHandle(student.options),
            registry.load("distill/logits"),
            LogitsOptions(steps=1, code_lr=0.01),
            torch.zeros(1, 8, dtype=torch.int64),
            seed=0,
            folder=state,
            progress=Silent(),
        )


def test_a_pruned_pattern_survives_training(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 8, "length": 32}},
        {"prune/magnitude": {"pattern": "2:4"}},
        {"distill/logits": {"steps": 5, "batch": 4, "lr": 1e-3}},
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    recipe = load(path)
    run_recipe(recipe, tmp_path / "out", Silent())
    folders = sorted((tmp_path / "out" / "state").glob("*-*"))
    pruned = ModelHandle(recipe.model, tuple(folders[:1])).block(0).linears()
    trained = ModelHandle(recipe.model, tuple(folders)).block(0).linears()
    for name, linear in trained.items():
        weight = linear.get_parameter("weight")
        assert torch.equal(weight == 0, pruned[name].get_parameter("weight") == 0), name
        assert not torch.equal(weight, pruned[name].get_parameter("weight")), name


def test_every_window_is_seen_once_before_any_is_seen_twice() -> None:
    order = seeded_order(10, 25, seed=1)
    assert sorted(order[:10].tolist()) == list(range(10)) == sorted(order[10:20].tolist())
    assert len(order) == 25 and torch.equal(order, seeded_order(10, 25, seed=1))
    assert not torch.equal(order, seeded_order(10, 25, seed=2))


def test_the_rate_warms_up_and_falls_to_zero_as_a_cosine() -> None:
    options = TrainingOptions(steps=100, warmup=0.1)
    rates = [rate_at(step, options) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and rates[10] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 0.001
