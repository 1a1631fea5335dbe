"""REAP against a loop over tokens and the experts that each of them is sent to."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.calibration.importance import Importance
from qtool.errors import QtoolError
from qtool.methods.prune.experts import ExpertsOptions, experts, shape_after
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions


@pytest.fixture
def model(tiny_model: Callable[..., Path]) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(tiny_model("mixtral"))))


@torch.no_grad()
def test_saliency_is_the_mean_weighted_norm_over_the_tokens_of_an_expert(model: ModelHandle, windows: Tensor) -> None:
    plain = AutoModelForCausalLM.from_pretrained(model.folder)
    inputs: dict[int, Tensor] = {}
    for index, layer in enumerate(plain.model.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, index=index: inputs.update({index: args[0]}))
    plain(windows)
    found = Importance(model, windows).of_experts()
    for index, layer in enumerate(plain.model.layers):
        norms: list[list[float]] = [[], [], [], []]
        for x in inputs[index].flatten(0, 1):
            weights, chosen = (layer.mlp.gate.weight @ x).softmax(-1).topk(2)
            for weight, expert in zip(weights / weights.sum(), chosen.tolist(), strict=True):
                gate, up = (layer.mlp.experts.gate_up_proj[expert] @ x).chunk(2)
                out = layer.mlp.experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up)
                norms[expert].append(float(weight * out.norm()))
        seen = found[f"experts:model.layers.{index}"]
        assert seen.tokens.tolist() == [len(values) for values in norms]
        expected = torch.tensor([sum(values) / max(len(values), 1) for values in norms])
        torch.testing.assert_close(seen.scores().float(), expected, rtol=1e-4, atol=1e-6)


def test_the_experts_of_greatest_saliency_stay_and_idle_ones_are_noted(model: ModelHandle, windows: Tensor) -> None:
    importance, notes = Importance(model, windows[:1, :2]), list[str]()  # two tokens reach at most four experts
    cut = experts(importance, ExpertsOptions(keep=2), notes.append)
    for name, seen in importance.of_experts().items():
        assert cut.kept[name].tolist() == sorted(seen.scores().topk(2).indices.tolist())
    idle = sum(bool((seen.tokens == 0).any()) for seen in importance.of_experts().values())
    assert len(notes) == idle and all("no calibration token came to expert" in note for note in notes)


def test_less_than_a_token_goes_to_and_models_without_experts_are_refused(
    model: ModelHandle, tiny_model: Callable[..., Path]
) -> None:
    with pytest.raises(QtoolError, match="1 experts are less than the 2 that each token goes to; keep 2 or more"):
        shape_after(model, ExpertsOptions(keep=1))
    with pytest.raises(QtoolError, match="LlamaForCausalLM has no experts"):
        shape_after(ModelHandle(ModelOptions(path=str(tiny_model("llama")))), ExpertsOptions(keep=2))
