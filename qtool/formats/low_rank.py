"""LowRank: a matrix as the product of two thin ones, the currency of factorize, and what its factors are stored in.

    W^ = left diag(scale) right      left [out, rank]    right [rank, in]    scale [rank], or None: all ones
In int8 each factor has one scale for each of its `rank` vectors; of both only the product is kept, as scale.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.options import Selection

FLOATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class LowRankSelection(Selection):
    """Options of a method that makes two thin factors for each quantized linear."""

    ignore: tuple[str, ...] = Field((), description="name patterns of quantized linears to leave as they are")
    rank: int = Field(8, ge=1, description="inner size of the factors; LoRC's paper finds 4 to 16 enough")
    dtype: Literal["bfloat16", "float16", "int8"] = Field("bfloat16", description="what the factors are stored in")


@dataclass(frozen=True)
class LowRank:
    """Two factors of one matrix; with a scale, whole numbers in int8."""

    left: Tensor
    right: Tensor
    scale: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Bytes of both factors and of their scale."""
        return self.left.nbytes + self.right.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A [out, rank] and B [rank, in] with W^ = A B, float32."""
        if self.scale is None:
            return self.left.float(), self.right.float()
        half = self.scale.sqrt()  # [rank]
        return self.left * half, self.right * half.unsqueeze(1)

    def multiply(self) -> Tensor:
        """The product [out, in], float32."""
        A, B = self.factors()
        return A @ B

    def stored_in(self, dtype: str) -> "LowRank":
        """The same with its factors rounded to what they are stored in: bfloat16, float16 or int8."""
        A, B = self.factors()
        if dtype != "int8":
            return LowRank(A.to(FLOATS[dtype]), B.to(FLOATS[dtype]))
        left = A.abs().amax(0) / 127  # [rank]
        right = B.abs().amax(1) / 127  # [rank]
        codes = (A / _not_zero(left)).round(), (B / _not_zero(right).unsqueeze(1)).round()
        return LowRank(codes[0].to(torch.int8), codes[1].to(torch.int8), left * right)


def _not_zero(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))
