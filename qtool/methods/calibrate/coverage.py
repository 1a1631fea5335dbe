"""Coverage: few windows that stand for all kinds of a pool, by bins from its dense middle to its rim (dataset quantization).

    each bin S of n / K windows, one at a time:  argmax over x in R \\ S of  λ sum_v∈R s(x, v) - 2 sum_v∈S s(x, v)
    s(x, v) = cosine of the windows' embeddings    R: what no bin before it holds; after a bin, R loses it
    chosen: from each of the K bins as many at random, samples / K
    embedding: the mean over a window's tokens of the last block's output, made to length 1
Early bins lie in the middle of the pool, late ones at its rim; drawing evenly from all covers both.
Source: Zhou et al. 2023, arXiv:2308.10524 (Dataset Quantization), section 3. Differs: no patch is dropped, which is for images.
For: a pool of unknown kinds of text, of which few windows are to see as many as they can.
Costs: a pass of the model over the pool, and its square in similarities: some thousand windows.
"""

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.tokens import PoolOptions, check_length, read_pool
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class CoverageOptions(PoolOptions):
    """The pool and its bins."""

    candidates: int = Field(1024, ge=1, le=20_000, description="windows of the pool to choose from; memory is their square")
    bins: int = Field(10, ge=1, description="K: 1 draws from the whole pool at random")
    balance: float = Field(1.0, ge=0, description="λ: how much nearness to the rest counts against distance from the bin's own")

    @model_validator(mode="after")
    def _bins_fit(self) -> "CoverageOptions":
        if self.bins > min(self.samples, self.candidates):
            raise ValueError(f"bins is {self.bins}, must be no more than samples and candidates")
        return self


def coverage(model: ModelHandle, options: CoverageOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64, in the order of the pool."""
    pool = read_pool(options, model.tokenizer, seed)  # [candidates, length]
    E = F.normalize(model.final_hidden(pool).float().mean(1), dim=-1)  # [candidates, hidden]
    binned = bins_of(E @ E.T, options.bins, options.balance)
    return pool[draw_evenly(binned, options.samples, seed)]


def bins_of(similarity: Tensor, n_bins: int, balance: float) -> list[list[int]]:
    """Every index of similarity [n, n] in one of the bins, whose sizes differ by one at most."""
    n = len(similarity)
    left = torch.ones(n, dtype=torch.bool)  # R without the current bin
    bins: list[list[int]] = []
    for number in range(n_bins):
        to_rest = similarity @ left.to(similarity.dtype)  # [n], R as it was when the bin began
        to_own = torch.zeros(n, dtype=similarity.dtype)
        found: list[int] = []
        for _ in range(n * (number + 1) // n_bins - n * number // n_bins):
            gain = balance * to_rest - 2 * to_own  # [n]
            best = int(gain.masked_fill(~left, -torch.inf).argmax())
            found.append(best)
            left[best] = False
            to_own += similarity[best]
        bins.append(found)
    return bins


def draw_evenly(bins: list[list[int]], count: int, seed: int) -> Tensor:
    """`count` indices in rising order [count], as many of each bin; which bins give one more is chosen at random.

    A bin that holds fewer gives all, and the others make up for it.
    """
    random = torch.Generator().manual_seed(seed)
    shuffled = [[found[i] for i in torch.randperm(len(found), generator=random).tolist()] for found in bins]
    taken: list[int] = []
    while len(taken) < count:  # a round takes one of each bin
        order = [shuffled[i] for i in torch.randperm(len(shuffled), generator=random).tolist() if shuffled[i]]
        taken += [found.pop() for found in order[: count - len(taken)]]
    return torch.tensor(sorted(taken))


def check_windows(model: ModelHandle, options: CoverageOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, before any work."""
    check_length("calibrate/coverage", options, model.config.get_text_config())


METHOD = Method(run=coverage, options=CoverageOptions, scope="model", check=check_windows)
