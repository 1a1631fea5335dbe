"""A mixture of texts: windows of several sources, as many of each as its weight says.

    n_i = samples · w_i / sum of w, rounded so that they add up: the largest remainders get what is left over
Source: Hamilton's method of apportionment, 1792; why mixtures: Williams and Aletras 2024, arXiv:2311.09755 (what calibration
text does to quantization and pruning).
For: a model that will read several kinds of text, none of which is to be forgotten.
Costs: as calibrate/text.
"""

import random

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.tokens import TextOptions, TextSource, WrittenOptions, check_length, read_tokens
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class Share(TextSource):
    """One source of a mixture."""

    weight: float = Field(1.0, gt=0, description="its share of the windows, beside the others' weights")


class MixtureOptions(WrittenOptions):
    """The sources, and how much text they give together."""

    sources: tuple[Share, ...] = Field(min_length=1, description="texts with weights: [{source: ..., weight: 2}, ...]")
    pack: bool = Field(True, description="join documents into one stream; false: one document, one window")


def mixture(model: ModelHandle, options: MixtureOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64, sources in a seeded random order."""
    windows: list[Tensor] = []
    for share, count in zip(options.sources, counts_of(options), strict=True):
        if count:
            source = share.model_dump(exclude={"weight"})
            text = source | {"samples": count, "length": options.length, "pack": options.pack}
            windows += read_tokens(TextOptions.model_validate(text), model.tokenizer, seed)
    random.Random(seed).shuffle(windows)
    return torch.stack(windows)


def counts_of(options: MixtureOptions) -> list[int]:
    """Windows of each source."""
    total = sum(share.weight for share in options.sources)
    exact = [options.samples * share.weight / total for share in options.sources]
    counts = [int(one) for one in exact]
    largest = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])  # those that rounding took most from come first
    for index in largest[: options.samples - sum(counts)]:
        counts[index] += 1
    return counts


def check_windows(model: ModelHandle, options: MixtureOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a source that would give none, before any work."""
    check_length("calibrate/mixture", options, model.config.get_text_config())
    for share, count in zip(options.sources, counts_of(options), strict=True):
        if not count:
            raise QtoolError(f"calibrate/mixture: {share.source} gets none of {options.samples} windows; raise its weight")


METHOD = Method(run=mixture, options=MixtureOptions, scope="model", check=check_windows)
