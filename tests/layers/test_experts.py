"""Experts as separate linears compute what transformers' fused experts compute."""

import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from qtool.layers.experts import Experts, is_fused

N_EXPERTS, HIDDEN, INTERMEDIATE = 4, 16, 24


@pytest.fixture
def fused() -> MixtralExperts:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=N_EXPERTS)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random))
    return module


def separate(fused: MixtralExperts) -> Experts:
    experts = Experts(N_EXPERTS, HIDDEN, INTERMEDIATE, fused.act_fn, torch.float32)
    for linears, weights in ((experts.gate_up, fused.gate_up_proj), (experts.down, fused.down_proj)):
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = nn.Parameter(weight.detach().clone())
    return experts


def routing(chosen: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [tokens, hidden], and two of the first `chosen` experts for each token with their weights [tokens, 2]."""
    random = torch.Generator().manual_seed(1)
    scores = torch.rand(9, chosen, generator=random).softmax(-1)
    weights, experts = scores.topk(2, dim=-1)
    return torch.randn(9, HIDDEN, generator=random), experts, weights


@pytest.mark.parametrize("chosen", [4, 3, 2])
def test_the_output_is_that_of_the_fused_module(fused: MixtralExperts, chosen: int) -> None:
    hidden, experts, weights = routing(chosen)
    with torch.no_grad():
        expected, found = fused(hidden, experts, weights), separate(fused)(hidden, experts, weights)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-4)  # the same products, summed in another order


def test_every_expert_is_called_even_where_no_token_was_sent(fused: MixtralExperts) -> None:
    experts = separate(fused)
    seen: dict[str, int] = {}
    for name, module in experts.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda module, args, name=name: seen.update({name: len(args[0])}))
    with torch.no_grad():
        experts(*routing(2))
    assert [seen[f"gate_up.{e}"] for e in range(N_EXPERTS)] == [9, 9, 0, 0]
    assert [seen[f"down.{e}"] for e in range(N_EXPERTS)] == [9, 9, 0, 0]


def test_it_takes_no_memory_before_weights_are_placed() -> None:
    experts = Experts(N_EXPERTS, HIDDEN, INTERMEDIATE, nn.SiLU(), torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in experts.parameters())
    assert len(list(experts.parameters())) == 2 * N_EXPERTS


def test_only_the_layout_that_it_understands_counts_as_fused(fused: MixtralExperts) -> None:
    assert is_fused(fused)
    assert not is_fused(separate(fused)) and not is_fused(nn.Linear(2, 2))
    fused.register_parameter("gate_up_proj_bias", nn.Parameter(torch.zeros(N_EXPERTS, 2 * INTERMEDIATE)))
    assert not is_fused(fused)
