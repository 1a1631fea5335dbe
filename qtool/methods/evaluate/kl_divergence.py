"""Mean KL divergence of a model's next-token distribution from the original's, and how often their first choices agree.

KL(p ‖ q) = sum over v of p_v (log p_v - log q_v)    p, q [vocab], of the original and the model after the same tokens
Over the length - 1 positions of every window that perplexity scores too. Zero only where nothing changed; it sees
damage that perplexity averages away, needs no labels, and varies less from text to text. Log-softmax in float32,
means in float64, standard errors over windows.
Source: Kullback and Leibler 1951, doi:10.1214/aoms/1177729694
For: judging compression first: it sees every token's whole prediction, so small changes show.
Costs: a pass of both models over the text.
"""

import contextlib
from dataclasses import replace

import torch
from pydantic import Field

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import TextOptions, check_length, read_tokens
from qtool.linalg.divergence import kl
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class KlOptions(TextOptions):
    """The text and its windows, in file order."""

    shuffle: bool = Field(False, description="take documents in a seeded random order")


@torch.no_grad()
def kl_divergence(model: ModelHandle, reference: ModelHandle, options: KlOptions, seed: int) -> list[Metric]:
    """KL from the original in nats a token, and top-1 agreement; exactly 0 and 1 for the original itself."""
    tokens = read_tokens(options, model.tokenizer, seed)  # [samples, length]
    hidden, original = model.final_hidden(tokens), reference.final_hidden(tokens)  # [samples, length, hidden]
    divergences, agreements = [], []
    with contextlib.ExitStack() as stack:
        for handle in {model, reference}:
            stack.enter_context(handle.outer())
        for sample, original_sample in zip(hidden.split(1), original.split(1), strict=True):  # one window at a time
            q = model.logits(sample)[0, :-1]  # [length - 1, vocab], logits
            p = reference.logits(original_sample)[0, :-1].to(q.device)  # [length - 1, vocab]
            divergences.append(float(kl(p, q).double().mean()))
            agreements.append(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    # The original's own figures are 0 and 1 by definition: nothing to be compared with.
    found = [
        mean_metric("kl_divergence", options.source, "nats/token", divergences),
        mean_metric("top1_agreement", options.source, "fraction", agreements, higher_is_better=True),
    ]
    return [replace(metric, parts=None) for metric in found] if model is reference else found


def check_text(model: ModelHandle, options: KlOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a text that is missing or too short, before any work."""
    check_length("evaluate/kl_divergence", options, model.config.get_text_config())
    read_tokens(options, model.tokenizer, 0)


METHOD = Method(run=kl_divergence, options=KlOptions, scope="model", check=check_text)
