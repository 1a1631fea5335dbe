"""InputRotation: what a linear does to its input before it multiplies, kept as the signs of a Hadamard transform.

x <- (x D) H / √n        D the diagonal of signs [n], ±1 in int8; H follows from n
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InputRotation:
    """Signs [in] of one linear."""

    signs: Tensor
