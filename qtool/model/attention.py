"""Attention weights of one block, from an eager forward of that block alone.

Other forwards never hold them: the fused kernels return outputs only. Of a copy of one block in memory the implementation
is set to `eager`, which returns its weights beside its output in every family that follows transformers' interface; masks
are those that the model itself makes for `eager`, recorded once.
A block that gives none (state spaces, linear attention, KIVI's cache, code of a model's own), or whose eager output is not
what the block computes otherwise, is told apart: then there are no attention weights, and the reason is said.
Memory: one window's weights, heads · length² numbers a block.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qtool.model.handle import Block, ModelHandle
from qtool.model.rounded_attention import ATTENTION

TOLERANCE = 0.05  # of what the block adds to its input, relative; sums of bfloat16 in another order differ by a tenth of it


class EagerAttention:
    """Knows how the model calls its blocks on windows of one length, `batch` at a time, where attention is eager."""

    def __init__(self, model: ModelHandle, length: int, batch: int = 1) -> None:
        before, model.calls = model.calls, {}
        try:
            with eager(model.model):
                model.record_calls((batch, length))
            self._calls = model.calls[batch, length]
        finally:
            model.calls = before

    def forward(self, block: Block, windows: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The block's output for windows [batch, length, hidden], and what could be weights of each attention.

        Both on the block's device, weights [batch, heads, length, length]; gradients reach both.
        """
        found: list[Tensor] = []  # [batch, heads, length, length] each
        length = windows.shape[1]

        def keep(module: nn.Module, args: object, out: object) -> None:
            for value in out if isinstance(out, tuple) else ():
                is_new = isinstance(value, Tensor) and not any(value is one for one in found)  # wrappers pass it on
                if is_new and value.ndim == 4 and value.shape[-2:] == (length, length):
                    found.append(value)

        hooks = [module.register_forward_hook(keep) for module in block.module.modules() if module is not block.module]
        args, kwargs = self._calls[block.index]
        try:
            with eager(block.module):
                out = block.module(windows.to(block.device), *args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return (out[0] if isinstance(out, tuple) else out), found

    @torch.no_grad()
    def weights(self, block: Block, window: Tensor) -> list[Tensor] | str:
        """Weights [heads, length, length] of each attention, for a window; or why the block gives none.

        window [1, length, hidden]; where `batch` is more, the first of as many.
        """
        out, found = self.forward(block, window)
        if not found or not all(is_distribution(A) for A in found):
            return "its forward returns no attention weights, even where attention is eager"
        x = window.to(block.device)
        expected = block.call(x)
        change = float((out - expected).float().norm() / (expected - x).float().norm().clamp(min=1e-30))
        if not change <= TOLERANCE:
            return f"its eager attention gives another output (relative change {change:.1e}), so these are not its weights"
        return [A[0] for A in found]


def is_distribution(A: Tensor) -> bool:
    """Whether A [..., keys] could be attention: nothing negative, and no query gives away more than it has."""
    return bool((A >= 0).all() and (A.sum(-1, dtype=torch.float32) <= 1 + TOLERANCE).all())


@contextlib.contextmanager
def eager(root: nn.Module) -> Iterator[None]:
    """Inside, attention of all modules under root is eager."""
    configs: dict[int, Any] = {}
    for module in root.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) not in (None, ATTENTION):  # KIVI's has no eager form
            configs[id(config)] = config
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
