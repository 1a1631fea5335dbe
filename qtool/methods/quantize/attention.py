"""Attention in few bits: queries after their rotation, and probabilities, each token rounded by its own range.

    q^ = s Q(q / s)    s of the range of one head's query          S = q^ k^T / sqrt(head_dim)
    A^ = s round(A / s)    s = max A / (2^b - 1) of its row        A = softmax(S + mask),  o = A^ v
        q [batch, heads, tokens, head_dim]    A [batch, heads, tokens, tokens]    s one number a head and token
Nothing is read off a text: ranges are found at run time. Probabilities have no sign, so whole numbers start at 0; what a mask
hides stays at 0, and a probability of 1 at 1; e4m3 and e5m2 round as of queries. Keys and values are the cache's, which
quantize/kv_cache and quantize/kivi round. Every forward rounds: evaluation, generate(), methods after this one, qtool.load.
Source: Yao et al. 2022, arXiv:2206.01861 (ZeroQuant), section 4.1, its ranges of each token found at run time. Differs: serves
attention's own products, whose rounded numbers are multiplied in float32.
For: seeing what int8 or FP8 attention would lose beside w8a8 and a cache of 8 bits; queries bear it well, probabilities less.
Costs: nothing before; with probabilities no fused kernel runs, so that the scores of 256 queries are in memory at a time.
"""

from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.model.handle import ModelHandle
from qtool.model.rounded_attention import misfit
from qtool.registry import Method


class AttentionOptions(AttentionRounding):
    """What is rounded, and to what."""


def attention(q: Tensor, A: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """Queries [batch, heads, tokens, head_dim] and probabilities [batch, heads, tokens, tokens] as products read them."""
    return options.round_queries(q), options.round_probabilities(A)


def check_attentions(model: ModelHandle, options: AttentionOptions) -> None:
    """Raise QtoolError where an attention cannot be told to round, or rounds already."""
    if not (names := model.attention_names()):
        raise QtoolError(f"quantize/attention: {type(model.model).__name__} has no attention that takes a cache")
    for name in names:
        if (reason := misfit(model.model.get_submodule(name))) is not None:
            raise QtoolError(f"quantize/attention: {name}: {reason}")
    if (rounding := model.rounding()) is not None:
        raise QtoolError(f"quantize/attention: the model's attention has {rounding} already; leave the step away")


METHOD = Method(run=attention, options=AttentionOptions, scope="attention", check=check_attentions)
