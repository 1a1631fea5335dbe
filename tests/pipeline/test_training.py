"""The training driver: it learns, keeps what must be kept, and resumes to the bit."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml

from qtool import registry
from qtool.errors import QtoolError
from qtool.layers.quant_linear import QuantLinear
from qtool.linalg.divergence import kl
from qtool.methods.distill.logits import LogitsOptions
from qtool.model.handle import ModelHandle
from qtool.model.store import load_changes
from qtool.options import ModelOptions, TrainingOptions
from qtool.pipeline.folder import RunFolder, StepFolder
from qtool.pipeline.run import run_recipe
from qtool.pipeline.training import rate_at, run_training, seeded_order
from qtool.progress import Silent
from qtool.recipe import Recipe, load

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

    def carry_out(
        name: str, progress: Silent | None = None, key: str = "distill/logits", **options: object
    ) -> tuple[list[float], Path]:
        defaults = {"steps": 12, "batch": 4, "lr": 3e-3, "checkpoint_every": 4}
        windows = tokens[: int(str(options.pop("tokens", len(tokens))))]
        state, method = StepFolder(RunFolder(tmp_path / name), 0, key), registry.load(key)
        model = ModelHandle(student.options, (*student.changes, state.path))
        try:
            result = run_training(
                model,
                ModelHandle(ModelOptions(path=str(folder))),
                method,
                cast(TrainingOptions, method.options.model_validate(defaults | options)),
                windows,
                seed=3,
                folder=state,
                progress=progress or Silent(),
            )
        finally:
            state.run.close()
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
    quantize = {"quantize/gptq": {"scheme": "w4a16g32", "ignore": ["lm_head", "*layers.1.*"]}}
    recipe = written_recipe(tmp_path, tiny_model, {"steps": 5, "batch": 4, "lr": 1e-3}, quantize)
    run_recipe(recipe, tmp_path / "out", Silent())
    folders = sorted((tmp_path / "out" / "state").glob("*-*"))
    pruned = ModelHandle(recipe.model, tuple(folders[:1])).block(0).linears()
    trained = ModelHandle(recipe.model, tuple(folders[:2])).block(0).linears()
    rounded = ModelHandle(recipe.model, tuple(folders)).block(0).linears()
    for name, linear in trained.items():
        W = cast(QuantLinear, rounded[name]).weight_values(torch.float32)
        assert bool((W[pruned[name].get_parameter("weight") == 0] == 0).all()), name
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


def test_wsd_stays_at_the_peak_and_falls_in_the_last_steps() -> None:
    options = TrainingOptions(steps=100, warmup=0.1, schedule="wsd", decay=0.2)
    rates = [rate_at(step, options) for step in range(100)]
    assert rates[:10] == [rate_at(step, TrainingOptions(steps=100)) for step in range(10)]
    assert set(rates[10:80]) == {1.0}
    assert [rates[80], rates[90], rates[99]] == pytest.approx([20 / 21, 10 / 21, 1 / 21])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.6}, "more than all steps"),
        ({"cache": "kept"}, "top_k: 64"),
        ({"patience": 2}, "validation: 8"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingOptions.model_validate(options)


def test_windows_that_are_held_out_are_measured_and_never_trained_on(distill: Distill, tmp_path: Path) -> None:
    losses, _ = distill("held", validation=8, validate_every=3)
    few, _ = distill("few", tokens=4)
    assert losses == few  # the first four windows alone
    rows = events(tmp_path / "held", "validation")
    assert [row["step"] for row in rows] == [2, 5, 8, 11]
    with pytest.raises(QtoolError, match="holds out 12 of 12 calibration windows"):
        distill("none", validation=12)


def test_training_ends_at_the_best_weights_once_the_loss_no_longer_falls(distill: Distill, tmp_path: Path) -> None:
    options = {"steps": 40, "lr": 0.1, "validation": 4, "validate_every": 1, "patience": 2, "warmup": 0.5}
    losses, folder = distill("early", **options)
    held = [row["loss"] for row in events(tmp_path / "early", "validation")]
    best = held.index(min(held))
    assert len(losses) == len(held) == best + 3 < 40
    with pytest.raises(KeyboardInterrupt):
        distill("again", progress=StopAfter(best + 2), **options, checkpoint_every=1)
    again, other = distill("again", **options, checkpoint_every=1)
    assert again == losses and read_all(other) == read_all(folder)
    model = ModelHandle(ModelOptions(path=str(tmp_path / "tiny-llama")), (folder,))
    assert not (folder / "best.pt").exists()
    found = held_out_loss(model, tmp_path)
    assert found == pytest.approx(min(held), rel=0.05)  # weights are rounded to bfloat16 once more
    assert found < held[-1]


def held_out_loss(model: ModelHandle, tmp_path: Path) -> float:
    tokens = torch.randint(0, 4096, (12, 16), generator=torch.Generator().manual_seed(0))[8:]
    logits = []
    for handle in (model, ModelHandle(ModelOptions(path=str(tmp_path / "tiny-llama")))):
        with handle.materialized() as module, torch.no_grad():
            logits.append(module(tokens).logits)
    return float(kl(logits[1], logits[0]).mean())


def test_every_step_is_a_line_of_events(distill: Distill, tmp_path: Path) -> None:
    losses, _ = distill("run", steps=5)
    rows = events(tmp_path / "run", "training")
    assert [row["loss"] for row in rows] == losses
    assert [row["rate"] for row in rows] == [rate_at(step, TrainingOptions(steps=5)) for step in range(5)]
    assert all(row["gradient_norm"] > 0 for row in rows)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def test_what_the_teacher_says_may_lie_on_disk(distill: Distill, tmp_path: Path) -> None:
    live, _ = distill("live", top_k=20)
    first, _ = distill("first", top_k=20, cache=str(tmp_path / "kept"))
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    written = file.stat().st_mtime_ns
    second, _ = distill("second", top_k=20, cache=str(tmp_path / "kept"))
    assert first == second and file.stat().st_mtime_ns == written
    assert first == pytest.approx(live, rel=2e-2)  # its bf16 products differ with the shape of the batch
    distill("other", top_k=19, cache=str(tmp_path / "kept"))
    distill("text", top_k=20, tokens=11, cache=str(tmp_path / "kept"))
    assert len(list((tmp_path / "kept").iterdir())) == 3
    whole, _ = distill("whole", top_k=5000, cache=str(tmp_path / "kept"))
    assert whole == pytest.approx(distill("plain")[0], rel=2e-2)


def test_a_changed_teacher_finds_nothing_of_the_old_one(
    distill: Distill, tmp_path: Path, tiny_model: Callable[..., Path]
) -> None:
    options = {"top_k": 20, "cache": str(tmp_path / "kept"), "steps": 1}
    distill("first", **options)
    tiny_model("llama", dtype="bfloat16", seed=1)
    distill("second", **options)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_recomputed_activations_change_no_bit(distill: Distill) -> None:
    plain, kept = distill("plain", steps=3)
    recomputed, again = distill("recomputed", steps=3, recompute=True)
    assert recomputed == plain and read_all(again) == read_all(kept)


def test_labels_alone_are_the_cross_entropy_of_the_text_and_need_no_teacher(distill: Distill) -> None:
    (text,), _ = distill("text", steps=1, labels=1.0)
    (teacher,), _ = distill("teacher", steps=1)
    (both,), _ = distill("both", steps=1, labels=0.25)
    assert text == pytest.approx(math.log(4096), rel=0.2)  # a random model on random tokens
    assert both == pytest.approx(0.25 * text + 0.75 * teacher, rel=1e-5)


@pytest.mark.parametrize(
    ("key", "options"),
    [("distill/optimal_weight", {"validation": 2}), ("distill/born_again", {"generations": 3, "learn": "dkpp"})],
)
def test_a_training_in_phases_resumes_to_the_bit_in_any_of_them(
    key: str, options: dict[str, object], distill: Distill, tmp_path: Path
) -> None:
    options |= {"steps": 4, "checkpoint_every": 3}
    whole, folder = distill("whole", key=key, **options)
    assert len(whole) == 12 and whole[4] != whole[0]
    for stop in (4, 8):  # the progress of every start begins anew: after step 3 of phase 1 and of phase 2
        with pytest.raises(KeyboardInterrupt):
            distill("cut", key=key, progress=StopAfter(stop), **options)
    resumed, cut = distill("cut", key=key, **options)
    assert resumed == whole and read_all(cut) == read_all(folder)
    phases = [row["phase"] for row in events(tmp_path / "whole", "training")]
    assert phases == [0] * 4 + [1] * 4 + [2] * 4


def test_hidden_states_of_a_student_of_another_shape_are_projected(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    teacher = tiny_model("llama", dtype="bfloat16", name="teacher", num_hidden_layers=3)
    student = tiny_model("llama", name="student", hidden_size=32, head_dim=16, num_attention_heads=2, num_key_value_heads=1)
    state = StepFolder(RunFolder(tmp_path / "run"), 0, "distill/hidden")
    handles = [ModelHandle(ModelOptions(path=str(path))) for path in (student, teacher)]
    method = registry.load("distill/hidden")
    options = method.options.model_validate({"steps": 12, "batch": 4, "lr": 3e-3, "attention": 1.0, "hidden": 1.0})
    tokens = torch.randint(0, 4096, (4, 16), generator=torch.Generator().manual_seed(0))
    result = run_training(*handles, method, cast(TrainingOptions, options), tokens, 0, state, Silent())
    state.run.close()
    assert result["losses"][-1] < 0.8 * result["losses"][0]
    assert all("proj" in name or "norm" in name for name in load_changes(state.unit("block_000")))
    assert handles[0].model.config._attn_implementation == handles[1].model.config._attn_implementation != "eager"


def test_a_training_from_scratch_keeps_the_shape_and_the_zeros_alone(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    recipe = written_recipe(tmp_path, tiny_model, {"steps": 4, "batch": 4, "start": "random", "labels": 1.0})
    run_recipe(recipe, tmp_path / "out", Silent())
    folders = sorted((tmp_path / "out" / "state").glob("*-*"))
    pruned = ModelHandle(recipe.model, tuple(folders[:1])).block(0).module.get_parameter("mlp.up_proj.weight")
    trained = ModelHandle(recipe.model, tuple(folders)).block(0).module.get_parameter("mlp.up_proj.weight")
    assert torch.equal(trained == 0, pruned == 0)
    pairs = torch.stack([trained[pruned != 0], pruned[pruned != 0]]).float()
    assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.1  # nothing of the old weights is left


def test_codes_cannot_be_drawn(distill: Distill) -> None:
    with pytest.raises(QtoolError, match="start: random: .*q_proj is quantized"):
        distill("run", start="random")


def test_eight_bit_moments_train_as_well_and_resume_to_the_bit(distill: Distill) -> None:
    plain, _ = distill("plain", steps=30)
    whole, folder = distill("whole", steps=30, optimizer="adamw8bit")
    assert sum(whole[-3:]) == pytest.approx(sum(plain[-3:]), rel=0.15)
    with pytest.raises(KeyboardInterrupt):
        distill("cut", progress=StopAfter(26), steps=30, optimizer="adamw8bit")
    resumed, cut = distill("cut", steps=30, optimizer="adamw8bit")
    assert resumed == whole and read_all(cut) == read_all(folder)


def written_recipe(
    tmp_path: Path, tiny_model: Callable[..., Path], options: dict[str, object], *after: dict[str, object]
) -> Recipe:
    """2:4 by magnitude, then distill/logits with these options, then what comes after."""
    steps = [
        {"calibrate/text": {"source": "demo:calibration", "samples": 8, "length": 32}},
        {"prune/magnitude": {"pattern": "2:4"}},
        {"distill/logits": options},
        *after,
    ]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny_model("llama", dtype="bfloat16")), "pipeline": steps}))
    return load(path)


@pytest.mark.no_cover  # the same run twice in other processes
def test_a_training_killed_with_kill_9_ends_with_the_same_bits(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    recipe = written_recipe(tmp_path, tiny_model, {"steps": 30, "batch": 2, "checkpoint_every": 3, "lr": 1e-3})
    run_recipe(recipe, tmp_path / "whole", Silent())
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "qtool", "run", str(tmp_path / "recipe.yaml"), "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        checkpoint = out / "state" / "02-distill-logits" / "checkpoint.pt"
        deadline = time.monotonic() + 240
        while not checkpoint.is_file():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
    assert checkpoint.is_file() and not (out / "results.json").exists()
    resumed = run_recipe(recipe, out, Silent())
    assert resumed["status"] == "done"
    assert read_all(out / "state" / "02-distill-logits") == read_all(tmp_path / "whole" / "state" / "02-distill-logits")
    steps = [row["step"] for row in events(out, "training")]
    assert len(steps) < 60 and sorted(set(steps)) == list(range(30))
