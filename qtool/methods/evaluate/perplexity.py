"""Perplexity over fixed windows of text, with its standard error, and its change from the original.

ppl = exp(mean of m_w),   m_w = mean over a window's tokens t >= 1 of -log p(token t | tokens before t in the window)
    m_w [samples] nats a token    d_w = m_w - m_w of the original    change = exp(mean of d_w) - 1
Every window stands alone, and each predicts its length - 1 next tokens: no stride, no overlap, no context from outside.
Standard errors by the delta method: ppl · std(m) / sqrt(samples), and (1 + change) · std(d) / sqrt(samples); pairing
windows takes out how hard each text is, so that the change is known far better than either perplexity.
Source: Jelinek et al. 1977, J. Acoust. Soc. Am. 62, S63. Log-softmax in float32, means in float64.
For: a figure to compare with papers; less sensitive than the KL divergence.
Costs: a pass over the text.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import TextOptions, check_length, read_tokens
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class PerplexityOptions(TextOptions):
    """The text and its windows, in file order."""

    shuffle: bool = Field(False, description="take documents in a seeded random order")


def perplexity(model: ModelHandle, reference: ModelHandle, options: PerplexityOptions, seed: int) -> list[Metric]:
    """Perplexity of the model and, where it is not the original itself, the change from the original."""
    tokens = read_tokens(options, model.tokenizer, seed)  # [samples, length]
    losses = window_losses(model, tokens)  # [samples]
    metrics = [mean_metric("perplexity", options.source, "ppl", losses.tolist(), is_log=True)]
    if model is not reference:
        difference = (losses - window_losses(reference, tokens)).tolist()  # [samples]
        ratio = mean_metric("perplexity_change", options.source, "fraction", difference, is_log=True)
        metrics.append(replace(ratio, value=ratio.value - 1, parts=tuple(part - 1 for part in ratio.parts or ())))
    return metrics


@torch.no_grad()
def window_losses(model: ModelHandle, tokens: Tensor) -> Tensor:
    """Mean loss of every window [samples], nats a token, float64."""
    hidden = model.final_hidden(tokens)  # [samples, length, hidden]
    means = []
    with model.outer():
        for sample, ids in zip(hidden.split(1), tokens, strict=True):  # one window's logits at a time
            logits = model.logits(sample)[0, :-1].float()  # [length - 1, vocab]
            losses = F.cross_entropy(logits, ids[1:].to(logits.device), reduction="none")  # [length - 1]
            means.append(losses.double().mean())
    return torch.stack(means).cpu()


def check_text(model: ModelHandle, options: PerplexityOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, or a text that is missing or too short, before any work."""
    check_length("evaluate/perplexity", options, model.config.get_text_config())
    read_tokens(options, model.tokenizer, 0)


METHOD = Method(run=perplexity, options=PerplexityOptions, scope="model", check=check_text)
