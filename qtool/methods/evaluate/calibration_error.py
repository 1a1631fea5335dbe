"""Calibration error: how far a model's confidence in its next token is from how often it is right (ECE).

ECE = sum over bins b of n_b / n · |right_b / n_b - confidence_b / n_b|
    confidence of a position: the largest probability, which falls into one of equally wide bins; right: whether that token
    follows; n_b positions of a bin, sums over them
Over the counted tokens of every window; also by domain, and the accuracy of each bin, which is the reliability diagram.
Compression can leave accuracy as it was and still make a model surer, or less sure, than it should be.
Source: Naeini et al. 2015, AAAI, and Guo et al. 2017, arXiv:1706.04599, equation 3. Standard errors: jackknife over windows.
For: models whose probabilities are used: speculative decoding, thresholds, abstaining.
Costs: a pass over the text.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import check_length
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.linalg.contributions import jackknife_parts, standard_error
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class CalibrationErrorOptions(WindowOptions):
    """The text and its windows, in file order, and how finely confidence is told apart."""

    bins: int = Field(15, ge=1, le=1000, description="bins of confidence, equally wide")


def calibration_error(model: ModelHandle, reference: ModelHandle, options: CalibrationErrorOptions, seed: int) -> list[Metric]:
    """The error, the mean confidence and the accuracy."""
    windows = read_windows(options, model.tokenizer, seed)
    hidden = model.final_hidden(windows.tokens)  # [samples, length, hidden]
    sums = []
    with model.outer(), torch.no_grad():
        for sample, ids, count in zip(hidden.split(1), windows.tokens, windows.counted, strict=True):
            logits = model.logits(sample[:, -count - 1 :])[0, :-1]  # [counted, vocab], one window's at a time
            sums.append(bin_sums(logits, ids[-count:], options.bins))
    every = torch.stack(sums)  # [samples, bins, 3]
    return [metric for part in windows.parts() for metric in _metrics(options, every, *part)]


def _metrics(options: CalibrationErrorOptions, every: Tensor, part: str | None, chosen: list[int]) -> Iterator[Metric]:
    sums = every[chosen]  # [windows, bins, 3]
    total = sums.sum(0)  # [bins, 3]
    error = expected_error(total)
    without = [expected_error(total - one) for one in sums] if len(chosen) > 1 else [error]
    parts = jackknife_parts(error, without)
    yield Metric("calibration_error", options.source, error, "fraction", standard_error(parts), part, False, parts, len(parts))
    counts = sums[:, :, 0].sum(1)  # [windows]
    for name, column in (("confidence", 1), ("accuracy", 2)):
        values = (sums[:, :, column].sum(1) / counts).tolist()
        found = mean_metric(name, options.source, "fraction", values, counts.tolist(), part=part)
        yield replace(found, higher_is_better=True if name == "accuracy" else None)
    for index in range(options.bins) if part is None else ():
        inside = sums[:, index][sums[:, index, 0] > 0]  # [windows that have any, 3]
        if len(inside):
            label = f"confidence: {index / options.bins:.2f}-{(index + 1) / options.bins:.2f}"
            shares = (inside[:, 2] / inside[:, 0]).tolist()
            yield mean_metric(
                "accuracy", options.source, "fraction", shares, inside[:, 0].tolist(), part=label, higher_is_better=True
            )


def bin_sums(logits: Tensor, labels: Tensor, n_bins: int) -> Tensor:
    """Positions, sum of confidences, and how many are right, of each bin [bins, 3] float64; logits [positions, vocab]."""
    confidence, guess = logits.float().softmax(-1).max(-1)  # [positions]
    right = guess.cpu() == labels  # [positions]
    places = (confidence.double().cpu() * n_bins).long().clamp(max=n_bins - 1)  # [positions]
    rows = torch.stack([torch.ones(len(labels), dtype=torch.float64), confidence.double().cpu(), right.double()], dim=1)
    return torch.zeros(n_bins, 3, dtype=torch.float64).index_add_(0, places, rows)


def expected_error(sums: Tensor) -> float:
    """ECE of sums [bins, 3]."""
    return float((sums[:, 2] - sums[:, 1]).abs().sum() / sums[:, 0].sum())


def check_text(model: ModelHandle, options: CalibrationErrorOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a text that is missing or too short, before any work."""
    check_length("evaluate/calibration_error", options, model.config.get_text_config())
    read_windows(options, model.tokenizer, 0)


METHOD = Method(
    run=calibration_error,
    options=CalibrationErrorOptions,
    scope="model",
    check=check_text,
    measures=("calibration_error", "confidence", "accuracy"),
)
