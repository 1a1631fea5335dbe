"""DSIR: weights from their definition, a sample that looks more like the target than chance, and the same one for one seed."""

import hashlib
import math
import random
import re

import pytest
import torch

from qtool.methods.calibrate.dsir import METHOD, DsirOptions, buckets_of, dsir, gumbel_top_k, log_weights, shares
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

CODE = [f"def f{i}(x): return x + {i}" for i in range(20)]
PROSE = [f"the ship sailed on the sea for {i} days" for i in range(20)]


def slow_weight(text: str, texts: list[str], target: list[str], m: int) -> float:
    """log w by dictionaries, one n-gram at a time."""

    def grams(text: str) -> list[int]:
        words = re.findall(r"\w+|[^\w\s]", text.lower())
        found = words + [f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1)]
        return [int(hashlib.sha256(g.encode()).hexdigest()[:16], 16) % m for g in found]

    def share(texts: list[str]) -> dict[int, float]:
        every = [place for text in texts for place in grams(text)]
        return {place: every.count(place) / len(every) for place in set(every)}

    p, q = share(target), share(texts)
    return sum(math.log(p.get(place, 0) + 1e-8) - math.log(q.get(place, 0) + 1e-8) for place in grams(text))


def test_weights_are_the_definition() -> None:
    pool = [*CODE, *PROSE]
    found = log_weights(pool, PROSE[:5], 97)  # few buckets, so that n-grams collide
    assert found.tolist() == pytest.approx([slow_weight(text, pool, PROSE[:5], 97) for text in pool], rel=1e-9)


def test_a_target_that_is_the_pool_weighs_nothing() -> None:
    assert log_weights(CODE, CODE, 10_000).abs().max() == 0


def test_fewer_buckets_reach_both_distributions() -> None:
    assert int(buckets_of(" ".join(CODE), 7).max()) < 7
    assert len(shares(buckets_of("a b", 7), 7)) == 7


def test_what_is_chosen_is_nearer_to_the_target_than_chance() -> None:
    pool = [*CODE, *PROSE]
    chosen = [pool[i] for i in gumbel_top_k(log_weights(pool, PROSE[:8], 10_000), 10, seed=0).tolist()]
    by_chance = random.Random(0).sample(pool, 10)

    def distance(texts: list[str]) -> float:
        p, q = (shares(torch.cat([buckets_of(t, 10_000) for t in some]), 10_000) + 1e-8 for some in (PROSE[:8], texts))
        return float((p * (p / q).log()).sum())

    assert distance(chosen) < distance(by_chance) / 2
    assert sum(text in PROSE for text in chosen) >= 9


def test_noise_draws_without_replacement_by_weight() -> None:
    log_w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    first = [gumbel_top_k(log_w, 1, seed).item() for seed in range(2000)]
    for index, share in enumerate((0.5, 0.3, 0.2)):  # 2000 draws know a share to 0.011
        assert first.count(index) / 2000 == pytest.approx(share, abs=0.04)
    assert gumbel_top_k(log_w, 3, 0).tolist() == [0, 1, 2]


def test_windows_of_a_pool_are_chosen_and_bad_pools_are_refused(tmp_path: object) -> None:
    model = ModelHandle(ModelOptions(path="demo"))
    options = DsirOptions.model_validate(
        {"source": "demo:calibration", "target": {"source": "demo:validation"}, "samples": 4, "length": 64, "candidates": 40}
    )
    chosen = dsir(model, options, 0)
    assert chosen.shape == (4, 64) and len({tuple(window) for window in chosen.tolist()}) == 4
    with pytest.raises(Exception, match="gives a pool of 3 windows of 64 tokens, 4 are to be chosen"):
        dsir(model, options.model_copy(update={"candidates": 3}), 0)
    assert METHOD.check is not None
    with pytest.raises(Exception, match="calibrate/dsir: length 513 is more than"):
        METHOD.check(model, options.model_copy(update={"length": 513}))
