"""LayerStats: running statistics of one linear's input, or of several linears that share it.

    H = mean over tokens of x xᵀ  [in, in]     amax_j = max |x_j|     mean_abs_j = mean |x_j|     x [tokens, in]
All in float32; x is seen once and forgotten, except where a method needs the inputs themselves.
"""

import torch
from torch import Tensor

from qtool.options import Needs


class LayerStats:
    """Owns its accumulators; `update` with every batch, then read."""

    def __init__(self, n_features: int, needs: Needs, device: torch.device | None = None) -> None:
        self.n_tokens = 0
        self._needs = needs
        self._amax = torch.zeros(n_features, device=device)
        self._sum_abs = torch.zeros(n_features, device=device)
        self._mean_square = torch.zeros(n_features, n_features, device=device) if needs in ("hessian", "inputs") else None
        self._inputs: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        """Take in x [..., in]."""
        wide = x.detach().reshape(-1, x.shape[-1]).float()  # [tokens, in]
        self.n_tokens += len(wide)
        if len(wide) == 0:
            return
        magnitude = wide.abs()
        self._amax = torch.maximum(self._amax, magnitude.amax(0))
        self._sum_abs += magnitude.sum(0)
        if self._mean_square is not None:  # a running mean, so that reading it copies nothing
            share = len(wide) / self.n_tokens
            self._mean_square.addmm_(wide.T, wide, beta=1 - share, alpha=share / len(wide))  # [in, in]
        if self._needs == "inputs":
            self._inputs.append(x.detach())

    @property
    def has_hessian(self) -> bool:
        return self._mean_square is not None

    def hessian(self) -> Tensor:
        """Mean of x xᵀ, [in, in], not a copy; zeros where no token came."""
        assert self._mean_square is not None, "hessian() of statistics gathered without it"
        return self._mean_square

    def amax(self) -> Tensor:
        """Largest magnitude per input channel, [in]."""
        return self._amax

    def mean_abs(self) -> Tensor:
        """Mean magnitude per input channel, [in]."""
        return self._sum_abs / max(self.n_tokens, 1)

    def inputs(self) -> list[Tensor]:
        """Every batch as it came, [samples, length, in] each."""
        assert self._needs == "inputs", "inputs() of statistics gathered without them"
        return self._inputs
