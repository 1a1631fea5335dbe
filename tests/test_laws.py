"""Every registered method satisfies the laws of its kind, and each law catches a method that breaks it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pydantic import Field
from torch import Tensor

from qtool import laws, registry
from qtool.artifact import Metric
from qtool.calibration.statistics import LayerStats
from qtool.calibration.tokens import WrittenOptions
from qtool.formats.allocation import Problem, SearchOptions
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import SchemeSelection, WeightScheme
from qtool.formats.sparsity import SparsitySelection, choose
from qtool.formats.target import Target
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.kivi_cache import KiviCache
from qtool.model.handle import Block, ModelHandle
from qtool.model.wiring import Edits, Scaling, scale_edits
from qtool.model.writer import write_checkpoint
from qtool.options import Options, Selection
from qtool.registry import Method, Scope

Note = Callable[[str], None]
HELD = [(key, name) for key in registry.list_methods() for name in registry.laws(key)]


@pytest.mark.parametrize(("key", "law"), HELD, ids=[f"{key}-{law}" for key, law in HELD])
def test_a_registered_method_satisfies_the_laws_of_its_kind(key: str, law: str) -> None:
    registry.laws(key)[law]()


@pytest.mark.parametrize("kind", registry.KINDS)
def test_every_method_that_changes_or_judges_a_model_has_laws(kind: str) -> None:
    keys = [key for key in registry.list_methods() if key.startswith(f"{kind}/")]
    assert keys and all(registry.laws(key) for key in keys)


# ---- a method for each law to catch: sound in everything else ----


def too_high(W: Tensor, stats: LayerStats, scheme: WeightScheme, options: Selection, note: Note) -> QuantizedTensor:
    tensor = quantize(W, scheme)
    return replace(tensor, codes=tensor.codes + 1)


def other_scheme(W: Tensor, stats: LayerStats, scheme: WeightScheme, options: Selection, note: Note) -> QuantizedTensor:
    return quantize(W, WeightScheme(bits=4, group=32))


def halved(W: Tensor, stats: LayerStats, scheme: WeightScheme, options: Selection, note: Note) -> QuantizedTensor:
    return quantize(W, scheme, scheme.grid.fit(W.view(len(W), -1, scheme.group or W.shape[1]) / 8))


def dithered(W: Tensor, stats: LayerStats, scheme: WeightScheme, options: Selection, note: Note) -> QuantizedTensor:
    return quantize(W * (1 + 0.3 * torch.rand_like(W)), scheme)


def by_others(W: Tensor, stats: LayerStats, scheme: WeightScheme, options: Selection, note: Note) -> QuantizedTensor:
    return quantize(W - W.mean(0), scheme)


def one_short(W: Tensor, stats: LayerStats, options: SparsitySelection, note: Note) -> Tensor:
    mask = choose(W.abs(), options)
    mask[0, int(mask[0].float().argmax())] = False
    return W.masked_fill(mask, 0)


def ignores_pattern(W: Tensor, stats: LayerStats, options: SparsitySelection, note: Note) -> Tensor:
    return W.masked_fill(choose(W.abs(), SparsitySelection(sparsity=options.sparsity)), 0)


def always_updates(W: Tensor, stats: LayerStats, options: SparsitySelection, note: Note) -> Tensor:
    return (W * 1.01).masked_fill(choose(W.abs(), options), 0)


def by_chance(W: Tensor, stats: LayerStats, options: SparsitySelection, note: Note) -> Tensor:
    return W.masked_fill(choose(torch.rand_like(W), options), 0)


def by_other_rows(W: Tensor, stats: LayerStats, options: SparsitySelection, note: Note) -> Tensor:
    return W.masked_fill(choose((W - W.mean(0)).abs(), options), 0)


BROKEN = [
    ("quantize", too_high, "codes_in_range"),
    ("quantize", other_scheme, "codes_in_range"),
    ("quantize", too_high, "packing_is_lossless"),
    ("quantize", too_high, "grid_points_stay"),
    ("quantize", halved, "loss_is_no_worse_than_rounding"),
    ("quantize", dithered, "quantizing_is_deterministic"),
    ("quantize", by_others, "quantizing_rows_apart_is_the_same"),
    ("prune", one_short, "sparsity_is_exact"),
    ("prune", ignores_pattern, "pattern_is_exact"),
    ("prune", always_updates, "no_sparsity_changes_nothing"),
    ("prune", by_chance, "pruning_is_deterministic"),
    ("prune", by_other_rows, "pruning_rows_apart_is_the_same"),
]


@pytest.mark.parametrize(("kind", "run", "law"), BROKEN, ids=[f"{run.__name__}-{law}" for _, run, law in BROKEN])
def test_a_law_catches_a_method_that_breaks_it(kind: str, run: Callable[..., object], law: str) -> None:
    options = SchemeSelection if kind == "quantize" else SparsitySelection
    method = Method(run=run, options=options, scope="linear", needs=("hessian",), rowwise=True, key=f"{kind}/broken")
    with pytest.raises(AssertionError):
        laws.of(method)[law]()


# ---- transform: one matrix, reshaped ----


class FactorOptions(Selection):
    factor: float = Field(0.9, description="new shape over the old one")


def peaked(W: Tensor, stats: LayerStats | None, options: FactorOptions, note: Note) -> Tensor:
    return W.sign() * W.abs() ** (1 / options.factor)


def untouched(W: Tensor, stats: LayerStats | None, options: FactorOptions, note: Note) -> Tensor:
    return W


def turned(W: Tensor, stats: LayerStats | None, options: FactorOptions, note: Note) -> Tensor:
    return -W


def jittered(W: Tensor, stats: LayerStats | None, options: FactorOptions, note: Note) -> Tensor:
    return W + 1e-6 * torch.rand_like(W)


@pytest.mark.parametrize(
    ("run", "law"),
    [
        (peaked, "reshaping_keeps_mean_and_deviation"),
        (turned, "reshaping_keeps_the_order"),
        (jittered, "reshaping_keeps_the_order"),
        (untouched, "the_shape_falls_by_the_factor"),
        (jittered, "reshaping_is_deterministic"),
    ],
)
def test_the_laws_of_reshaping_catch_a_broken_member(run: Callable[..., Tensor], law: str) -> None:
    with pytest.raises(AssertionError):
        laws.of(Method(run=run, options=FactorOptions, scope="linear", key="transform/broken"))[law]()


# ---- factorize: a truncated SVD satisfies its laws ----


class SvdOptions(Selection):
    rank: int = Field(ge=1, description="columns of the left factor")


def svd(W: Tensor, stats: LayerStats | None, options: SvdOptions, note: Note) -> LowRank:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return LowRank(U[:, : options.rank] * S[: options.rank], V[: options.rank])


def svd_of_the_smallest(W: Tensor, stats: LayerStats | None, options: SvdOptions, note: Note) -> LowRank:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    return LowRank(U[:, -options.rank :] * S[-options.rank :] * 0.9, V[-options.rank :])


def svd_misreading_rank(W: Tensor, stats: LayerStats | None, options: SvdOptions, note: Note) -> LowRank:
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    noise = options.rank * torch.ones_like(W[:1])
    return LowRank(U[:, : options.rank] * S[: options.rank], V[: options.rank] + noise)


@pytest.mark.parametrize("law", ["error_falls_with_rank", "full_rank_is_exact"])
def test_a_truncated_svd_satisfies_the_laws_of_factorize(law: str) -> None:
    laws.of(Method(run=svd, options=SvdOptions, scope="linear", key="factorize/svd"))[law]()


@pytest.mark.parametrize(
    ("run", "law"), [(svd_of_the_smallest, "full_rank_is_exact"), (svd_misreading_rank, "error_falls_with_rank")]
)
def test_the_laws_of_factorize_catch_a_broken_member(run: Callable[..., LowRank], law: str) -> None:
    with pytest.raises(AssertionError):
        laws.of(Method(run=run, options=SvdOptions, scope="linear", key="factorize/broken"))[law]()


# ---- search ----


def smallest(problem: Problem, options: SearchOptions) -> Tensor:
    return problem.sizes.argmin(1)


def least_loss(problem: Problem, options: SearchOptions) -> Tensor:
    return problem.losses.argmin(1)


def largest_alike_that_fits(problem: Problem, options: SearchOptions) -> Tensor:
    fits = [c for c, size in enumerate(problem.sizes.sum(0).tolist()) if size <= problem.capacity]
    return torch.full((len(problem.sizes),), max(fits, default=0))


def now_and_then_worse(problem: Problem, options: SearchOptions) -> Tensor:
    return problem.sizes.argmin(1) if problem.capacity % 2 else least_loss(problem, options)


def candidates_by_chance(problem: Problem, options: SearchOptions) -> Tensor:
    return torch.randint(problem.sizes.shape[1], (len(problem.sizes),))


@pytest.mark.parametrize(
    ("run", "law"),
    [
        (least_loss, "the_budget_is_kept"),
        (smallest, "no_choice_loses_less"),
        (now_and_then_worse, "a_looser_budget_never_loses_more"),
        (largest_alike_that_fits, "the_most_sensitive_unit_gets_the_most"),
        (candidates_by_chance, "choosing_is_deterministic"),
    ],
)
def test_the_laws_of_search_catch_a_broken_member(run: Callable[..., Tensor], law: str) -> None:
    with pytest.raises(AssertionError):
        laws.of(Method(run=run, options=SearchOptions, scope="model", key="search/broken"))[law]()


# ---- the laws of methods that see a model ----


def scale_without_consumers(block: Block, scalings: list[Scaling], *rest: object) -> Edits:
    return {f"{scalings[0].source}.weight": torch.full((64,), 2.0)}


def scale_by_chance(block: Block, scalings: list[Scaling], *rest: object) -> Edits:
    return scale_edits(block, scalings[0], torch.rand(64) + 0.5)


def not_lowest_at_the_teacher(student: Tensor, target: Target, labels: Tensor, options: Options) -> Tensor:
    return -(student - target.logits).square().mean()


def infinite_gradient(student: Tensor, target: Target, labels: Tensor, options: Options) -> Tensor:
    return (student - target.logits).exp().sum()


def unrepeatable(model: ModelHandle, reference: ModelHandle, options: Options, seed: int) -> list[Metric]:
    return [Metric("chance", "none", float(torch.rand(())), "fraction")]


def export_of_the_original(model: ModelHandle, out: Path, options: Options) -> bool:
    return write_checkpoint(ModelHandle(model.options), out)


BROKEN_ON_MODELS = [
    ("transform", "block", scale_without_consumers, "transforming_keeps_the_output"),
    ("transform", "block", scale_by_chance, "transforming_is_deterministic"),
    ("distill", "training", not_lowest_at_the_teacher, "the_loss_is_smallest_at_the_teacher"),
    ("distill", "training", infinite_gradient, "the_gradient_is_finite"),
    ("evaluate", "model", unrepeatable, "evaluating_repeats"),
    ("export", "model", export_of_the_original, "exported_bytes_are_the_model"),
]


@pytest.mark.parametrize(("kind", "scope", "run", "law"), BROKEN_ON_MODELS, ids=[row[3] for row in BROKEN_ON_MODELS])
def test_a_law_catches_a_broken_method_on_a_model(kind: str, scope: Scope, run: Callable[..., object], law: str) -> None:
    with pytest.raises(AssertionError):
        laws.of(Method(run=run, options=Options, scope=scope, key=f"{kind}/broken"))[law]()


def one_window_short(model: ModelHandle, options: WrittenOptions, seed: int) -> Tensor:
    return torch.zeros(options.samples - 1, options.length, dtype=torch.int64)


def by_no_seed(model: ModelHandle, options: WrittenOptions, seed: int) -> Tensor:
    return torch.randint(4096, (options.samples, options.length))


@pytest.mark.parametrize(
    ("run", "law"), [(one_window_short, "calibrating_gives_the_windows_asked_for"), (by_no_seed, "calibrating_repeats")]
)
def test_the_laws_of_calibrating_catch_a_broken_member(run: Callable[..., Tensor], law: str) -> None:
    with pytest.raises(AssertionError):
        laws.of(Method(run=run, options=WrittenOptions, scope="model", key="calibrate/broken"))[law]()


def test_a_metric_that_was_not_told_of_is_caught() -> None:
    def run(model: ModelHandle, reference: ModelHandle, options: Options, seed: int) -> list[Metric]:
        return [Metric("other", "none", 1.0, "ppl")]

    method = Method(run=run, options=Options, scope="model", key="evaluate/broken", measures=("perplexity",))
    with pytest.raises(AssertionError, match="other is not among what the method says it measures"):
        laws.of(method)["evaluating_repeats"]()


# ---- the cache: keys and values, kept ----


def kept_too_few(k: Tensor, v: Tensor, options: KiviScheme) -> tuple[Tensor, Tensor]:
    return kivi_of(k, v, options.model_copy(update={"residual": 8, "sinks": 0}))


def keeps_two_bits(k: Tensor, v: Tensor, options: KiviScheme) -> tuple[Tensor, Tensor]:
    return kivi_of(k, v, options.model_copy(update={"key_bits": 2}))


def other_groups(k: Tensor, v: Tensor, options: KiviScheme) -> tuple[Tensor, Tensor]:
    return kivi_of(k, v, options.model_copy(update={"keys": "per_token"}))


def kivi_of(k: Tensor, v: Tensor, options: KiviScheme) -> tuple[Tensor, Tensor]:
    view = KiviCache(options).extend(k, v)
    return view.k.late, view.v.late


BROKEN_CACHES = [
    (kept_too_few, "the_first_and_the_latest_stay"),
    (keeps_two_bits, "more_bits_lose_less"),
    (other_groups, "the_cache_gives_back_what_the_method_says"),
]


@pytest.mark.parametrize(("run", "law"), BROKEN_CACHES, ids=[row[1] for row in BROKEN_CACHES])
def test_the_laws_of_caches_catch_a_broken_member(run: Callable[..., tuple[Tensor, Tensor]], law: str) -> None:
    method = Method(run=run, options=KiviScheme, scope="packed_cache", key="quantize/broken")
    with pytest.raises(AssertionError):
        laws.of(method)[law]()
    laws.of(replace(method, run=kivi_of))[law]()


# ---- attention: queries and probabilities ----


def rounds_both(q: Tensor, A: Tensor, options: AttentionRounding) -> tuple[Tensor, Tensor]:
    return rounding_of(q, A, AttentionRounding(queries="int8", probabilities="int8"))


def by_one_range(q: Tensor, A: Tensor, options: AttentionRounding) -> tuple[Tensor, Tensor]:
    return options.round_queries(q.transpose(2, 3)).transpose(2, 3), options.round_probabilities(A)


def gives_all_a_share(q: Tensor, A: Tensor, options: AttentionRounding) -> tuple[Tensor, Tensor]:
    return options.round_queries(q), options.round_probabilities(A + 0.1)


def rounds_to_four_bits(q: Tensor, A: Tensor, options: AttentionRounding) -> tuple[Tensor, Tensor]:
    return rounding_of(q, A, AttentionRounding(queries="int4", probabilities="int4"))


def rounding_of(q: Tensor, A: Tensor, options: AttentionRounding) -> tuple[Tensor, Tensor]:
    return options.round_queries(q), options.round_probabilities(A)


BROKEN_ATTENTIONS = [
    (rounds_both, "what_is_not_stated_stays"),
    (by_one_range, "tokens_are_rounded_one_by_one"),
    (gives_all_a_share, "what_is_not_seen_stays_unseen"),
    (rounds_to_four_bits, "more_bits_of_attention_lose_less"),
]


@pytest.mark.parametrize(("run", "law"), BROKEN_ATTENTIONS, ids=[row[1] for row in BROKEN_ATTENTIONS])
def test_the_laws_of_attentions_catch_a_broken_member(run: Callable[..., tuple[Tensor, Tensor]], law: str) -> None:
    method = Method(run=run, options=AttentionRounding, scope="attention", key="quantize/broken")
    with pytest.raises(AssertionError):
        laws.of(method)[law]()
    laws.of(replace(method, run=rounding_of))[law]()
