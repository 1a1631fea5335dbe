"""Allocation: sizes known from shapes alone, and a budget that means the decimal number it is written as."""

import pytest
import torch
from pydantic import ValidationError

from qtool.formats.allocation import Problem, SearchOptions, sizes_of, stored_bytes
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import quantize

SCHEMES = [
    {"bits": 4, "group": 32},
    {"bits": 3, "group": None},
    {"bits": 5, "group": 16, "symmetric": False},
    {"bits": 2, "group": 32, "symmetric": False, "zero_dtype": "float16"},
    {"bits": 8, "group": 96, "scale_dtype": "float32"},
    {"format": "nf4", "group": 32},
    {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"},
    {"format": "e2m1", "group": 32, "scale_dtype": "float8_e8m0fnu"},
]


@pytest.mark.parametrize("fields", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(24, 96), (7, 96), (1, 288)])
def test_the_bytes_of_a_shape_are_those_of_a_tensor_of_that_shape(fields: dict[str, object], shape: tuple[int, int]) -> None:
    scheme = WeightScheme.model_validate(fields)
    tensor = quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)), scheme)
    assert stored_bytes(shape, scheme) == tensor.stored_bytes


def test_no_memory_is_taken_to_size_a_large_linear() -> None:
    weights = WeightScheme(bits=4, group=128)
    assert stored_bytes((1 << 20, 1 << 16), weights) == (1 << 36) // 2 + 2 * (1 << 36) // 128


def test_a_unit_takes_what_its_linears_take_together() -> None:
    options = SearchOptions.model_validate({"budget": 4, "candidates": ["w3a16g32", "w8a16"]})
    sizes = sizes_of([[(8, 64), (16, 64)], [(64, 32)]], options.candidates)
    w3, w8 = (scheme.weights for scheme in options.candidates)
    joint = [stored_bytes((8, 64), w) + stored_bytes((16, 64), w) for w in (w3, w8)]
    assert sizes.tolist() == [joint, [stored_bytes((64, 32), w3), stored_bytes((64, 32), w8)]]


@pytest.mark.parametrize(
    ("budget", "n_weights", "capacity"), [(4.125, 1024, 528), (4.1, 80, 41), (3.3, 10**12, 412_500_000_000)]
)
def test_the_budget_counts_as_the_decimal_that_was_written(budget: float, n_weights: int, capacity: int) -> None:
    options = SearchOptions.model_validate({"budget": budget, "candidates": ["w3a16g32", "w8a16"]})
    assert options.capacity(n_weights) == capacity


def test_a_choice_has_the_loss_and_the_size_of_its_candidates() -> None:
    problem = Problem(torch.tensor([[3.0, 1.0], [5.0, 2.0]]).double(), torch.tensor([[10, 20], [30, 50]]), 60)
    choice = torch.tensor([1, 0])
    assert (problem.loss_of(choice), problem.size_of(choice)) == (6.0, 50)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"candidates": ["w3a16g32"]}, "nothing to choose from"),
        ({"candidates": ["w4a16g32", {"weights": {"bits": 4, "group": 32}}]}, "w4a16g32 stands there twice"),
        ({"candidates": ["w4a16", "w8a8"], "sensitivity": "gradient"}, "does not see w8a8's rounded activations"),
        ({"budget": 0}, "greater than 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(fields: dict[str, object], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        SearchOptions.model_validate({"budget": 4, "candidates": ["w3a16g32", "w8a16"]} | fields)
