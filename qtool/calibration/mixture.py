"""What the experts of one mixture do on the calibration text: on the tokens routed to them, and on all.

    saliency_e = mean over tokens t routed to e of p_e(t) ‖f_e(t)‖        p_e the router's weight
    similarity_ij = ((1 + cos(m_i, m_j)) / 2 + 1 - d_ij / max d) / 2         m_e = mean over tokens of softmax(l(t))_e f_e(t)
    d_ij = ‖l_i / ‖l_i‖ - l_j / ‖l_j‖‖      l_e [tokens] the router's logits of expert e    f_e(t) [hidden] its output
Source: saliency: Lasby et al. 2025, arXiv:2510.13999 (REAP); similarity: Jha et al. 2026, arXiv:2604.04356 (REAM), as the code
that its authors released computes it.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.layers.experts import Experts
from qtool.model.architectures import is_router


class RoutedScores:
    """Accumulates the mean over routed tokens of p_e ‖f_e‖ of every expert of one mixture."""

    def __init__(self, n_experts: int) -> None:
        self._sum = torch.zeros(n_experts, dtype=torch.float64)
        self.tokens = torch.zeros(n_experts, dtype=torch.int64)

    def update(self, expert: int, weights: Tensor, out: Tensor) -> None:
        """weights [tokens] of the router and out [tokens, hidden] of the expert, for the tokens routed to it."""
        self._sum[expert] += float((weights.double() * out.double().norm(dim=-1)).sum())
        self.tokens[expert] += len(out)

    def scores(self) -> Tensor:
        """[experts], float64; 0 for an expert that no token came to."""
        return self._sum / self.tokens.clamp(min=1)


def observe_experts(experts: Experts, scores: RoutedScores) -> list[RemovableHandle]:
    """Hooks that tell `scores` of every forward of a mixture's experts."""
    routed: list[tuple[Tensor, Tensor]] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        routed[:] = [(args[1], args[2])]  # [tokens, k] each

    def leave(module: nn.Module, args: tuple[Tensor, ...], out: Tensor, expert: int) -> None:
        index, weights = routed[0]
        scores.update(expert, weights[index == expert], out)  # the same order as the experts' own: tokens, then choices

    hooks = [experts.register_forward_pre_hook(enter)]
    return [*hooks, *(down.register_forward_hook(partial(leave, expert=e)) for e, down in enumerate(experts.down))]


class Mixture:
    """Accumulates the router's logits, the experts' outputs and a sample of their inputs; look inside `observed`."""

    def __init__(self, experts: Experts, hidden: int, device: torch.device) -> None:
        self.experts = experts
        n_experts = len(experts.down)
        self.saliency = RoutedScores(n_experts)
        self._outputs = torch.zeros(n_experts, hidden, dtype=torch.float64)  # sum over tokens of softmax(l)_e f_e
        self._logits = torch.zeros(n_experts, n_experts, dtype=torch.float64)  # sum over tokens of l lᵀ
        self._inputs = LayerStats(hidden, ("sample",), device)

    @contextlib.contextmanager
    def observed(self, block: nn.Module) -> Iterator[None]:
        """Inside, every forward of the block that holds the mixture is taken in."""
        logits: list[Tensor] = []

        def route(router: nn.Module, args: tuple[Tensor, ...], out: object) -> None:
            if isinstance(out, tuple):  # (logits, weights, index); the gate of a shared expert gives a tensor
                logits[:] = [out[0]]

        def enter(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            if not logits:
                raise QtoolError(f"{type(block).__name__}: no router beside the experts gives logits that could be read")
            self._take(*args, logits.pop())

        hooks = [module.register_forward_hook(route) for name, module in block.named_modules() if is_router(name)]
        hooks.append(self.experts.register_forward_pre_hook(enter))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _take(self, x: Tensor, index: Tensor, weights: Tensor, logits: Tensor) -> None:
        """x [tokens, hidden], index and weights [tokens, k], logits [tokens, experts]."""
        self._inputs.update(x)
        wide = logits.double()
        self._logits += (wide.T @ wide).cpu()
        for expert, share in enumerate(wide.softmax(-1).T):  # share [tokens]
            out = self.experts.down[expert](self._hidden(expert, x))  # [tokens, hidden]
            self._outputs[expert] += (share @ out.double()).cpu()
            token, choice = torch.where(index == expert)
            self.saliency.update(expert, weights[token, choice], out[token])

    def _hidden(self, expert: int, x: Tensor) -> Tensor:
        gate, up = self.experts.gate_up[expert](x).chunk(2, dim=-1)
        found: Tensor = self.experts.act_fn(gate) * up
        return found

    def similarity(self) -> Tensor:
        """[experts, experts], float64, 1 for equal ones."""
        norms = self._logits.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
        cosine = self._logits / norms / norms[:, None]
        d = (2 - 2 * cosine).clamp_min(0).sqrt().fill_diagonal_(0)
        m = F.normalize(self._outputs, dim=-1)
        return ((1 + m @ m.T) / 2 + 1 - d / d.max().clamp_min(torch.finfo(torch.float64).tiny)) / 2

    @torch.no_grad()
    def activations(self, expert: int) -> Tensor:
        """[neurons, tokens] of the sample, float32: what the expert's neurons give to its down projection."""
        return self._hidden(expert, self._inputs.sample().to(next(self.experts.parameters()).dtype)).float().T

    def weights(self, expert: int) -> Tensor:
        """[neurons, 3 · hidden], float32: of each neuron its rows of gate and up and its column of down."""
        gate, up = self.experts.gate_up[expert].get_parameter("weight").detach().chunk(2)  # [neurons, hidden] each
        down = self.experts.down[expert].get_parameter("weight").detach()  # [hidden, neurons]
        return torch.cat([gate, up, down.T], dim=1).float()
