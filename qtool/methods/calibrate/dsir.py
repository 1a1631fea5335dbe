"""DSIR: the windows of a large pool that look like a target text, resampled by how much likelier they are in it.

    log w(x) = sum over n-grams of x of (log p - log q) of their bucket      chosen: the k largest of log w + Gumbel noise
    p, q [buckets] shares of the target's and of the pool's n-grams: words and signs in lower case, one or two in a row,
    each hashed into one bucket; 1e-8 is added to both before the logarithm
k draws without replacement by weight: Gumbel noise -log(-log u) makes the k largest such a sample. Taking the k likeliest
without noise would lose the target's variety.
Source: Xie et al. 2023, arXiv:2302.03169 (Data Selection with Importance Resampling), section 4. Differs: what is chosen are
windows of equal length in tokens, because log w grows with length.
For: a pool of many kinds of text, where what the model will read is known from a small sample.
Costs: seconds a million words, on the CPU.
"""

import hashlib
import re
from functools import cache

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.tokens import (
    PoolOptions,
    TextOptions,
    TextSource,
    check_length,
    field_of,
    read_pool,
    read_rows,
    rendered,
)
from qtool.model.handle import ModelHandle
from qtool.registry import Method

SMOOTHING = 1e-8


class DsirOptions(PoolOptions):
    """The pool, the target, and how finely texts are told apart."""

    target: TextSource = Field(description="text that the chosen windows are to look like: {source: ..., field: ...}")
    buckets: int = Field(10_000, ge=2, description="buckets that n-grams are hashed into")


def dsir(model: ModelHandle, options: DsirOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64, in the order of the pool."""
    pool = read_pool(options, model.tokenizer, seed)  # [candidates, length]
    texts = [str(model.tokenizer.decode(window, skip_special_tokens=True)) for window in pool]
    stated = TextOptions.model_validate(options.target.model_dump())
    rows = field_of(read_rows(stated), stated.field, stated.source)
    target = [rendered(document, stated, model.tokenizer) for document in rows]
    weights = log_weights(texts, target, options.buckets)  # [candidates]
    return pool[gumbel_top_k(weights, options.samples, seed)]


def log_weights(texts: list[str], target: list[str], n_buckets: int) -> Tensor:
    """log w [texts], float64, with q counted on the texts themselves."""
    counted = [buckets_of(text, n_buckets) for text in texts]
    p = shares(torch.cat([buckets_of(text, n_buckets) for text in target]), n_buckets)  # [buckets]
    q = shares(torch.cat(counted), n_buckets)  # [buckets]
    gain = (p + SMOOTHING).log() - (q + SMOOTHING).log()  # [buckets]
    return torch.stack([gain[places].sum() for places in counted])


def shares(places: Tensor, n_buckets: int) -> Tensor:
    """The share of each bucket [buckets], float64, among places [n-grams]."""
    counts = torch.bincount(places, minlength=n_buckets).double()  # [buckets]
    return counts / counts.sum().clamp(min=1)


def buckets_of(text: str, n_buckets: int) -> Tensor:
    """The bucket of every n-gram of a text [n-grams] int64."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    grams = [*words, *(" ".join(pair) for pair in zip(words, words[1:], strict=False))]
    return torch.tensor([_bucket(gram, n_buckets) for gram in grams], dtype=torch.int64)


@cache
def _bucket(gram: str, n_buckets: int) -> int:
    """A hash that is the same in every process, which Python's own is not."""
    return int.from_bytes(hashlib.sha256(gram.encode()).digest()[:8], "big") % n_buckets


def gumbel_top_k(log_w: Tensor, k: int, seed: int) -> Tensor:
    """k indices in rising order, drawn without replacement in proportion to exp(log_w)."""
    random = torch.Generator().manual_seed(seed)
    u = torch.rand(len(log_w), dtype=torch.float64, generator=random).clamp(min=1e-300)
    return (log_w - (-u.log()).log()).topk(k).indices.sort().values  # [k]


def check_windows(model: ModelHandle, options: DsirOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, before any work."""
    check_length("calibrate/dsir", options, model.config.get_text_config())


METHOD = Method(run=dsir, options=DsirOptions, scope="model", check=check_windows)
