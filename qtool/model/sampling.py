"""Text that a model writes itself: windows begun with given tokens, continued token by token.

    x_t ~ softmax(logits_t / T)    t from the given tokens' end to length - 1; T = 0 takes the likeliest
Source: Ackley, Hinton, Sejnowski 1985, Cognitive Science 9, 147 (temperature).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from qtool.errors import QtoolError
from qtool.model.rounded_attention import KiviLayer


def check_room(config: PretrainedConfig, length: int, tokens: int, where: str) -> None:
    """Raise QtoolError where prompts of `length` and what is written after them are longer than the model takes."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and length + tokens > limit:
        raise QtoolError(
            f"{where}: length {length} and {tokens} written tokens are more than the model's {limit} positions; "
            "lower one of them"
        )


def continued(model: PreTrainedModel, begun: Tensor, length: int, temperature: float, random: torch.Generator) -> Tensor:
    """Windows [windows, length], begun with tokens [windows, begun], each token drawn by itself from what stands before it."""
    return continued_with_cache(model, begun, length, temperature, random)[0]


@torch.no_grad()
def continued_with_cache(
    model: PreTrainedModel, begun: Tensor, length: int, temperature: float, random: torch.Generator
) -> tuple[Tensor, Any]:
    """As `continued`, and the cache that the model made, as generate() would have it after all tokens but the last."""
    written, piece, past = begun, begun, None
    while written.shape[1] < length:
        out = model(piece.to(model.device), past_key_values=past, use_cache=True)
        past = out.past_key_values
        logits = out.logits[:, -1].float().cpu()  # [windows, vocab]
        if temperature == 0:
            piece = logits.argmax(-1, keepdim=True)  # [windows, 1]
        else:
            piece = torch.multinomial((logits / temperature).softmax(-1), 1, generator=random)  # [windows, 1]
        written = torch.cat([written, piece], dim=1)
    return written, past


def cache_bytes(cache: Any) -> int:
    """What a transformers Cache holds in memory: packed codes with their scales, or keys and values, or states."""

    def held(layer: Any) -> int:
        tensors = (one for one in vars(layer).values() if torch.is_tensor(one))
        return layer.nbytes if isinstance(layer, KiviLayer) else sum(one.nbytes for one in tensors)

    return sum(map(held, cache.layers))


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
