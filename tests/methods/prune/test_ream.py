"""REAM against its algorithm written out token by token, with every order of neurons tried."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, silu
from transformers import AutoModelForCausalLM, PreTrainedModel

from qtool.calibration.importance import Importance
from qtool.errors import QtoolError
from qtool.methods.prune.ream import ReamOptions, group, ream, shape_after, shares
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import ModelHandle
from qtool.model.writer import write_checkpoint
from qtool.options import ModelOptions
from qtool.pipeline.shaping import write_cut

NEURONS = 4  # so few that all 24 orders can be tried
EXPERTS = 5


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> ModelHandle:
    folder = tiny_model("mixtral", intermediate_size=NEURONS, num_local_experts=EXPERTS)
    return ModelHandle(ModelOptions(path=str(folder)))


@pytest.fixture
def merged(tmp_path: Path) -> Callable[[ModelHandle, Cut], PreTrainedModel]:
    """The smaller model, exported, as plain transformers loads it; the cut as it is stored and read again."""

    def run(model: ModelHandle, cut: Cut) -> PreTrainedModel:
        stored = Cut.from_tensors(cut.shape, cut.to_tensors(), cut.facts)
        write_cut(Cutter(model, stored), tmp_path / "cut")
        (tmp_path / "out").mkdir()
        write_checkpoint(ModelHandle(model.options, (tmp_path / "cut",)), tmp_path / "out")
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    return run


def merge_by_hand(mlp: torch.nn.Module, x: Tensor, keep: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, down, and the router of the smaller mixture, for inputs x [tokens, hidden]."""
    logits = x @ mlp.gate.weight.T  # [tokens, experts]
    neurons = torch.empty(EXPERTS, len(x), NEURONS)
    outputs = torch.empty(EXPERTS, *x.shape)
    for e in range(EXPERTS):
        gate, up = (x @ mlp.experts.gate_up_proj[e].T).chunk(2, -1)
        neurons[e] = silu(gate) * up
        outputs[e] = neurons[e] @ mlp.experts.down_proj[e].T
    norms: list[list[float]] = [[] for _ in range(EXPERTS)]
    for t in range(len(x)):
        weights, chosen = logits[t].softmax(-1).topk(2)
        for weight, e in zip(weights / weights.sum(), chosen.tolist(), strict=True):
            norms[e].append(float(weight * outputs[e, t].norm()))
    S = [sum(values) / max(len(values), 1) for values in norms]
    mean = [(logits.softmax(-1)[:, e, None] * outputs[e]).mean(0) for e in range(EXPERTS)]
    profile = [normalize(logits[:, e], dim=0) for e in range(EXPERTS)]
    furthest = max(float((a - b).norm()) for a in profile for b in profile)

    def similarity(i: int, j: int) -> float:
        of_router = 1 - float((profile[i] - profile[j]).norm()) / furthest
        return ((1 + float(cosine_similarity(mean[i], mean[j], 0))) / 2 + of_router) / 2

    def features(e: int) -> tuple[Tensor, Tensor]:
        """[neurons, tokens] and [neurons, 3 · hidden]"""
        gate, up = mlp.experts.gate_up_proj[e].chunk(2)
        weights = torch.stack([torch.cat([gate[i], up[i], mlp.experts.down_proj[e][:, i]]) for i in range(NEURONS)])
        return normalize(neurons[e].T, dim=-1), normalize(weights, dim=-1)

    centers = sorted(range(EXPERTS), key=lambda e: -S[e])[:keep]
    groups = {center: [center] for center in centers}
    left = [e for e in range(EXPERTS) if e not in centers]
    for center in centers:
        while left and len(groups[center]) < most:
            nearest = max(left, key=lambda e: similarity(center, e))
            groups[center].append(nearest)
            left.remove(nearest)
    gate_up, down = [], []
    for center in sorted(centers):
        total = sum(S[e] for e in groups[center])
        gate_up.append(torch.zeros_like(mlp.experts.gate_up_proj[0]))
        down.append(torch.zeros_like(mlp.experts.down_proj[0]))
        for e in groups[center]:
            cost = sum(torch.cdist(a, b) for a, b in zip(features(center), features(e), strict=True))
            places = itertools.permutations(range(NEURONS))
            best = min(places, key=lambda P: sum(float(cost[i, P[i]]) for i in range(NEURONS)))
            gate, up = mlp.experts.gate_up_proj[e].chunk(2)
            gate_up[-1] += S[e] / total * torch.cat([gate[list(best)], up[list(best)]])
            down[-1] += S[e] / total * mlp.experts.down_proj[e][:, list(best)]
    return torch.stack(gate_up), torch.stack(down), mlp.gate.weight[sorted(centers)]


@torch.no_grad()
@pytest.mark.parametrize(("keep", "most"), [(3, 5), (3, 2), (2, 3)])
def test_merged_experts_are_the_papers_block_after_block(
    keep: int, most: int, model: ModelHandle, merged: Callable[[ModelHandle, Cut], PreTrainedModel], windows: Tensor
) -> None:
    """Of the second block too, which is fed with what the first one gives once it is merged."""
    small = merged(model, ream(Importance(model, windows), ReamOptions(keep=keep, group=most), lambda text: None))
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    assert small.config.num_local_experts == keep
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(small.model.layers):  # what its mixtures are fed, those before them merged
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: inputs.update({index: args[0].flatten(0, 1)}))
    small(windows)
    for index, layer in enumerate(small.model.layers):
        expected = merge_by_hand(plain.model.layers[index].mlp, inputs[index], keep, most)
        found = (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight)
        for value, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_experts_that_are_one_in_other_orders_of_neurons_give_it_back(
    model: ModelHandle, merged: Callable[[ModelHandle, Cut], PreTrainedModel], windows: Tensor, tmp_path: Path
) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    for layer in plain.model.layers:
        experts = layer.mlp.experts
        for e in range(1, EXPERTS):
            places = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(e))
            gate, up = experts.gate_up_proj[0].chunk(2)
            experts.gate_up_proj[e] = torch.cat([gate[places], up[places]])
            experts.down_proj[e] = experts.down_proj[0][:, places]
    plain.save_pretrained(model.folder)
    before = plain(windows).logits
    small = merged(model, ream(Importance(model, windows), ReamOptions(keep=2), lambda text: None))
    torch.testing.assert_close(small(windows).logits, before, rtol=1e-4, atol=1e-4)  # whichever expert a token goes to


def test_an_expert_that_no_token_came_to_is_noted_and_has_no_share(model: ModelHandle, windows: Tensor) -> None:
    notes: list[str] = []
    cut = ream(Importance(model, windows[:1, :1]), ReamOptions(keep=2), notes.append)  # one token reaches two experts
    assert len(notes) == 2 and all("no calibration token came to expert" in note for note in notes)
    for name, merge in cut.merges.items():
        expected = torch.zeros(EXPERTS, dtype=torch.float64).index_fill(0, cut.kept[name], 1)
        assert torch.equal(merge.shares, expected)
        assert torch.equal(merge.into[cut.kept[name]], cut.kept[name])


def test_groups_fill_from_the_greatest_center_and_idle_groups_are_their_centers() -> None:
    similarity = torch.eye(5, dtype=torch.float64)
    similarity[1] = torch.tensor([0.9, 1.0, 0.8, 0.7, 0.6])  # all are nearest to 1, which takes two of them
    S = torch.tensor([0.0, 3.0, 1.0, 0.0, 2.0], dtype=torch.float64)
    into = group(S, similarity, torch.tensor([1, 4]), 3)
    assert into.tolist() == [1, 1, 1, 4, 4]
    assert shares(S, into).tolist() == [0, 0.75, 0.25, 0, 1]
    assert shares(torch.zeros(5, dtype=torch.float64), into).tolist() == [0, 1, 0, 0, 1]


def test_groups_that_cannot_hold_all_experts_are_refused(model: ModelHandle, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(QtoolError, match="2 groups of 2 hold less than the 5 experts; group 3 or more"):
        shape_after(model, ReamOptions(keep=2, group=2))
    with pytest.raises(QtoolError, match="LlamaForCausalLM has no experts"):
        shape_after(ModelHandle(ModelOptions(path=str(tiny_model("llama")))), ReamOptions(keep=2))
