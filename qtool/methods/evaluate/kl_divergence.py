"""Mean KL divergence of a model's next-token distribution from the original's, and how often their first choices agree.

KL(p ‖ q) = sum over v of p_v (log p_v - log q_v)    p, q [vocab], of the original and the model after the same tokens
top1_agreement: how often both hold the same token likeliest; topK_agreement: the share of the original's K likeliest tokens
that are among the model's K likeliest.
Over the counted tokens of every window, those that perplexity scores too; also by domain, and by how many tokens stand
before a position in its window. Zero only where nothing changed; it sees damage that perplexity averages away, needs no
labels, and varies less from text to text. Log-softmax in float32, means in float64, standard errors over windows.
Source: Kullback and Leibler 1951, doi:10.1214/aoms/1177729694
For: judging compression first: it sees every token's whole prediction, so small changes show.
Costs: a pass of both models over the text; the original's is kept on disk for the next recipe.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import check_length
from qtool.calibration.windows import WindowOptions, Windows, read_windows
from qtool.linalg.divergence import kl
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class KlOptions(WindowOptions):
    """The text and its windows, in file order, and how many of the likeliest tokens are compared."""

    top_k: int = Field(5, ge=2, le=1000, description="K of topK_agreement, beside top1_agreement")


@torch.no_grad()
def kl_divergence(model: ModelHandle, reference: ModelHandle, options: KlOptions, seed: int) -> list[Metric]:
    """KL from the original in nats a token, and agreements; exactly 0 and 1 for the original itself."""
    windows = read_windows(options, model.tokenizer, seed)
    hidden, original = model.final_hidden(windows.tokens), reference.final_hidden(windows.tokens)  # [samples, length, hidden]
    measured = []
    with contextlib.ExitStack() as stack:
        for handle in {model, reference}:
            stack.enter_context(handle.outer())
        for sample, original_sample, count in zip(hidden.split(1), original.split(1), windows.counted, strict=True):
            q = model.logits(sample[:, -count - 1 :])[0, :-1]  # [counted, vocab], logits of one window at a time
            p = reference.logits(original_sample[:, -count - 1 :])[0, :-1].to(q.device)  # [counted, vocab]
            ours, theirs = (x.topk(min(options.top_k, x.shape[-1]), -1).indices for x in (q, p))  # [counted, k]
            shared = (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).double().mean(-1)  # [counted]
            measured.append(torch.stack([kl(p, q).double(), (p.argmax(-1) == q.argmax(-1)).double(), shared]).cpu())
    names = (("kl_divergence", "nats/token"), ("top1_agreement", "fraction"), (f"top{options.top_k}_agreement", "fraction"))
    found = [metric for row, name in enumerate(names) for metric in _metrics(options.source, *name, row, windows, measured)]
    # The original's own figures are 0 and 1 by definition: nothing to be compared with.
    return [replace(metric, parts=None) for metric in found] if model is reference else found


def _metrics(source: str, name: str, unit: str, row: int, windows: Windows, measured: list[Tensor]) -> Iterator[Metric]:
    """One figure of all windows, of each domain, and by position; measured: [figures, counted] of each window."""
    means = [float(one[row].mean()) for one in measured]
    for part, chosen in windows.parts():
        values, weights = [means[i] for i in chosen], [float(windows.counted[i]) for i in chosen]
        yield mean_metric(name, source, unit, values, weights, part=part, higher_is_better=unit == "fraction")
    length = windows.tokens.shape[1]
    for first, end in buckets(length):
        values, weights = list[float](), list[float]()
        for one, count in zip(measured, windows.counted, strict=True):
            begins = length - count  # position of the first counted token
            inside = one[row][max(first - begins, 0) : max(end - begins, 0)]
            if len(inside):
                values.append(float(inside.mean()))
                weights.append(float(len(inside)))
        if values:
            label = f"positions: {first}-{end - 1}"
            yield mean_metric(name, source, unit, values, weights, part=label, higher_is_better=unit == "fraction")


def buckets(length: int) -> Iterator[tuple[int, int]]:
    """[first, end) of positions 1 .. length - 1, by the tokens before them: 1-15, 16-63, 64-255, each four times the last."""
    first, end = 1, 16
    while first < length:
        yield first, min(end, length)
        first, end = end, 4 * end


def check_text(model: ModelHandle, options: KlOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a text that is missing or too short, before any work."""
    check_length("evaluate/kl_divergence", options, model.config.get_text_config())
    read_windows(options, model.tokenizer, 0)


METHOD = Method(
    run=kl_divergence,
    options=KlOptions,
    scope="model",
    check=check_text,
    measures=("kl_divergence", "top*_agreement"),
)
