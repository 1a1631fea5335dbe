"""Factors of a whole model: exact where nothing is cut, within the budget, and losing less of what inputs show."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from qtool import registry
from qtool.calibration.statistics import observe_inputs
from qtool.laws.course import in_training
from qtool.laws.model import sample_tokens, tiny_checkpoint
from qtool.layers.trained_linear import TrainedLinear
from qtool.model.handle import ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.options import ModelOptions

SVD = registry.load("factorize/svd")


def test_with_all_numbers_kept_the_model_is_the_same_and_with_fewer_the_budget_holds() -> None:
    with tiny_checkpoint() as folder:
        with in_training(SVD, folder, keep=1.0) as trial:
            before = trial.teacher(sample_tokens(), use_cache=False).logits
            assert torch.equal(trial.logits(), before)
        with in_training(SVD, folder, keep=0.6) as trial:
            shapes = {name: shape_of(trial.before[name]) for name in trial.linears}
            forms = {name: trial.student.get_submodule(name) for name in trial.linears}
            held = sum(
                sum(p.numel() for p in form.parameters()) if isinstance(form, TrainedLinear) else form.weight.numel()
                for form in forms.values()
            )
            words = trial.course.finish()
    total = sum(out * columns for out, columns in shapes.values())
    largest = max(out * columns for out, columns in shapes.values())
    assert 0.6 * total - largest <= held <= 0.6 * total  # what is left over would not bring the next linear to its next rank
    assert words.keys() == set(shapes) and {word.split()[0] for word in words.values()} <= {"rank", "dense"}


def test_outputs_lose_least_by_the_hessian_and_weights_by_none() -> None:
    lost: dict[str, tuple[float, float]] = {}
    for weighting in ("plain", "hessian"):
        with tiny_checkpoint() as folder, in_training(SVD, folder, keep=0.5, weighting=weighting, damp=0.0) as trial:
            stats = observe_inputs(trial.teacher, trial.linears, sample_tokens()[:2])
            ranks = trial.course.finish()
            weights = trial.weights()
            relative = []
            for name in trial.linears:
                W, H = weight_of(trial.teacher.get_submodule(name)).double(), stats[name].hessian().double()
                D, n = W - weights[name].double(), int(ranks[name].split()[1]) if ranks[name] != "dense" else min(W.shape)
                relative.append([float(((D @ M) * D).sum() / ((W @ M) * W).sum()) for M in (torch.eye(len(H)).double(), H)])
                assert int(torch.linalg.matrix_rank(weights[name].double(), rtol=1e-4)) <= n, name
            lost[weighting] = (sum(row[0] for row in relative), sum(row[1] for row in relative))
    assert lost["hessian"][1] < lost["plain"][1] and lost["plain"][0] < lost["hessian"][0]


def test_inputs_are_seen_once_where_they_are_shared_and_not_at_all_where_none_come(tiny_model: Callable[..., Path]) -> None:
    handle = ModelHandle(ModelOptions(path=str(tiny_model("llama"))))
    windows = torch.randint(2, 4096, (9, 8), generator=torch.Generator().manual_seed(0))  # a forward of eight, one of one
    with handle.materialized() as model:
        names = [*(name for name in handle.linear_names() if name != "lm_head"), "spare"]
        model.spare = nn.Linear(4, 4)  # nothing calls it
        stats = observe_inputs(model, names, windows)
        seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_pre_hook(lambda module, args, name=name: seen[name].append(args[0]))
        model(windows, use_cache=False)
    for name in names[:-1]:
        x = seen[name][0].flatten(0, -2).double()
        H = x.T @ x / len(x)
        assert float((stats[name].hessian().double() - H).abs().max()) < 1e-4 * float(H.max()), name  # float32 sums
        assert stats[name].n_tokens == 72
    first, last = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up"))
    assert stats[first] is stats[last] and stats["spare"].n_tokens == 0


def test_transposed_weights_are_cut_too(tiny_model: Callable[..., Path]) -> None:
    with in_training(SVD, tiny_model("gpt2"), keep=0.5, weighting="activation") as trial:
        words, weights = trial.course.finish(), trial.weights()
        for name in trial.linears:
            W = weight_of(trial.teacher.get_submodule(name))
            lost = float((weights[name] - W).norm() / W.norm())
            # What is cut loses a part; another matrix's factors would lose all of it and more.
            assert lost == 0 if words[name] == "dense" else 0 < lost < 1, name
        assert any(word.startswith("rank") for word in words.values())
