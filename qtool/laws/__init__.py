"""The laws of each kind: properties that every member satisfies, run over the registry by the tests and by plugins.

    of(load("quantize/gptq")) = {"codes_in_range": <function>, ...}; a law raises AssertionError where it is broken
A law finds gross faults only; a published algorithm also needs a golden, an independent second form of itself.
"""

from collections.abc import Callable
from functools import partial

from qtool.laws.allocation import (
    a_looser_budget_never_loses_more,
    choosing_is_deterministic,
    no_choice_loses_less,
    the_budget_is_kept,
    the_most_sensitive_unit_gets_the_most,
)
from qtool.laws.attention import (
    more_bits_of_attention_lose_less,
    tokens_are_rounded_one_by_one,
    what_is_not_seen_stays_unseen,
    what_is_not_stated_stays,
)
from qtool.laws.cache import (
    decoding_is_the_window,
    more_bits_lose_less,
    scales_follow_the_range,
    the_cache_gives_back_what_the_method_says,
    the_first_and_the_latest_stay,
    what_was_seen_is_covered,
)
from qtool.laws.course import (
    training_ends_as_sparse_as_asked,
    training_goes_on_with_the_same_bits,
    what_trained_is_what_is_kept,
)
from qtool.laws.inputs import (
    every_order_of_tokens_gives_the_same_scales,
    no_input_in_the_range_is_further_than_half_a_step,
    scales_follow_the_inputs,
)
from qtool.laws.linear import (
    codes_in_range,
    error_falls_with_rank,
    full_rank_is_exact,
    grid_points_stay,
    loss_is_no_worse_than_rounding,
    no_sparsity_changes_nothing,
    packing_is_lossless,
    pattern_is_exact,
    pruning_is_deterministic,
    pruning_rows_apart_is_the_same,
    quantizing_is_deterministic,
    quantizing_rows_apart_is_the_same,
    reshaping_is_deterministic,
    reshaping_keeps_mean_and_deviation,
    reshaping_keeps_the_order,
    sparsity_is_exact,
    the_shape_falls_by_the_factor,
)
from qtool.laws.model import (
    calibrating_gives_the_windows_asked_for,
    calibrating_repeats,
    evaluating_repeats,
    every_linear_of_the_block_is_quantized,
    exported_bytes_are_the_model,
    quantizing_a_block_is_deterministic,
    rotating_is_deterministic,
    rotating_keeps_every_unit,
    rotations_are_orthogonal,
    the_blocks_error_is_no_worse_than_roundings,
    the_gradient_is_finite,
    the_loss_is_smallest_at_the_teacher,
    transforming_is_deterministic,
    transforming_keeps_the_output,
)
from qtool.laws.shape import (
    choosing_what_stays_is_deterministic,
    the_smaller_model_is_no_larger_than_planned,
    what_goes_could_as_well_be_zero,
    what_stays_is_in_order,
)
from qtool.registry import Method

Law = Callable[[Method], None]

LAWS: dict[tuple[str, str], tuple[Law, ...]] = {
    ("calibrate", "model"): (calibrating_gives_the_windows_asked_for, calibrating_repeats),
    ("search", "model"): (
        the_budget_is_kept,
        no_choice_loses_less,
        a_looser_budget_never_loses_more,
        the_most_sensitive_unit_gets_the_most,
        choosing_is_deterministic,
    ),
    ("quantize", "linear"): (
        codes_in_range,
        packing_is_lossless,
        grid_points_stay,
        quantizing_is_deterministic,
        loss_is_no_worse_than_rounding,
        quantizing_rows_apart_is_the_same,
    ),
    ("quantize", "block"): (
        every_linear_of_the_block_is_quantized,
        quantizing_a_block_is_deterministic,
        the_blocks_error_is_no_worse_than_roundings,
    ),
    ("quantize", "cache"): (what_was_seen_is_covered, scales_follow_the_range),
    ("quantize", "packed_cache"): (
        the_first_and_the_latest_stay,
        more_bits_lose_less,
        the_cache_gives_back_what_the_method_says,
        decoding_is_the_window,
    ),
    ("quantize", "attention"): (
        what_is_not_stated_stays,
        tokens_are_rounded_one_by_one,
        what_is_not_seen_stays_unseen,
        more_bits_of_attention_lose_less,
    ),
    ("quantize", "inputs"): (
        no_input_in_the_range_is_further_than_half_a_step,
        scales_follow_the_inputs,
        every_order_of_tokens_gives_the_same_scales,
    ),
    ("prune", "linear"): (
        sparsity_is_exact,
        pattern_is_exact,
        no_sparsity_changes_nothing,
        pruning_is_deterministic,
        pruning_rows_apart_is_the_same,
    ),
    ("prune", "shape"): (
        what_stays_is_in_order,
        the_smaller_model_is_no_larger_than_planned,
        what_goes_could_as_well_be_zero,
        choosing_what_stays_is_deterministic,
    ),
    ("factorize", "linear"): (error_falls_with_rank, full_rank_is_exact),
    ("transform", "block"): (transforming_keeps_the_output, transforming_is_deterministic),
    ("transform", "model"): (rotations_are_orthogonal, rotating_keeps_every_unit, rotating_is_deterministic),
    ("transform", "linear"): (
        reshaping_keeps_mean_and_deviation,
        reshaping_keeps_the_order,
        the_shape_falls_by_the_factor,
        reshaping_is_deterministic,
    ),
    ("distill", "training"): (the_loss_is_smallest_at_the_teacher, the_gradient_is_finite),
    ("prune", "course"): (training_ends_as_sparse_as_asked, training_goes_on_with_the_same_bits),
    ("factorize", "course"): (what_trained_is_what_is_kept, training_goes_on_with_the_same_bits),
    ("quantize", "course"): (what_trained_is_what_is_kept, training_goes_on_with_the_same_bits),
    ("distill", "course"): (what_trained_is_what_is_kept, training_goes_on_with_the_same_bits),
    ("evaluate", "model"): (evaluating_repeats,),
    ("export", "model"): (exported_bytes_are_the_model,),
}


def of(method: Method) -> dict[str, Callable[[], None]]:
    """The laws of the method's kind and scope by name, ready to be called."""
    return {law.__name__: partial(law, method) for law in LAWS.get((method.kind, method.scope), ())}
