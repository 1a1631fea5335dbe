"""Perplexity over fixed or sliding windows of text, its bits per byte, and its change from the original.

ppl = exp(sum of w_i m_i / sum of w_i),   m_i = mean over a window's counted tokens of -log p(token | tokens before it there)
    m [samples] nats a token    w [samples] how many tokens count: length - 1 in fixed windows, what is new in sliding ones
bits_per_byte = sum of w_i m_i / (ln 2 · bytes of the counted tokens' text), which does not depend on the tokenizer
perplexity_change = ppl / ppl of the original - 1
Standard errors over windows, by the delta method; pairing windows takes out how hard each text is, so that the change is
known far better than either perplexity.
Source: Jelinek et al. 1977, J. Acoust. Soc. Am. 62, S63; bits per byte: Gao et al. 2020, arXiv:2101.00027, section 3.1.
Log-softmax in float32, means in float64.
For: a figure to compare with papers, which quote wikitext2:test and c4:validation; less sensitive than the KL divergence.
Costs: a pass over the text; length / stride of them where windows slide.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import check_length
from qtool.calibration.windows import WindowOptions, Windows, read_windows
from qtool.model.handle import ModelHandle
from qtool.registry import Method


def perplexity(model: ModelHandle, reference: ModelHandle, options: WindowOptions, seed: int) -> list[Metric]:
    """Of all windows and of each domain's; the change where the model is not the original itself."""
    windows = read_windows(options, model.tokenizer, seed)
    losses = window_losses(model, windows)  # [samples]
    before = None if model is reference else window_losses(reference, windows)
    return [metric for part in windows.parts() for metric in _metrics(options.source, *part, windows, losses, before)]


def _metrics(
    source: str, part: str | None, chosen: list[int], windows: Windows, losses: list[float], before: list[float] | None
) -> Iterator[Metric]:
    values, weights = [losses[i] for i in chosen], [float(windows.counted[i]) for i in chosen]
    yield mean_metric("perplexity", source, "ppl", values, weights, is_log=True, part=part)
    if before is not None:
        differences = [losses[i] - before[i] for i in chosen]
        ratio = mean_metric("perplexity_change", source, "fraction", differences, weights, is_log=True, part=part)
        yield replace(ratio, value=ratio.value - 1, parts=tuple(one - 1 for one in ratio.parts or ()))
    if windows.n_bytes is not None and all(windows.n_bytes[i] for i in chosen):
        sizes = [float(windows.n_bytes[i]) for i in chosen]
        bits = [loss * weight / size / math.log(2) for loss, weight, size in zip(values, weights, sizes, strict=True)]
        yield mean_metric("bits_per_byte", source, "bits/byte", bits, sizes, part=part)


@torch.no_grad()
def window_losses(model: ModelHandle, windows: Windows) -> list[float]:
    """Mean loss of every window's counted tokens [samples], nats a token."""
    hidden = model.final_hidden(windows.tokens)  # [samples, length, hidden]
    means = []
    with model.outer():
        for sample, ids, count in zip(hidden.split(1), windows.tokens, windows.counted, strict=True):
            logits = model.logits(sample[:, -count - 1 :])[0, :-1].float()  # [counted, vocab], one window's at a time
            losses = F.cross_entropy(logits, ids[-count:].to(logits.device), reduction="none")  # [counted]
            means.append(float(losses.double().mean()))
    return means


def check_text(model: ModelHandle, options: WindowOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a text that is missing or too short, before any work."""
    check_length("evaluate/perplexity", options, model.config.get_text_config())
    read_windows(options, model.tokenizer, 0)


METHOD = Method(
    run=perplexity,
    options=WindowOptions,
    scope="model",
    check=check_text,
    measures=("perplexity", "perplexity_change", "bits_per_byte"),
)
