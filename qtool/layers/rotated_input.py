"""A linear whose input is rotated before anything else sees it: an online Hadamard transform.

    x <- (x D) H / √n        x [..., n]    D the diagonal of signs [n]    H [n, n], see linalg/hadamard.py
The linear's weights are W D H / √n, so that it computes what it did. The rotation is a hook that stands before all others:
observers, whatever rounds inputs, and layers that take the linear's place meet the rotated input.
"""

from typing import Any

import torch
from torch import Tensor, nn

from qtool.linalg.hadamard import hadamard_product

SIGNS = "rotation_signs"


def rotate_input(linear: nn.Module, signs: Tensor) -> None:
    """Let a linear rotate its input from now on; signs [in], ±1, become a buffer of it, int8."""
    assert signs_of(linear) is None, "a linear rotates its input once"
    linear.register_buffer(SIGNS, signs.to(torch.int8), persistent=False)
    linear.register_forward_pre_hook(_rotate, prepend=True)


def signs_of(linear: nn.Module) -> Tensor | None:
    """The signs [in] of a linear that rotates its input, else None."""
    return linear._buffers.get(SIGNS)


def carry_rotation(before: nn.Module, after: nn.Module) -> None:
    """Let `after`, which takes the place of `before`, rotate its input as that did."""
    signs = signs_of(before)
    if signs is not None and signs_of(after) is None:
        rotate_input(after, signs)


def rotate_rows(x: Tensor, signs: Tensor) -> Tensor:
    """x [..., n] D H / √n, in x's dtype: what an input becomes, and each row of the weights that read it."""
    return hadamard_product(x * signs.to(x))


def rotate_back(W: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate_rows`: W [..., n] Hᵀ D / √n."""
    n = W.shape[-1]
    R = rotate_rows(torch.eye(n, dtype=torch.float64, device=W.device), signs)  # [n, n]
    return (W.double() @ R.T).to(W.dtype)


def _rotate(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return rotate_rows(args[0], module.get_buffer(SIGNS)), *args[1:]
