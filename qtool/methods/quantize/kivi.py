"""KIVI: keep the key/value cache in two to eight bits, keys by channels and values by tokens, late tokens as they are.

    x^ = s q + z    q = round((x - z) / s)    z = min x,  s = (max x - min x) / (2^b - 1) over a group
    groups: of keys, after their rotation, `group` tokens of one channel; of values, `group` channels of one token
    rounded of T tokens:  values  sinks .. T - residual - 1;  keys the whole groups among these
        k, v [batch, kv heads, tokens, head_dim]    q [..., group] in 0 .. 2^b - 1    s, z [..., 1] float16
keys: per_token groups keys as values are. rotate: hadamard rounds k H for k, H [head_dim, head_dim] orthonormal; q k^T is q H
times (k H)^T, so that here queries stay as they are, and what comes out of the cache is turned back instead.
Nothing is read off a text: each group finds its range when it is rounded. A query that is the T-th token sees the cache of T
tokens, whether they came one by one, as a prompt, or as a window without any cache (see layers/kivi_cache.py), so that
evaluation, generate() and steps after this one all see what decoding sees. generate() of qtool.load keeps packed codes.
Source: Liu et al. 2024, arXiv:2402.02750, Algorithm 1; rotate: Ashkboos et al. 2024, arXiv:2404.00456 (QuaRot), section 4.
Differs: KIVI rounds keys once `residual` have gathered, here a group goes as soon as `residual` newer tokens are there, and a
prompt's own queries see the rounded cache too. Sinks as in KVQuant, arXiv:2401.18079. Tokens are counted as they lie in the
cache: padding on the left takes the place of sinks and shares the first groups of keys.
For: long texts and many users where the cache is what fills the memory; two bits take a fifth of it. For vLLM use kv_cache.
Costs: nothing before; at run time codes are decoded for each token, and a prompt's scores are computed twice, without kernels.
"""

from torch import Tensor

from qtool.formats.kivi import KiviScheme
from qtool.layers.kivi_cache import KiviCache
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class KiviOptions(KiviScheme):
    """How the cache is kept."""


def kivi(k: Tensor, v: Tensor, options: KiviOptions) -> tuple[Tensor, Tensor]:
    """Keys and values [batch, kv heads, tokens, head_dim] as the cache gives them back once it holds them all."""
    view = KiviCache(options).extend(k, v)
    return view.k.late, view.v.late


def check(model: ModelHandle, options: KiviOptions) -> None:
    """Raise QtoolError where an attention cannot read such a cache, or its heads do not divide into groups."""
    model.check_kivi(options, "quantize/kivi")


METHOD = Method(run=kivi, options=KiviOptions, scope="packed_cache", check=check)
