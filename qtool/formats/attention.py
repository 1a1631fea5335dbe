"""What an attention rounds between its linears: queries after their rotation, and probabilities, each token by its own range.

    q^ = s Q(q / s)    s of the range of one head's query [head_dim]
    A^ = s round(A / s)    s = max A / (2^b - 1) of one head's and query's probabilities [tokens]; e4m3, e5m2: as queries
0 stays 0, and a probability of 1 stays 1: whole numbers without a sign, the largest on the last level.
Source: Yao et al. 2022, arXiv:2206.01861 (ZeroQuant), section 4.1, ranges found for each token at run time.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.formats.scheme import ACTIVATION_PRESETS, ActivationScheme
from qtool.options import Options

TINY = torch.finfo(torch.float32).tiny  # of rows that see nothing
Rounding = Literal["int4", "int5", "int6", "int7", "int8", "e4m3", "e5m2"]


class AttentionRounding(Options):
    """What is rounded, and to what; null parts stay as they are."""

    queries: Rounding | None = Field(None, description="what queries are rounded to, after their rotation; null: nothing")
    probabilities: Rounding | None = Field(
        None, description="what probabilities are rounded to, whole numbers without a sign; null: nothing"
    )

    @model_validator(mode="after")
    def _state_one(self) -> "AttentionRounding":
        if self.queries is None and self.probabilities is None:
            raise ValueError("rounds nothing; state queries or probabilities, such as queries: int8")
        return self

    def round_queries(self, q: Tensor) -> Tensor:
        """q [..., head_dim] in its dtype; gradients pass as if nothing were rounded."""
        return q if self.queries is None else _rounded(q, ActivationScheme.model_validate(ACTIVATION_PRESETS[self.queries]))

    def round_probabilities(self, A: Tensor) -> Tensor:
        """A [..., tokens], nothing below zero, in its dtype; gradients pass as if nothing were rounded."""
        if self.probabilities is None:
            return A
        scheme = ActivationScheme.model_validate(ACTIVATION_PRESETS[self.probabilities])
        if scheme.format != "int":
            return _rounded(A, scheme)
        wide = A.detach().float()
        s = (wide.amax(-1, keepdim=True) / ((1 << scheme.bits) - 1)).clamp_min(TINY)  # [..., 1]
        return _passed(A, (wide / s).round() * s)

    def __str__(self) -> str:
        """queries int8, probabilities int8."""
        return ", ".join(f"{name} {word}" for name in ("queries", "probabilities") if (word := getattr(self, name)) is not None)


def _rounded(x: Tensor, scheme: ActivationScheme) -> Tensor:
    """x [..., n] on the grid of its last axis's range, computed in float32."""
    wide = x.detach().float().contiguous()
    return _passed(x, scheme.grid.snap(wide, scheme.grid.fit(wide)))


def _passed(x: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in x's dtype, with the gradient of x."""
    snapped = rounded.to(x.dtype)
    return x + (snapped - x).detach() if x.requires_grad else snapped
