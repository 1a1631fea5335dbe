"""Text that a model writes itself: windows begun with a few tokens of given text, continued by draws from its predictions.

    x_t ~ p(x_t | x_0 .. x_t-1)    t from BEGUN to length - 1
Why: what trains on few windows learns them by heart. The original's predictions are the labels, so any text serves that is
like what it reads, and its own draws are; no text beside the calibration's is needed.
Source: Liu et al. 2023, arXiv:2305.17888 (LLM-QAT), its data-free distillation. Differs: every token is drawn, none is taken
greedily, and windows begin with the calibration text's tokens instead of one random token.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtool.progress import Progress

BEGUN = 16  # tokens of the given text at a window's beginning
TOGETHER = 64  # windows written side by side


@torch.no_grad()
def write_windows(model: PreTrainedModel, tokens: Tensor, count: int, seed: int, progress: Progress) -> Tensor:
    """`count` windows [count, length] like tokens [samples, length], each begun at a random place of one of those."""
    with in_float32(model) if model.device.type == "cpu" else contextlib.nullcontext():
        return _write(model, tokens, count, seed, progress)


@contextlib.contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the parameters are float32, and afterwards what they were: twice as fast on CPUs for a token at a time."""
    dtypes = [p.dtype for p in model.parameters()]
    for p in model.parameters():
        p.data = p.data.float()
    try:
        yield
    finally:
        for p, dtype in zip(model.parameters(), dtypes, strict=True):
            p.data = p.data.to(dtype)


def _write(model: PreTrainedModel, tokens: Tensor, count: int, seed: int, progress: Progress) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    length = tokens.shape[1]
    begun = min(BEGUN, length)
    found: list[Tensor] = []
    for first in range(0, count, TOGETHER):
        n = min(TOGETHER, count - first)
        rows = torch.randint(len(tokens), (n,), generator=random)
        starts = torch.randint(length - begun + 1, (n, 1), generator=random) + torch.arange(begun)  # [windows, begun]
        written = tokens[rows.unsqueeze(1), starts]  # [windows, begun]
        piece, past = written, None
        while written.shape[1] < length:
            out = model(piece.to(model.device), past_key_values=past, use_cache=True)
            past = out.past_key_values
            p = out.logits[:, -1].float().softmax(-1).cpu()  # [windows, vocab]
            piece = torch.multinomial(p, 1, generator=random)  # [windows, 1]
            written = torch.cat([written, piece], dim=1)
        found.append(written)
        progress.advance(f"{first + n} of {count} windows written")
    return torch.cat(found)
