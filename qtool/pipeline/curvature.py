"""What a change of each linear's output costs the predictions, kept on disk while a step needs it.

    Hₒ = mean over tokens of g gᵀ  [out, out],   g [out] = gradient of log p(y) by the linear's output, y drawn from the model
so that  KL(p ‖ p_changed) = ½ mean of δᵀ Hₒ δ  for changes δ of the output that do not know the token.
Of the model as it was before the step, over the first `gradient_tokens` tokens. One file a block, the last block's first:
where the first block's stands, all do, and a killed run goes on; otherwise the pass is made again.
Source: Tseng, Sun, De Sa 2025, arXiv:2505.22988 (YAQA); Martens and Grosse 2015, arXiv:1503.05671, section 3 (gradients taken
as independent of the inputs).
"""

import contextlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of
from qtool.model.store import load_changes, save_changes
from qtool.options import Curvature
from qtool.pipeline.backward import Take, go_back
from qtool.pipeline.folder import StepFolder
from qtool.progress import Progress


def gather_curvature(
    model: ModelHandle, options: Curvature, tokens: Tensor, seed: int, folder: StepFolder, progress: Progress
) -> None:
    """Write Hₒ of every chosen linear in the blocks; does nothing where a killed run has written all.

    Memory: one block with its gradients, and what every block is fed of these windows.
    """
    if stored(folder, 0).is_file():
        for _ in range(model.n_blocks + 1):
            progress.advance()
        return
    n_windows = max(1, options.gradient_tokens // tokens.shape[1])
    hidden = [model.embed(tokens[:n_windows])]  # [samples, length, hidden] before each block, at last after all
    for block in model.blocks():
        hidden.append(block.forward(hidden[-1]))
    go_back(model, hidden, seed, partial(watch, options=options, folder=folder), progress)


@contextlib.contextmanager
def watch(block: Block, options: Curvature, folder: StepFolder) -> Iterator[Take]:
    """Sum g gᵀ of a block's chosen linears while gradients go through it, then write the means."""
    linears = {} if block.index < 0 else {name: x for name, x in block.linears().items() if not options.is_ignored(name)}
    means = {name: Mean(linear) for name, linear in linears.items()}
    yield lambda output, x, upstream: torch.autograd.grad(output, x, upstream)[0]
    for mean in means.values():
        mean.hook.remove()
    if block.index >= 0:
        save_changes(stored(folder, block.index), {name: mean.value for name, mean in means.items()})


class Mean:
    """The mean of g gᵀ [out, out] over all tokens that reach a linear while its hook is in place."""

    def __init__(self, linear: nn.Module) -> None:
        self.n_tokens = 0
        n_out = shape_of(linear)[0]
        self.value = torch.zeros(n_out, n_out, device=next(linear.parameters()).device)
        self.hook = linear.register_forward_hook(self._follow)

    def _follow(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(self._take)

    def _take(self, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2).float()  # [tokens, out]
        self.n_tokens += len(g)
        if len(g):
            self.value.addmm_(g.T, g, beta=1 - len(g) / self.n_tokens, alpha=1 / self.n_tokens)


def curvature_of(folder: StepFolder, block: Block) -> dict[str, Tensor]:
    """Hₒ [out, out] by name of the block's linears, on its device."""
    found = load_changes(stored(folder, block.index))
    return {name: value.to(block.device) for name, value in found.items() if isinstance(value, Tensor)}


def discard_curvature(folder: StepFolder) -> None:
    for path in folder.path.glob("curvature_*.safetensors"):
        path.unlink()


def stored(folder: StepFolder, index: int) -> Path:
    return folder.path / f"curvature_{index:03d}.safetensors"
