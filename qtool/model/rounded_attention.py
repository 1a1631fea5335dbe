"""Attention that rounds, in a transformers model: a KIVI cache that generate() fills, queries and probabilities.

An attention with a KIVI cache takes its keys and values from a `KiviCache`: one of its own for each window where no cache is
given, and otherwise the layer that it puts into the given cache in place of the empty dynamic one. So whatever makes a
DynamicCache, generate() among it, holds packed codes:
    cache = model.generate(tokens, return_dict_in_generate=True).past_key_values;  sum(layer.nbytes for layer in cache.layers)
The attention itself is a function registered with transformers' AttentionInterface, instead of `sdpa`, for these modules alone.
It hands on to `sdpa` where all queries see the same entries, as in every step of decoding, and probabilities are not rounded.
Why a layer and not another Cache: generate() and models make the cache, in many places, and nothing has to be patched.
"""

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme
from qtool.layers.kivi_cache import KiviCache, View, attend
from qtool.layers.kv_cache import stand_in

ATTENTION = "qtool"  # the function's name with transformers
STATE = "qtool_state"  # attribute of an attention
INSTEAD = "leave the step away, or use quantize/kv_cache, which serves every attention with a cache"


@dataclass
class AttentionState:
    """What an attention rounds, and between the cache's update and the function what its queries see."""

    kivi: KiviScheme | None = None
    rounding: AttentionRounding | None = None
    view: View | None = None


class KiviLayer(CacheLayerMixin):
    """One layer of a transformers Cache, as codes."""

    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, scheme: KiviScheme, window: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = KiviCache(scheme, window)
        self.is_sliding = window is not None

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.cache.nbytes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the last of the new queries sees."""
        view = self.extend(key_states, value_states)
        return view.k.late, view.v.late

    def extend(self, k: Tensor, v: Tensor) -> View:
        """What each of the new queries sees."""
        self.lazy_initialization(k, v)
        return self.cache.extend(k, v)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.length - self.cache.offset + query_length, self.cache.offset

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_max_length(self) -> int:
        return -1 if self.cache.window is None else self.cache.window

    def reset(self) -> None:
        self.cache.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.choose_samples(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.choose_samples(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.choose_samples(lambda part: part[indices])

    def crop(self, tokens_to_remove: int) -> None:
        raise QtoolError("a quantized cache cannot take tokens back; leave assistant_model and prompt_lookup_num_tokens away")

    def offload(self) -> None:
        raise QtoolError("a quantized cache cannot be offloaded; leave cache_implementation away")


class KiviPassage:
    """Stands in for a cache, or for none, for one call of an attention."""

    def __init__(self, attention: nn.Module, cache: Any, scheme: KiviScheme) -> None:
        self._attention = attention
        self._cache = cache
        self._scheme = scheme

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new keys and values; leaves what each query sees for the attention, and returns what the last one sees."""
        with torch.autocast(k.device.type, enabled=False):  # training's would rotate keys in bfloat16
            if self._cache is None:
                view = KiviCache(self._scheme).extend(k, v, keep=False)
            else:
                view = _layer_in(self._cache, layer_idx, self._scheme).extend(k, v)
        state_of(self._attention).view = view
        return view.k.late, view.v.late

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def quantize_by_kivi(attention: nn.Module, scheme: KiviScheme) -> RemovableHandle:
    """Let an attention keep its keys and values by the scheme; raises QtoolError where it cannot."""
    if getattr(attention, STATE, AttentionState()).kivi is not None:
        raise QtoolError(f"{type(attention).__name__}: its cache is quantized already; quantize it once")
    state_of(attention).kivi = scheme
    return stand_in(attention, lambda module, cache: KiviPassage(module, cache, scheme))


@contextmanager
def rounded_by_kivi(attentions: Iterable[nn.Module], scheme: KiviScheme) -> Iterator[None]:
    """For a while, let attentions round their keys and values by the scheme; raises QtoolError where one cannot."""
    with ExitStack() as stack:
        for attention in attentions:
            stack.callback(quantize_by_kivi(attention, scheme).remove)
            stack.callback(setattr, state_of(attention), "kivi", None)
        yield


def keeps_codes(model: nn.Module) -> bool:
    """Whether an attention of a model keeps its keys and values as codes."""
    return any(getattr(module, STATE, AttentionState()).kivi is not None for module in model.modules())


def round_attention(attention: nn.Module, rounding: AttentionRounding) -> None:
    """Let an attention round its queries and probabilities; raises QtoolError where it cannot."""
    state_of(attention).rounding = rounding


def state_of(attention: nn.Module) -> AttentionState:
    """The state of an attention, which from now on goes through `attention_function`; raises QtoolError where it cannot."""
    if (found := getattr(attention, STATE, None)) is None:
        if not _has_interface(attention):  # what it runs as is checked before any work, and may be eager while it is inspected
            raise QtoolError(f"{type(attention).__name__}: {misfit(attention)}")
        AttentionInterface.register(ATTENTION, attention_function)
        config = copy.copy(cast(Any, attention).config)  # the other modules and the model's masks keep theirs
        config._attn_implementation_internal = ATTENTION  # the property would tell the parts that the copy shares
        cast(Any, attention).config = config
        found = AttentionState()
        setattr(attention, STATE, found)
    return cast(AttentionState, found)


def misfit(attention: nn.Module) -> str | None:
    """Why an attention cannot go through `attention_function`, and what to do; None where it can."""
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    if not _has_interface(attention):
        return f"its attention does not go through transformers' AttentionInterface; {INSTEAD}"
    if implementation not in ("sdpa", ATTENTION):
        return f"its attention runs as {implementation}, must run as sdpa; {INSTEAD}"
    return None


def _has_interface(attention: nn.Module) -> bool:
    """Whether its forward asks transformers for the function that attends."""
    return "ALL_ATTENTION_FUNCTIONS" in inspect.unwrap(type(attention).forward).__code__.co_names


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function of the AttentionInterface; query [batch, heads, queries, head_dim], key and value as the cache gave them."""
    state = state_of(module)
    view, state.view = state.view, None
    rounding = state.rounding
    if state.kivi is None:
        view = View.plain(key, value, query.shape[2])
    elif view is None or key is not view.k.late or value is not view.v.late:
        raise QtoolError(
            f"{type(module).__name__}: it does not read the keys and values that it cached as they are, so that quantize/kivi "
            f"does not know what its queries see; {INSTEAD}"
        )
    if rounding is not None:
        query = rounding.round_queries(query)
    if view.is_settled and (rounding is None or rounding.probabilities is None):
        found: tuple[Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return found
    for name in ("softcap", "position_bias", "s_aux"):
        if kwargs.get(name) is not None:
            raise QtoolError(f"{type(module).__name__}: attention with {name} cannot be rounded; {INSTEAD}")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):  # attend says itself what it computes in
        return attend(query, view, attention_mask, scaling, dropout, rounding), None


def _layer_in(cache: Any, index: int, scheme: KiviScheme) -> KiviLayer:
    """The cache's layer of an attention, put there in place of an empty dynamic one."""
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if isinstance(layer, KiviLayer):
        return layer
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or layer.get_seq_length() or cache.offloading:
        how = "offloaded" if cache.offloading else "already filled" if layer.get_seq_length() else f"of {type(layer).__name__}"
        raise QtoolError(
            f"the model's cache is quantized, and the cache given to it is {how}; leave cache_implementation away, and give "
            "a new DynamicCache or none"
        )
    cache.layers[index] = KiviLayer(scheme, getattr(layer, "sliding_window", None))
    return cast(KiviLayer, cache.layers[index])
