"""Text that a model writes itself: windows begun with a few tokens of given text, continued by draws from its predictions.

    x_t ~ p(x_t | x_0 .. x_t-1)    t from BEGUN to length - 1
Why: what trains on few windows learns them by heart. The original's predictions are the labels, so any text serves that is
like what it reads, and its own draws are; no text beside the calibration's is needed.
Source: Liu et al. 2023, arXiv:2305.17888 (LLM-QAT), its data-free distillation. Differs: every token is drawn, none is taken
greedily, and windows begin with the calibration text's tokens instead of one random token.
"""

import contextlib

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qtool.model.sampling import continued, in_float32
from qtool.progress import Progress

BEGUN = 16  # tokens of the given text at a window's beginning
TOGETHER = 64  # windows written side by side


@torch.no_grad()
def write_windows(model: PreTrainedModel, tokens: Tensor, count: int, seed: int, progress: Progress) -> Tensor:
    """`count` windows [count, length] like tokens [samples, length], each begun at a random place of one of those."""
    with in_float32(model) if model.device.type == "cpu" else contextlib.nullcontext():
        return _write(model, tokens, count, seed, progress)


def _write(model: PreTrainedModel, tokens: Tensor, count: int, seed: int, progress: Progress) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    length = tokens.shape[1]
    begun = min(BEGUN, length)
    found: list[Tensor] = []
    for first in range(0, count, TOGETHER):
        n = min(TOGETHER, count - first)
        rows = torch.randint(len(tokens), (n,), generator=random)
        starts = torch.randint(length - begun + 1, (n, 1), generator=random) + torch.arange(begun)  # [windows, begun]
        found.append(continued(model, tokens[rows.unsqueeze(1), starts], length, 1.0, random))
        progress.advance(f"{first + n} of {count} windows written")
    return torch.cat(found)
