"""The plan: what a recipe will make of a model, known before any weight is loaded.

The same checks as a run's come first, so that a recipe that can be planned can begin. Sizes are of the files that exports
will write, from their own encoders; where a search decides later, of the budget's share between its candidates.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from qtool.formats.allocation import SearchOptions, stored_bytes
from qtool.formats.kivi import KiviScheme
from qtool.formats.scheme import InputSelection, KvScheme, Scheme, SchemeSelection
from qtool.model.handle import ModelHandle
from qtool.model.runtimes import Serving, servings
from qtool.model.sizes import export_size
from qtool.options import Selection
from qtool.pipeline.checks import check_recipe, located, planned_cache, planned_model, planned_rounding, planned_schemes
from qtool.pipeline.estimate import Cost, estimate, rate_of
from qtool.recipe import Recipe, Step


@dataclass(frozen=True)
class Row:
    """Linears of one kind: their name with the blocks' numbers in braces, shape (out, in), scheme, the step that sets it."""

    name: str
    count: int
    shape: tuple[int, int]
    scheme: str
    step: str


@dataclass(frozen=True)
class PlannedExport:
    """What an export will write, and each runtime with the reason why it will not serve it, None where it will."""

    key: str
    bytes: int
    runtimes: list[tuple[Serving, str | None]]


@dataclass(frozen=True)
class Plan:
    """All of it; seconds and memory are estimates."""

    parameters: tuple[int, int]  # before and after
    rows: list[Row]
    cache: str | None  # what the key/value cache is quantized to
    cache_bytes: float  # that a token's keys and values take in it, in all blocks; of tokens that do not stay as they are
    attention: str | None  # what attentions round between their linears
    exports: list[PlannedExport]
    costs: list[Cost]
    rate: float  # operations a second of this machine

    @property
    def seconds(self) -> float:
        return sum(cost.seconds(self.rate) for cost in self.costs)

    @property
    def peak_bytes(self) -> float:
        return max(cost.memory_bytes for cost in self.costs)

    @property
    def disk_bytes(self) -> float:
        return sum(cost.disk_bytes for cost in self.costs)


def make_plan(recipe: Recipe) -> Plan:
    """Plan a recipe; raises QtoolError for what a run would refuse."""
    model = check_recipe(recipe)
    exports = []
    for index, step in enumerate(recipe.steps):
        if step.method.kind == "export":
            with located(step):
                exports.append(plan_export(model, recipe.steps[:index], step))
    sizes = {export.key: export.bytes for export in exports}
    cache = planned_cache(model, recipe.steps)
    rounding = planned_rounding(model, recipe.steps)
    words, rounded = (None if one is None else str(one) for one in (cache, rounding))
    costs = estimate(model, recipe.steps, recipe.seed, sizes)
    last = planned_model(model, recipe.steps)
    parameters = (model.n_parameters(), last.n_parameters())
    rows, n_bytes = rows_of(last, recipe.steps), cache_bytes(last, cache)
    return Plan(parameters, rows, words, n_bytes, rounded, exports, costs, rate_of(model))


def cache_bytes(model: ModelHandle, cache: KvScheme | KiviScheme | None) -> float:
    """Bytes of one token's keys and values in all blocks, where heads are as the config tells."""
    if not model.attention_names():
        return 0.0
    if isinstance(cache, KiviScheme):
        one = cache.bytes_per_token(model.head_dim, model.head_dim)
    else:
        one = 2 * model.head_dim * (model.dtype.itemsize if cache is None else cache.bits / 8)
    return len(model.attention_names()) * model.n_kv_heads * one


def plan_export(model: ModelHandle, before: Sequence[Step], step: Step) -> PlannedExport:
    """One export of what the steps before it make."""
    model = planned_model(model, before)
    outcomes = list(planned_schemes(model, before))
    sizes = [export_size(step.method, model, schemes, step.options, additions(schemes, model, before)) for schemes in outcomes]
    searches = [one.options for one in before if isinstance(one.options, SearchOptions)]
    n_bytes = within_budget(model, searches[-1], outcomes, sizes) if searches else sizes[0]
    cache = planned_cache(model, before)
    found: list[tuple[Serving, str | None]] = servings(step.key.removeprefix("export/"), model, outcomes[0], cache)
    for schemes in outcomes[1:]:  # candidates of a search: served where each is
        others = servings(step.key.removeprefix("export/"), model, schemes, cache)
        found = [(one, reason or other) for (one, reason), (_, other) in zip(found, others, strict=True)]
    return PlannedExport(step.key, n_bytes, found)


def additions(schemes: dict[str, Scheme], model: ModelHandle, steps: Sequence[Step]) -> dict[str, int]:
    """Bytes that each quantized linear is to have beside what its scheme stores, and each attention for its cache."""
    found: dict[str, dict[str, int]] = {name: {} for name in schemes}
    for step in steps:
        options, tell = step.options, step.method.added_bytes
        if step.method.kind == "transform" and tell is not None:
            for name in schemes:
                found[name]["transform"] = tell(options, *model.linear_shape(name))
        if step.method.kind in ("quantize", "factorize") and isinstance(options, Selection):
            for name in schemes:
                if not options.is_ignored(name):
                    found[name][step.method.kind] = 0 if tell is None else tell(options, *model.linear_shape(name))
    has_scales = isinstance(planned_cache(model, steps), KvScheme)
    scales = dict.fromkeys(model.attention_names(), 2 * model.dtype.itemsize) if has_scales else {}
    return scales | {name: sum(parts.values()) for name, parts in found.items()}


def within_budget(
    model: ModelHandle, search: SearchOptions, outcomes: Sequence[dict[str, Scheme]], sizes: Sequence[int]
) -> int:
    """Bytes at the budget, on the line between the candidates nearest to it in bits per weight."""
    bits = [mean_bits(model, schemes) for schemes in outcomes]
    points = sorted(zip(bits, sizes, strict=True))
    low = max((point for point in points if point[0] <= search.budget), default=points[0])
    high = min((point for point in points if point[0] >= search.budget), default=points[-1])
    share = 0.0 if high[0] == low[0] else (search.budget - low[0]) / (high[0] - low[0])
    return round(low[1] + share * (high[1] - low[1]))


def mean_bits(model: ModelHandle, schemes: dict[str, Scheme]) -> float:
    """Stored bits per weight of the quantized linears."""
    shapes = {name: model.linear_shape(name) for name in schemes}
    weights = sum(out * columns for out, columns in shapes.values())
    return 8 * sum(stored_bytes(shapes[name], scheme.weights) for name, scheme in schemes.items()) / weights


def rows_of(model: ModelHandle, steps: Sequence[Step]) -> list[Row]:
    """Every linear, those of all blocks that are treated alike in one row."""
    before, found = model.schemes(), {}
    for name in model.linear_names():
        found[name] = (str(before[name]), "as it came") if name in before else ("dense", "")
    for index, step in enumerate(steps):
        if isinstance(step.options, InputSelection):
            after = next(planned_schemes(model, steps[: index + 1]))
            for name, (words, key) in found.items():
                if name in after and words not in ("by search", str(after[name])):
                    found[name] = (str(after[name]), f"{key}, {step.key}")
        if step.method.kind == "quantize" and isinstance(step.options, SchemeSelection):
            for name in found:
                if step.options.is_ignored(name):
                    continue
                is_searched = step.options.scheme == "search" and name not in step.options.modules
                found[name] = ("by search" if is_searched else str(step.options.scheme_of(name)), step.key)
    alike: dict[tuple[str, tuple[int, int], str, str], list[str]] = {}
    for name, (scheme, key) in found.items():
        general = re.sub(r"\.\d+(?=\.)", ".#", name)
        alike.setdefault((general, model.linear_shape(name), scheme, key), []).append(name)
    rows = []
    for (general, shape, scheme, key), names in alike.items():
        numbers = [[int(number) for number in re.findall(r"\.(\d+)(?=\.)", name)] for name in names]
        name = general
        for place in range(general.count("#")):
            name = name.replace("#", spans(sorted({row[place] for row in numbers})), 1)
        rows.append(Row(name, len(names), shape, scheme, key))
    return rows


def spans(numbers: Sequence[int]) -> str:
    """Sorted numbers as text: 3, or {0-5}, or {0-2,4}."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    text = ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
    return text if len(numbers) == 1 else f"{{{text}}}"
