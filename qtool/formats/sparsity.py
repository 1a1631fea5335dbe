"""Sparsity as data: how many weights become zero, anywhere in a row or in a pattern of neighbours, and which.

    unstructured    round(sparsity · in) of the weights of each output channel, halves rounded up
    N:M             of every M neighbouring inputs N stay, such as 2:4 for sparse tensor cores
Of equal scores the weight further left goes first, so that the choice is the same on every run.
"""

import re
from math import floor
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from qtool.errors import QtoolError
from qtool.options import Selection


class SparsitySelection(Selection):
    """Options of a method that makes linears sparse."""

    sparsity: float = Field(0.5, ge=0, lt=1, description="share of a linear's weights that become zero")
    pattern: str | None = Field(None, description="N:M such as 2:4: of M neighbours N stay; null: anywhere")

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        match = None if value is None else re.fullmatch(r"(\d+):(\d+)", value)
        if value is not None and (match is None or not 0 < int(match[1]) < int(match[2])):
            raise ValueError(f'"{value}" is no pattern; write N:M with 0 < N < M, such as 2:4')
        return value

    @model_validator(mode="after")
    def _check_one_of_two(self) -> "SparsitySelection":
        default = type(self).model_fields["sparsity"].default  # which a resolved recipe spells out
        if self.pattern is not None and self.sparsity != default:
            raise ValueError(f"pattern {self.pattern} states the sparsity already; leave sparsity or pattern away")
        return self

    def keep_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern."""
        if self.pattern is None:
            return None
        n, m = self.pattern.split(":")
        return int(n), int(m)


class SharedSparsity(SparsitySelection):
    """Options of a method that makes linears sparse in one go and lets them share what all together lose."""

    densities: Literal["uniform", "erk", "magnitude"] = Field(
        "uniform",
        description="how linears share what all together lose: uniform, each the same part of its weights; erk, narrow ones "
        "less; magnitude, each what it has below one threshold for all of them",
    )

    @model_validator(mode="after")
    def _check_densities(self) -> "SharedSparsity":
        if self.pattern is not None and self.densities != "uniform":
            raise ValueError(f"pattern {self.pattern} is the same in every linear; leave densities or pattern away")
        return self


def count(sparsity: float, n_weights: int) -> int:
    """How many of n_weights become zero; halves are rounded up."""
    return floor(sparsity * n_weights + 0.5)


def smallest(scores: Tensor, n: int) -> Tensor:
    """Mask [..., candidates] of the n smallest scores of the last axis."""
    chosen = scores.argsort(dim=-1, stable=True)[..., :n]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def choose(scores: Tensor, options: SparsitySelection) -> Tensor:
    """Mask [out, in] of the weights that become zero, row by row; raises QtoolError where columns do not divide."""
    pattern = options.keep_of()
    if pattern is None:
        return smallest(scores, count(options.sparsity, scores.shape[1]))
    keep, of = pattern
    check_columns(scores.shape[1], of)
    return smallest(scores.unflatten(1, (-1, of)), of - keep).flatten(1)  # [out, in / M, M] inside


def choose_block(scores: Tensor, options: SparsitySelection, start: int) -> Tensor:
    """Mask [block, out] of the weights that become zero of columns start, start + 1, ..., a column of the matrix a row here.

    All rows of the matrix together, so many that after any block round(sparsity · weights so far) are zero; of N:M in each row.
    """
    pattern, (n_columns, n_out) = options.keep_of(), scores.shape
    if pattern is not None:
        return smallest(scores.T, pattern[1] - pattern[0]).T
    n = count(options.sparsity, (start + n_columns) * n_out) - count(options.sparsity, start * n_out)
    return smallest(scores.flatten(), n).view_as(scores)


def check_columns(n_columns: int, of: int) -> None:
    """Raise QtoolError where columns do not divide into neighbourhoods of `of`."""
    if n_columns % of:
        raise QtoolError(f"{n_columns} columns do not divide into patterns of {of}; ignore it or leave pattern away")
