"""Allocation: a scheme for each unit of linears, so that all their stored bytes together keep to a budget.

    minimize  sum over units u of losses[u, c_u]    where  sum over units u of sizes[u, c_u] <= capacity
    losses [units, candidates] predicted    sizes [units, candidates] stored bytes    c [units] candidate of each unit
A unit is what must share a scheme, because runtimes keep it as one matrix: linears that share an input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.formats.integer import Params
from qtool.formats.scheme import Scheme, WeightScheme
from qtool.formats.tensor import assemble, settle, to_groups
from qtool.options import Selection


class SearchOptions(Selection):
    """Options of a method that the search driver runs."""

    budget: float = Field(
        gt=0, description="stored bits per weight, codes, scales and zero points, that all linears together may take"
    )
    candidates: tuple[Scheme, ...] = Field(description="schemes to choose from, two or more, in any order")
    sensitivity: Literal["kl", "gradient"] = Field(
        "gradient",
        description="how a unit's loss is found: kl, measured with the unit alone rounded; gradient, the second-order form of "
        "the same, in one pass back through the model",
    )
    quantizer: str = Field(
        "quantize/gptq",
        description="the quantize method of scope linear whose rounding, with its default options, is looked at; "
        "quantize/rtn is faster and predicts less of what others lose",
    )
    samples: int = Field(16, ge=1, description="windows of the calibration text that losses are taken over, at most")

    @model_validator(mode="after")
    def _agree(self) -> "SearchOptions":
        if len(self.candidates) < 2:
            raise ValueError("candidates: there is nothing to choose from; name two schemes or more")
        for place, scheme in enumerate(self.candidates):
            if scheme in self.candidates[:place]:
                raise ValueError(f"candidates: {scheme} stands there twice; name every scheme once")
            if scheme.activations is not None and self.sensitivity == "gradient":
                raise ValueError(f"sensitivity gradient does not see {scheme}'s rounded activations; use sensitivity: kl")
        return self

    def capacity(self, n_weights: int) -> int:
        """Bytes that n_weights may take; the budget counts as the decimal number that was written."""
        return int(Fraction(str(self.budget)) * n_weights / 8)


@dataclass(frozen=True)
class Problem:
    """losses [units, candidates] float64, sizes [units, candidates] int64, capacity in bytes."""

    losses: Tensor
    sizes: Tensor
    capacity: int

    def loss_of(self, choice: Tensor) -> float:
        """Total loss of a choice [units]."""
        return float(self.losses.gather(1, choice[:, None]).sum())

    def size_of(self, choice: Tensor) -> int:
        """Total bytes of a choice [units]."""
        return int(self.sizes.gather(1, choice[:, None]).sum())


def sizes_of(shapes: Sequence[Sequence[tuple[int, int]]], candidates: Sequence[Scheme]) -> Tensor:
    """Bytes [units, candidates] of units, each the shapes (out, in) of its linears."""
    rows = [[sum(stored_bytes(shape, scheme.weights) for shape in unit) for scheme in candidates] for unit in shapes]
    return torch.tensor(rows, dtype=torch.int64)  # [units, candidates]


def stored_bytes(shape: tuple[int, int], scheme: WeightScheme) -> int:
    """What QuantizedTensor counts for a linear of this shape (out, in), which no values are needed for."""
    with torch.device("meta"):
        grouped = to_groups(torch.empty(shape), scheme)  # [out, groups, group]
        zero = None if scheme.symmetric else torch.empty(*grouped.shape[:2], 1)
        params = settle(Params(torch.empty(*grouped.shape[:2], 1), zero), scheme)
        codes = torch.empty(shape[0], shape[1] // scheme.grid.width)
        return assemble(codes, params, scheme, scheme.grid).stored_bytes
