"""LowRank: a weight matrix as the product of two thin ones, the currency of factorize.

W^ = left right      left [out, rank]    right [rank, in]
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """Two factors of one linear's weights."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def multiply(self) -> Tensor:
        """Weights [out, in]."""
        return self.left @ self.right
