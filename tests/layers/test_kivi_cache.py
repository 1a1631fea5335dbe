"""The cache of codes: which tokens are rounded when, its attention query by query, its memory, and windows that slide."""

import math

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.kivi import KiviScheme
from qtool.layers.kivi_cache import KiviCache, attend

SCHEMES = [
    KiviScheme(key_bits=3, value_bits=2, group=16, residual=5, sinks=2),
    KiviScheme(key_bits=2, value_bits=4, group=16, residual=0),
    KiviScheme(key_bits=4, value_bits=8, group=16, residual=3, sinks=1, keys="per_token", rotate="hadamard"),
]


def samples(tokens: int = 45) -> tuple[Tensor, Tensor, Tensor]:
    """q [2, 4, tokens, 16], k and v [2, 2, tokens, 16] in float64."""
    q = torch.randn(2, 4, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    k, v = torch.randn(2, 2, 2, tokens, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).unbind(0)
    return q, k, v


def as_of(k: Tensor, v: Tensor, length: int, scheme: KiviScheme) -> tuple[Tensor, Tensor]:
    """The first `length` keys and values as a cache of so many tokens has them, group by group from the start."""
    found = []
    for x, side in zip((k, v), scheme.sides, strict=True):
        x = x[:, :, :length].clone()
        start, unit = scheme.sinks, scheme.group if side.along == "tokens" else 1
        while start + unit <= length - scheme.residual:
            x[:, :, start : start + unit] = side.round(x[:, :, start : start + unit])
            start += unit
        found.append(x)
    return found[0], found[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("pieces", [[45], [1] * 45, [1, 16, 3, 25]], ids=["window", "steps", "pieces"])
def test_every_query_sees_the_cache_of_so_many_tokens(scheme: KiviScheme, pieces: list[int]) -> None:
    q, k, v = samples()
    cache, done, found = KiviCache(scheme), 0, []
    for piece in pieces:
        part = slice(done, done + piece)
        view = cache.extend(k[:, :, part], v[:, :, part])
        found.append(attend(q[:, :, part], view, None, 0.3, 0.0))
        done += piece
    expected = torch.empty(2, 45, 4, 16, dtype=torch.float64)
    for t in range(45):
        k_t, v_t = as_of(k, v, t + 1, scheme)
        for sample in range(2):
            for head in range(4):
                scores = [0.3 * float(q[sample, head, t] @ key) for key in k_t[sample, head // 2]]
                weights = [math.exp(score - max(scores)) for score in scores]
                mixed = sum(weight * value for weight, value in zip(weights, v_t[sample, head // 2], strict=True))
                expected[sample, t, head] = mixed / sum(weights)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


def test_fewer_tokens_than_a_group_stay_as_they_are() -> None:
    _, k, v = samples(15)
    view = KiviCache(KiviScheme(group=16, residual=0)).extend(k, v)
    assert torch.equal(view.k.late, k) and not torch.equal(view.v.late, v)


def test_all_stays_to_the_bit_within_the_residual() -> None:
    _, k, v = samples()
    view = KiviCache(KiviScheme(group=16, residual=45)).extend(k, v)
    assert view.is_settled and torch.equal(view.k.late, k) and torch.equal(view.v.late, v)


def test_memory_is_codes_and_what_stays() -> None:
    _, k, v = (x.half() for x in samples())
    cache = KiviCache(KiviScheme(key_bits=2, value_bits=4, group=16, residual=4, sinks=2))
    for t in range(45):
        cache.extend(k[:, :, t : t + 1], v[:, :, t : t + 1])
    # Of 45 tokens 2 are sinks and 4 the latest. Keys: two groups of 16, and 7 more that make none yet; values: 39.
    heads, numbers = 2 * 2, 16
    keys = 32 * numbers * 2 / 8 + 2 * numbers * 4 + (2 + 7 + 4) * numbers * 2
    values = 39 * (numbers * 4 / 8 + 4) + (2 + 4) * numbers * 2
    assert cache.nbytes == heads * (keys + values)


def test_samples_may_be_chosen_anew() -> None:
    _, k, v = samples()
    cache, other = KiviCache(SCHEMES[0]), KiviCache(SCHEMES[0])
    cache.extend(k[:, :, :40], v[:, :, :40])
    cache.choose_samples(lambda part: part[[1, 1, 0]])
    view = cache.extend(k[[1, 1, 0], :, 40:], v[[1, 1, 0], :, 40:])
    expected = other.extend(k, v)
    assert torch.equal(view.k.late, expected.k.late[[1, 1, 0]]) and torch.equal(view.v.late, expected.v.late[[1, 1, 0]])


@pytest.mark.parametrize("residual", [0, 3, 30])
@pytest.mark.parametrize("keys", ["per_channel", "per_token"])
def test_a_window_forgets_what_no_query_sees(keys: str, residual: int) -> None:
    _, k, v = samples(90)
    scheme = KiviScheme.model_validate({"group": 16, "residual": residual, "sinks": 2, "keys": keys})
    sliding, whole = KiviCache(scheme, window=12), KiviCache(scheme)
    sizes = []
    for t in range(90):
        part = slice(t, t + 1)
        view, expected = sliding.extend(k[:, :, part], v[:, :, part]), whole.extend(k[:, :, part], v[:, :, part])
        assert view.k.late.shape[2] == t + 1 - view.offset and view.offset <= max(t - 11, 0)
        for found, full in ((view.k.late, expected.k.late), (view.v.late, expected.v.late)):
            assert torch.equal(found[:, :, -12:], full[:, :, -12:])
        sizes.append(sliding.nbytes)
    assert max(sizes[45:]) <= max(sizes[:45]) and sliding.length - sliding.offset < 12 + 16


def test_heads_that_do_not_divide_are_refused() -> None:
    _, k, v = samples()
    with pytest.raises(QtoolError, match="16 channels of values do not divide into groups of 32; use group: 16"):
        KiviCache(KiviScheme(group=32)).extend(k, v)
