"""A quantized cache, simulated: an attention whose keys and values are rounded on their way into whatever keeps them.

transformers' attentions hand new keys, rotated, and values to `past_key_values.update` and go on with what it returns. Here a
`Passage` stands in that place: it rounds both and hands them on to the cache that was given, or back where none was. So a whole
window, a prefill and a step of generate() see the same rounded entries, whatever kind of cache generate() chose.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qtool.formats.kv_cache import CacheScales

ARGUMENTS = ("past_key_values", "layer_past")  # what attentions call the cache
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # of keys and values [batch, kv heads, tokens, head_dim]


class Passage:
    """Stands in for a cache, or for none, for one call of an attention."""

    def __init__(self, cache: Any, change: Change) -> None:
        self._cache = cache
        self._change = change

    def update(self, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the cache gives back for the changed keys and values."""
        k, v = self._change(k, v)
        if self._cache is None:
            return k, v
        found: tuple[Tensor, Tensor] = self._cache.update(k, v, *args, **kwargs)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def attentions_of(block: nn.Module) -> dict[str, nn.Module]:
    """The modules inside a block that put keys and values into a cache, by name; those that hand it on do not count."""
    takers = {name: module for name, module in block.named_modules() if name and _argument_of(module) is not None}
    return {name: module for name, module in takers.items() if not any(other.startswith(f"{name}.") for other in takers)}


def pass_through(attention: nn.Module, change: Change) -> RemovableHandle:
    """Let every new key and value of an attention go through `change` first, until the handle is removed."""
    return stand_in(attention, lambda module, cache: Passage(cache, change))


def stand_in(attention: nn.Module, make: Callable[[nn.Module, Any], object]) -> RemovableHandle:
    """Hand an attention make(attention, cache) where it is given a cache, or None, until the handle is removed."""
    argument = _argument_of(attention)
    assert argument is not None, "attentions_of finds what takes a cache"

    def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {argument: make(module, kwargs.get(argument))}

    return attention.register_forward_pre_hook(replace, with_kwargs=True)


def quantize_cache(attention: nn.Module, scales: CacheScales) -> None:
    """Let an attention round what it caches; its scales become buffers of it, k_scale and v_scale [1]."""
    attention.register_buffer("k_scale", scales.k_scale)
    attention.register_buffer("v_scale", scales.v_scale)

    def round_both(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        now = CacheScales(scales.scheme, attention.get_buffer("k_scale"), attention.get_buffer("v_scale"))
        return now.round_keys(k), now.round_values(v)

    pass_through(attention, round_both)


class CacheObserver:
    """Largest magnitude of every channel of keys and values [kv heads, head_dim], float32."""

    def __init__(self) -> None:
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def see(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Take them into account, and hand them on as they are."""
        self.k, self.v = _largest(self.k, k), _largest(self.v, v)
        return k, v


def _largest(before: Tensor | None, x: Tensor) -> Tensor:
    now = x.detach().float().abs().amax((0, 2))  # [kv heads, head_dim]
    return now if before is None else torch.maximum(before, now)


def _argument_of(module: nn.Module) -> str | None:
    names = inspect.signature(module.forward).parameters
    return next((name for name in ARGUMENTS if name in names), None)
