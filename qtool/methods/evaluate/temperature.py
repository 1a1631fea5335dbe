"""A sweep of sampling temperatures: what a model writes at each, judged by the original, and how often it repeats itself.

    x_t ~ softmax(logits / T) after a prompt; T = 0 takes the likeliest token
    written_loss = mean over written tokens of -log p(x_t | before) of the original, at temperature 1, nats a token
    repetition = share of the written runs of four tokens that stand in the same text before
Both models draw with the same random numbers, prompt by prompt, so that differences are paired. Greedy decoding alone
misleads: rounding moves the tail of a distribution, which is drawn from only where T is high.
Source: Roy 2023, arXiv:2309.05210 (Understanding the Impact of Post-Training Quantization on Large Language Models), which
sweeps temperatures of quantized models. Differs: its texts are judged by repeated words, these also by the original's loss.
For: models that will be sampled from.
Costs: the whole model in memory, a pass for every written token, and one of the original over what was written.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.model.sampling import check_room, continued
from qtool.registry import Method

RUN = 4  # tokens that are one repetition


class TemperatureOptions(TextOptions):
    """Prompts, and how they are continued."""

    samples: int = Field(16, ge=1, description="prompts, each the beginning of a window")
    length: int = Field(32, ge=2, description="tokens of a prompt")
    shuffle: bool = Field(False, description="take documents in a seeded random order")
    tokens: int = Field(64, ge=RUN + 1, description="tokens to write after each prompt")
    temperatures: tuple[float, ...] = Field((0.0, 0.5, 1.0, 1.5), min_length=1, description="T; 0 takes the likeliest token")


def temperature(model: ModelHandle, reference: ModelHandle, options: TemperatureOptions, seed: int) -> list[Metric]:
    """Both figures at each temperature, and their means over all."""
    prompts = read_tokens(options, model.tokenizer, seed)  # [samples, length]
    length = options.length + options.tokens
    with model.materialized() as module:
        written = [
            continued(module, prompts, length, T, torch.Generator().manual_seed(seed)) for T in options.temperatures
        ]  # each [samples, length + tokens]
    losses = torch.stack([written_losses(reference, one, options.length) for one in written])  # [temperatures, samples]
    repeated = torch.stack([repetitions(one[:, options.length :]) for one in written])  # [temperatures, samples]
    found = (("written_loss", "nats/token", losses), ("repetition", "fraction", repeated))
    return [metric for one in found for metric in _metrics(options, *one)]


def _metrics(options: TemperatureOptions, name: str, unit: str, values: Tensor) -> Iterator[Metric]:
    yield mean_metric(name, options.source, unit, values.mean(0).tolist())
    for T, row in zip(options.temperatures, values, strict=True):
        yield mean_metric(name, options.source, unit, row.tolist(), part=f"temperature: {T:g}")


@torch.no_grad()
def written_losses(judge: ModelHandle, windows: Tensor, begun: int) -> Tensor:
    """Mean loss [windows], nats a token, float64, of the tokens from `begun` on."""
    losses = []
    with judge.materialized() as module:
        for window in windows:
            logits = module(window[None].to(judge.device), use_cache=False).logits[0, begun - 1 : -1].float()  # [tokens, vocab]
            losses.append(F.cross_entropy(logits, window[begun:].to(logits.device)).double().cpu())
    return torch.stack(losses)


def repetitions(written: Tensor) -> Tensor:
    """Share of the runs of RUN tokens that stood before in the same row of written [windows, tokens], [windows] float64."""
    shares = []
    for row in written.tolist():
        runs = [tuple(row[start : start + RUN]) for start in range(len(row) - RUN + 1)]
        shares.append(1 - len(set(runs)) / len(runs))
    return torch.tensor(shares, dtype=torch.float64)


def check_prompts(model: ModelHandle, options: TemperatureOptions) -> None:
    """Raise QtoolError for texts longer than the model takes, a temperature below zero, or prompts that cannot be had."""
    if min(options.temperatures) < 0:
        raise QtoolError(f"evaluate/temperature: temperatures holds {min(options.temperatures):g}; must be 0 or more")
    check_room(model.config, options.length, options.tokens, "evaluate/temperature")
    read_tokens(options, model.tokenizer, 0)


METHOD = Method(
    run=temperature,
    options=TemperatureOptions,
    scope="model",
    check=check_prompts,
    measures=("written_loss", "repetition"),
)
