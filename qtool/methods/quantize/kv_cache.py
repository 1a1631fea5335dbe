"""Quantize the key/value cache: one scale for a block's keys and one for its values, found on the calibration text.

    s_k = max |k| / 448 (e4m3),  max |k| / 127.5 (int8)      k after its rotation; s_v likewise of the values
The scales are static: a token's key and value are rounded once, when it comes, and no step of decoding looks for a range.
Simulated in every forward (see layers/kv_cache.py): evaluation, generate() and methods after this one see rounded keys and
values. e4m3 keeps its relative accuracy however far a few channels of the keys stand out; int8 does not.
Source: the FP8 cache of vLLM and of compressed-tensors' kv_cache_scheme, https://docs.vllm.ai, "Quantized KV Cache".
For: half the memory of the cache, and so twice the tokens or users, with any weights; e4m3 is what vLLM serves.
Costs: two passes through the model, without gradients; nothing at run time where the runtime has an FP8 cache.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.kv_cache import CacheScales
from qtool.formats.scheme import CacheSelection
from qtool.registry import Method


class KvCacheOptions(CacheSelection):
    """The scales leave nothing else to choose."""


def kv_cache(k: Tensor, v: Tensor, dtype: torch.dtype, options: KvCacheOptions, note: Callable[[str], None]) -> CacheScales:
    """Scales in dtype for largest magnitudes k and v [kv heads, head_dim]; raises QtoolError where one is not finite."""
    scales = []
    for name, amax in (("keys", k), ("values", v)):
        if not torch.isfinite(amax).all():
            raise QtoolError(f"{name} hold NaN or infinity; check the model's weights and load it with dtype: float32")
        largest = amax.max().view(1)
        if float(largest) == 0:
            note(f"all {name} are zero; they get a scale of 1")
        scale = options.scheme.grid.fit_range(-largest, largest).scale.to(dtype)  # [1]
        scales.append(scale.clamp_min(torch.finfo(dtype).tiny))
    return CacheScales(options.scheme, *scales)


METHOD = Method(run=kv_cache, options=KvCacheOptions, scope="cache")
