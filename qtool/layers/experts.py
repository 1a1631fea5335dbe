"""Experts as separate linears: the fused [experts, out, in] weights of a mixture, one nn.Linear per expert and side.

    y = sum over chosen experts e of  p_e down_e(act(gate_e(x)) * up_e(x)),   [gate_e; up_e] = gate_up_e
Why: methods work on matrices, and each expert sees tokens of its own. Every expert is called, on no tokens where the
router sent none, so that observers see it and can say so.
"""

import torch
from torch import Tensor, nn


class Experts(nn.Module):
    """Takes a fused experts module's place; same call as transformers' own (hidden, top_k_index, top_k_weights)."""

    def __init__(self, n_experts: int, hidden: int, intermediate: int, act_fn: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.act_fn = act_fn
        with torch.device("meta"):
            self.gate_up = nn.ModuleList(nn.Linear(hidden, 2 * intermediate, bias=False, dtype=dtype) for _ in range(n_experts))
            self.down = nn.ModuleList(nn.Linear(intermediate, hidden, bias=False, dtype=dtype) for _ in range(n_experts))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [tokens, hidden], top_k_index and top_k_weights [tokens, k]; returns [tokens, hidden]."""
        out = torch.zeros_like(hidden_states)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, choice = torch.where(top_k_index == expert)
            gate, up = gate_up(hidden_states[token]).chunk(2, dim=-1)
            y = down(self.act_fn(gate) * up) * top_k_weights[token, choice, None]
            out.index_add_(0, token, y.to(out.dtype))
        return out


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds fused experts in the layout that `Experts` understands."""
    parameters = dict(module.named_parameters(recurse=False))
    return set(parameters) == {"gate_up_proj", "down_proj"} and all(p.ndim == 3 for p in parameters.values())
