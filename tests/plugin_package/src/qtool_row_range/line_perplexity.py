"""Perplexity of the tokens that begin a line, where a language model is least sure.

    ppl = exp(mean over windows of the mean of -log p(token) over tokens that follow a line's end)
Source: an example of a metric of one's own; perplexity as in Jelinek et al. 1977, J. Acoust. Soc. Am. 62, S63.
For: showing how a package brings a metric: one function, one entry point, nothing else.
Costs: a pass over the text.
"""

import torch

from qtool.artifact import Metric, mean_metric
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.model.handle import ModelHandle
from qtool.registry import Method


def line_perplexity(model: ModelHandle, reference: ModelHandle, options: WindowOptions, seed: int) -> list[Metric]:
    """One figure; qtool pairs its windows with the original's."""
    windows = read_windows(options, model.tokenizer, seed)
    hidden = model.final_hidden(windows.tokens)  # [samples, length, hidden]
    losses, counts = [], []
    with model.outer(), torch.no_grad():
        for sample, ids in zip(hidden.split(1), windows.tokens, strict=True):
            log_p = model.logits(sample)[0, :-1].float().log_softmax(-1)  # [length - 1, vocab]
            begins = torch.tensor(["\n" in model.tokenizer.decode(token) for token in ids[:-1]])  # [length - 1]
            if begins.any():
                losses.append(-float(log_p.gather(1, ids[1:, None])[begins].mean()))
                counts.append(float(begins.sum()))
    return [mean_metric("line_perplexity", options.source, "ppl", losses, counts, is_log=True)]


METHOD = Method(run=line_perplexity, options=WindowOptions, scope="model", measures=("line_perplexity",))
