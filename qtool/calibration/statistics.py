"""LayerStats: running statistics of one linear's input, or of several linears that share it.

    H = mean over tokens of x xᵀ  [in, in]     amax_j = max |x_j|     mean_abs_j = mean |x_j|     x [tokens, in]
    D = mean over tokens of (x° - x) xᵀ  [in, in], the drift from x°, what the original model has in x's place
    Hₒ = mean over tokens of g gᵀ  [out, out], g the gradient of log p(y) by the linear's output, see pipeline/curvature.py
All in float32; x is seen once and forgotten, except where a method needs the inputs themselves, all or a sample of them:
of tokens drawn by a seed of its own, so that long texts cost no more memory than short ones.
H is symmetric: of each strip of columns only the part on and below the diagonal is summed, the rest is its mirror image.
Why not the bfloat16 units of a CPU, twice as fast: they round each product's sum to bfloat16, and from few tokens H, which
has no full rank then, comes out further from positive definite than damping bridges.
"""

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from qtool.model.linear import shape_of
from qtool.options import Needs

STRIP = 128  # narrowest strip of columns whose matrix product still runs at full speed
N_STRIPS = 8  # most strips: 8 do 9/16 of the whole product's work
CHUNK = 512  # tokens taken in at once on a CPU: few enough to stay in its cache
SAMPLE = 2048  # most tokens of a sample
OBSERVED = 8  # windows of one forward of a whole model


class LayerStats:
    """Owns its accumulators; `update` with every batch, then read what was asked for in `needs`."""

    def __init__(self, n_features: int, needs: Needs, device: torch.device | None = None) -> None:
        self.n_tokens = 0
        self._needs = needs
        self._amax = torch.zeros(n_features, device=device)
        self._sum_abs = torch.zeros(n_features, device=device)
        self._mean_square = torch.zeros(n_features, n_features, device=device) if "hessian" in needs else None
        self._is_whole = True
        self._drift = torch.zeros(n_features, n_features, device=device) if "drift" in needs else None
        self._inputs: list[Tensor] = []
        self._sample = torch.zeros(0, n_features, device=device)
        self._draws = torch.zeros(0)  # one number for each token of the sample; those with the least of all stay
        self._random = torch.Generator().manual_seed(0)
        self._output_hessian: Tensor | None = None

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Take in x [..., in], and what the original model has in its place where the drift is asked for."""
        if "inputs" in self._needs:
            self._inputs.append(x.detach())
        rows = x.detach().reshape(-1, x.shape[-1]).to(self._amax.device)  # [tokens, in]
        if "sample" in self._needs:
            self._draw(rows)
        if self._drift is not None and (original is None or original.shape != x.shape):
            self._drift = None  # a mixture's router may send other tokens here than in the original
        originals = rows if self._drift is None or original is None else original.detach().reshape(rows.shape).to(rows.device)
        size = CHUNK if rows.device.type == "cpu" else max(len(rows), 1)
        for chunk, before in zip(rows.split(size), originals.split(size), strict=True):
            self._take(chunk, before)

    def _take(self, x: Tensor, original: Tensor) -> None:
        """x, original [tokens, in]."""
        self.n_tokens += len(x)
        if len(x) == 0:
            return
        share, wide = len(x) / self.n_tokens, x.float()
        if "amax" in self._needs:
            self._amax = torch.maximum(self._amax, wide.abs().amax(0))
        if "mean_abs" in self._needs:
            self._sum_abs += wide.abs().sum(0)
        if self._mean_square is not None:  # a running mean, so that reading it copies nothing
            self._is_whole = False
            for start, stop in self._strips():
                lower = self._mean_square[start:, start:stop]
                lower.addmm_(wide[:, start:].T, wide[:, start:stop], beta=1 - share, alpha=share / len(x))
        if self._drift is not None:
            self._drift.addmm_((original.float() - wide).T, wide, beta=1 - share, alpha=share / len(x))  # [in, in]

    def _draw(self, x: Tensor) -> None:
        """Let x [tokens, in] take part in the sample: all tokens seen so far have the same chance."""
        draws = torch.cat([self._draws, torch.rand(len(x), generator=self._random)])
        kept = draws.argsort(stable=True)[:SAMPLE].sort().values
        place, n = kept.to(x.device), len(self._sample)
        self._sample = torch.cat([self._sample[place[place < n]], x[place[place >= n] - n].float()])
        self._draws = draws[kept]

    def _strips(self) -> list[tuple[int, int]]:
        """First and last + 1 column of each strip of H."""
        n = len(self._amax)
        width = max(STRIP, -(-n // N_STRIPS))
        return [(start, min(start + width, n)) for start in range(0, n, width)]

    @property
    def has_hessian(self) -> bool:
        return self._mean_square is not None

    def hessian(self) -> Tensor:
        """Mean of x xᵀ, [in, in], not a copy; zeros where no token came."""
        assert self._mean_square is not None, "hessian() of statistics gathered without it"
        if not self._is_whole:
            for start, stop in self._strips():
                self._mean_square[start:stop, stop:] = self._mean_square[stop:, start:stop].T
            self._is_whole = True
        return self._mean_square

    def drift(self, note: Callable[[str], None]) -> Tensor | None:
        """Mean of (x° - x) xᵀ, [in, in]; None, and noted, where the two could not be paired token by token."""
        assert "drift" in self._needs, "drift() of statistics gathered without it"
        if self._drift is None:
            note("its inputs cannot be paired with the original's; their drift is not made up for")
        return self._drift

    def of_output(self, output_hessian: Tensor | None) -> "LayerStats":
        """The same statistics, not copied, for one of the linears that share the input: with its output_hessian [out, out]."""
        stats = copy.copy(self)
        stats._output_hessian = output_hessian
        return stats

    def output_hessian(self) -> Tensor | None:
        """Mean of g gᵀ, [out, out]; None for an output head, where it would be the vocabulary's size squared."""
        assert "output_hessian" in self._needs, "output_hessian() of statistics gathered without it"
        return self._output_hessian

    def amax(self) -> Tensor:
        """Largest magnitude per input channel, [in]."""
        assert "amax" in self._needs, "amax() of statistics gathered without it"
        return self._amax

    def mean_abs(self) -> Tensor:
        """Mean magnitude per input channel, [in]."""
        assert "mean_abs" in self._needs, "mean_abs() of statistics gathered without it"
        return self._sum_abs / max(self.n_tokens, 1)

    def inputs(self) -> list[Tensor]:
        """Every batch as it came, [samples, length, in] each."""
        assert "inputs" in self._needs, "inputs() of statistics gathered without them"
        return self._inputs

    def sample(self) -> Tensor:
        """Tokens of the input as they came, each with the same chance, [tokens, in], at most SAMPLE."""
        assert "sample" in self._needs, "sample() of statistics gathered without it"
        return self._sample


@torch.no_grad()
def observe_inputs(model: nn.Module, names: Sequence[str], windows: Tensor) -> dict[str, LayerStats]:
    """Hessians of the inputs of linears, by full name, of a whole model in memory that reads windows [samples, length].

    Linears that are called one after the other with one tensor share their statistics.
    """
    stats: dict[str, LayerStats] = {}
    device = next(model.parameters()).device
    latest: list[tuple[Tensor, LayerStats]] = []

    def look(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if latest and latest[0][0] is args[0]:
            stats.setdefault(name, latest[0][1])
            return
        found = stats.setdefault(name, LayerStats(shape_of(module)[1], ("hessian",), device))
        found.update(args[0])
        latest[:] = [(args[0], found)]

    layers = {name: model.get_submodule(name) for name in names}
    hooks = [layer.register_forward_pre_hook(partial(look, name)) for name, layer in layers.items()]
    for rows in windows.split(OBSERVED):
        model(rows.to(device), use_cache=False)
        latest.clear()
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        stats.setdefault(name, LayerStats(shape_of(layer)[1], ("hessian",), device))  # nothing came to it
    return stats
