"""Scales: exact in the dtype they are stored in, whatever it is."""

import pytest
import torch

from qtool.formats.scales import SCALE_DTYPES, fit_scale, store_scale, tensor_scale


def maxima() -> torch.Tensor:
    """Largest magnitudes [groups, 1] over twelve decades, and zero."""
    return torch.cat([torch.zeros(1), torch.logspace(-6, 6, 97)]).view(-1, 1)


@pytest.mark.parametrize("largest", [6.0, 7.5, 448.0])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_what_is_stored_is_what_was_fitted(dtype: str, largest: float) -> None:
    amax = maxima()
    of_tensor = tensor_scale(amax, largest, dtype)
    scale = fit_scale(amax, largest, dtype, of_tensor)
    stored = store_scale(scale, dtype, of_tensor)
    assert stored.dtype == SCALE_DTYPES[dtype]
    assert torch.equal(stored.float() * of_tensor, scale)
    assert bool((scale > 0).all())


def test_powers_of_two_follow_the_standard() -> None:
    amax = torch.tensor([[6.0], [5.9], [4.0], [3.999], [1.0], [0.75], [2.0**-100]])
    scale = fit_scale(amax, 6.0, "float8_e8m0fnu", 1.0)  # E2M1: 2^(floor(log2 amax) - 2)
    assert scale.squeeze().tolist() == [1.0, 1.0, 1.0, 0.5, 0.25, 0.125, 2.0**-102]
    assert fit_scale(torch.tensor([[1.0]]), 127.5, "float8_e8m0fnu", 1.0).item() == 2.0**-6  # INT8: six bits behind the point


def test_a_tensors_largest_group_takes_half_the_largest_e4m3_scale_or_less() -> None:
    w = torch.tensor([[1.0, -2688.0], [0.5, 3.0]])
    of_tensor = tensor_scale(w, 6.0, "float8_e4m3fn")
    assert of_tensor == 2.0  # 2688 / 6 = 448 = 2 * 224
    assert tensor_scale(1.001 * w, 6.0, "float8_e4m3fn") == 4.0
    scale = fit_scale(w.abs().amax(-1, keepdim=True), 6.0, "float8_e4m3fn", of_tensor)
    assert scale.squeeze().tolist() == [448.0, 0.5]


def test_a_group_too_small_for_e4m3_gets_its_smallest_number() -> None:
    assert fit_scale(torch.tensor([[1e-9]]), 6.0, "float8_e4m3fn", 1.0).item() == 2.0**-9


def test_only_e4m3_scales_share_one_of_the_tensor() -> None:
    w = torch.full((2, 2), 100.0)
    for dtype in SCALE_DTYPES:
        assert (tensor_scale(w, 6.0, dtype) == 1.0) == (dtype != "float8_e4m3fn"), dtype
    assert tensor_scale(torch.zeros(2, 2), 6.0, "float8_e4m3fn") == 1.0
