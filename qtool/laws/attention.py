"""Laws of the methods that round between an attention's linears."""

import torch
from torch import Tensor

from qtool.laws.model import sample_options
from qtool.registry import Method


def samples() -> tuple[Tensor, Tensor]:
    """Queries [2, heads 4, tokens 24, head_dim 16], one channel far out, and causal probabilities [2, heads 4, 24, 24]."""
    q, k = torch.randn(2, 2, 4, 24, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    q[..., 3] *= 20
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
    return q, (q @ k.mT / 16).masked_fill(hidden, float("-inf")).softmax(-1)


def rounded(method: Method, q: Tensor, A: Tensor, **stated: object) -> tuple[Tensor, Tensor]:
    """What the method makes of queries and probabilities."""
    found: tuple[Tensor, Tensor] = method.run(q, A, sample_options(method, **stated))
    return found


def what_is_not_stated_stays(method: Method) -> None:
    """Queries alone are rounded where only they are to be, and probabilities likewise; the others stay to the bit."""
    q, A = samples()
    for stated, is_q, is_A in (({"queries": "int8"}, False, True), ({"probabilities": "int8"}, True, False)):
        new_q, new_A = rounded(method, q, A, **stated)
        assert torch.equal(new_q, q) == is_q and torch.equal(new_A, A) == is_A, f"{stated}: others are rounded, or nothing"


def tokens_are_rounded_one_by_one(method: Method) -> None:
    """Few tokens in another order come back as they do among all, to the bit: none sees another's range."""
    q, A = samples()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))[:9]
    both = {"queries": "int8", "probabilities": "int8"}
    for one, other in zip(rounded(method, q, A, **both), rounded(method, q[:, :, order], A[:, :, order], **both), strict=True):
        assert torch.equal(one[:, :, order], other), "a token is rounded by others' range"


def what_is_not_seen_stays_unseen(method: Method) -> None:
    """Probabilities of 0 stay 0, and none falls below."""
    q, A = samples()
    for word in ("int4", "int8", "e4m3"):
        found = rounded(method, q, A, probabilities=word)[1]
        assert bool((found >= 0).all()) and bool((found[A == 0] == 0).all()), f"{word}: a token that is not seen gets a share"


def more_bits_of_attention_lose_less(method: Method) -> None:
    """The error of queries and of probabilities falls with their bits."""
    q, A = samples()
    for name, place, x in (("queries", 0, q), ("probabilities", 1, A)):
        lost = [float((rounded(method, q, A, **{name: word})[place] - x).norm()) for word in ("int4", "int6", "int8")]
        assert lost[0] > lost[1] > lost[2], f"{name}: errors {lost}"
