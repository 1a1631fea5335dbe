"""Preservation set: windows that a compression must not harm, by gradient saliency, low margin and clusters, in equal parts.

    saliency(x) = mean over the blocks' linears' weights w of |w ∂L(x)/∂w|       how much the loss hangs on them; largest first
    margin(x)   = mean over tokens of p_1 - p_2, the two likeliest's probabilities     how unsure the model is; smallest first
    diversity   : k-means over the windows' embeddings; from each cluster in turn the window nearest to its centre
    chosen: the three take turns, each with the first of its order that none has taken
    L(x) the window's loss, nats a token    embedding: the mean over its tokens of the last block's output, made to length 1
They count as calibration text with `preserved: n` of `samples`, the others drawn from the pool; `source: preservation` in an
evaluate step measures on them alone, and a gate there is the guard.
Source: Zbeeb et al. 2025, arXiv:2505.00350 (Safety-Guided Self Compression), its preservation sets. Differs: the paper's first
part is Grad-CAM's sum over an image; |w ∂L/∂w|, what zeroing w costs to first order, is our reading for text. Equal parts are
ours too: the paper's code lets Grad-CAM fill half. No embedding is projected before k-means.
For: what must not get worse while the average stays: the windows that lean most on the weights, the unsure, one of each kind.
Costs: the whole model in memory with gradients, a forward and a backward pass over the pool.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.tokens import PreservationPool, check_length, read_pool
from qtool.errors import QtoolError
from qtool.linalg.k_means import k_means, squared_distances
from qtool.model.handle import ModelHandle
from qtool.model.linear import is_linear
from qtool.model.sampling import in_float32
from qtool.registry import Method


class PreservationOptions(PreservationPool):
    """The pool, the set, and how finely kinds of text are told apart."""

    candidates: int = Field(512, ge=1, le=20_000, description="windows of the pool to choose from; each costs a backward pass")
    clusters: int = Field(10, ge=1, description="clusters of k-means; 1 takes the windows nearest to the middle of the pool")

    @model_validator(mode="after")
    def _clusters_fit(self) -> "PreservationOptions":
        if self.clusters > min(self.samples, self.candidates):
            raise ValueError(f"clusters is {self.clusters}, must be no more than samples and candidates")
        return self


def preservation(model: ModelHandle, options: PreservationOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64: the set in the order of the pool, at options.places(), and between it the others."""
    pool = read_pool(options, model.tokenizer, seed)  # [candidates, length]
    saliency, margin = saliency_and_margin(model, pool)
    E = F.normalize(model.final_hidden(pool).float().mean(1), dim=-1)  # [candidates, hidden]
    orders = [saliency.argsort(descending=True, stable=True).tolist(), margin.argsort(stable=True).tolist()]
    chosen = take_turns([*orders, diverse_order(E, options.clusters, seed)], options.n_preserved)
    rest = torch.tensor([index for index in range(len(pool)) if index not in chosen], dtype=torch.int64)
    drawn = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: options.samples - len(chosen)]
    is_preserved = torch.zeros(options.samples, dtype=torch.bool)
    is_preserved[options.places()] = True
    tokens = torch.empty(options.samples, options.length, dtype=torch.int64)
    tokens[is_preserved] = pool[sorted(chosen)]
    tokens[~is_preserved] = pool[rest[drawn]]
    return tokens


def saliency_and_margin(model: ModelHandle, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Of each window of pool [candidates, length], float64, both."""
    found = torch.zeros(2, len(pool), dtype=torch.float64)
    with contextlib.ExitStack() as stack:
        module = stack.enter_context(model.materialized())
        if model.device.type == "cpu":
            stack.enter_context(in_float32(module))
        of_blocks = module.get_submodule(model.blocks_name).modules()
        weights = [linear.get_parameter("weight") for linear in of_blocks if is_linear(linear)]
        stack.enter_context(learning(weights))
        for index, window in enumerate(pool.to(model.device).split(1)):
            with torch.enable_grad():
                logits = module(window, use_cache=False).logits[0, :-1].float()  # [length - 1, vocab]
                loss = F.cross_entropy(logits, window[0, 1:])
                gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # None: of an expert that no token came to
            found[0, index] = mean_pull(weights, gradients)
            likeliest = logits.detach().softmax(-1).topk(2).values  # [length - 1, 2]
            found[1, index] = (likeliest[:, 0] - likeliest[:, 1]).double().mean()
    return found[0], found[1]


@torch.no_grad()
def mean_pull(weights: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> float:
    """Mean over all weights of |w ∂L/∂w|; a gradient that is None is zero."""
    pulls = [float((w * g).abs().sum(dtype=torch.float64)) for w, g in zip(weights, gradients, strict=True) if g is not None]
    return sum(pulls) / sum(w.numel() for w in weights)


@contextlib.contextmanager
def learning(weights: Sequence[Tensor]) -> Iterator[None]:
    """Inside, gradients reach the weights."""
    for w in weights:
        w.requires_grad_(True)
    try:
        yield
    finally:
        for w in weights:
            w.requires_grad_(False)


def diverse_order(points: Tensor, n_clusters: int, seed: int) -> list[int]:
    """Every index of points [n, features]: of each cluster in turn the next nearest to its centre."""
    cluster, centres = k_means(points, n_clusters, seed)
    gaps = squared_distances(points, centres)  # [n, clusters]
    members = [(cluster == k).nonzero().flatten() for k in range(n_clusters)]
    return take_turns([of[gaps[of, k].argsort(stable=True)].tolist() for k, of in enumerate(members)], len(points))


def take_turns(orders: Sequence[Sequence[int]], count: int) -> list[int]:
    """`count` different indices: each order in turn gives the first of its own that is not yet taken; an empty one passes."""
    left = [list(reversed(order)) for order in orders]
    taken = dict[int, None]()
    while len(taken) < count and any(left):
        for order in left:
            while order and order[-1] in taken:
                order.pop()
            if order and len(taken) < count:
                taken[order.pop()] = None
    return list(taken)


def check_windows(model: ModelHandle, options: PreservationOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or one without weights to learn from, before any work."""
    check_length("calibrate/preservation", options, model.config.get_text_config())
    if model.schemes():
        raise QtoolError("calibrate/preservation: the model comes quantized; choose with the model that it was made from")


METHOD = Method(run=preservation, options=PreservationOptions, scope="model", check=check_windows)
