"""Generation: what a model writes after some prompts, taking the likeliest token, and how fast and in how much memory.

    first_token: seconds from a prompt to its first token      tokens_per_second: of those after it, one text at a time
    model_memory: GiB of parameters and buffers; on a GPU the peak of all that was allocated
    cache_memory: GiB of keys and values at a text's end, as generate() keeps them: of quantize/kivi packed codes and scales
Greedy, so that the texts of original and compressed model differ only where their likeliest tokens do; they stand side by
side in the report. Speed is that of the model as it runs here, in PyTorch, with quantized layers decoded on the fly: it
tells of this machine and qtool's own layers, not of the runtime that will serve an export.
Source: greedy decoding, as transformers' generate does it, https://huggingface.co/docs/transformers/main_classes/text_generation
For: reading what compression did, and whether qtool.load is fast enough for what you do with it.
Costs: the whole model in memory, and a pass for every written token.
"""

import time

import torch
from pydantic import Field
from torch import Tensor

from qtool.artifact import Metric, Sample, mean_metric
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.model.handle import ModelHandle
from qtool.model.sampling import cache_bytes, check_room, continued_with_cache
from qtool.registry import Method


class GenerationOptions(TextOptions):
    """Prompts, and how many tokens are written."""

    samples: int = Field(4, ge=1, description="prompts, each the beginning of a window")
    length: int = Field(32, ge=2, description="tokens of a prompt")
    shuffle: bool = Field(False, description="take documents in a seeded random order")
    tokens: int = Field(64, ge=2, description="tokens to write after each prompt")


def generation(model: ModelHandle, reference: ModelHandle, options: GenerationOptions, seed: int) -> list[Metric | Sample]:
    """Texts, speed and memory."""
    prompts = read_tokens(options, model.tokenizer, seed)  # [samples, length]
    firsts, rates, samples = [], [], []
    with model.materialized() as module:
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(model.device)

        def write(prompt: Tensor, n_tokens: int) -> tuple[Tensor, int, float]:
            """The likeliest tokens [tokens] after a prompt [1, length], end or no end, the cache's bytes then, and seconds."""
            begun = time.perf_counter()
            windows, cache = continued_with_cache(module, prompt, options.length + n_tokens, 0.0, torch.Generator())
            return windows[0, options.length :], cache_bytes(cache), time.perf_counter() - begun

        write(prompts[:1], 2)  # the first call of all also loads libraries
        for prompt in prompts.split(1):
            _, _, first = write(prompt, 1)
            written, cached, whole = write(prompt, options.tokens)  # as many bytes for each
            firsts.append(first)
            rates.append((options.tokens - 1) / max(whole - first, 1e-9))
            asked, answer = (str(model.tokenizer.decode(ids)) for ids in (prompt[0], until_end(model, written)))
            samples.append(Sample(options.source, asked, answer))
        tensors = {id(one): one for one in (*module.parameters(), *module.buffers())}.values()
        memory = sum(one.nbytes for one in tensors)
        if model.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated(model.device)
    return [
        mean_metric("first_token", options.source, "s", firsts),
        mean_metric("tokens_per_second", options.source, "tokens/s", rates, higher_is_better=True),
        Metric("model_memory", options.source, memory / 2**30, "GiB", higher_is_better=False),
        Metric("cache_memory", options.source, cached / 2**30, "GiB", higher_is_better=False),
        *samples,
    ]


def until_end(model: ModelHandle, written: Tensor) -> Tensor:
    """The tokens before the one that ends a text."""
    ends = (written == model.tokenizer.eos_token_id).nonzero() if model.tokenizer.eos_token_id is not None else written[:0]
    return written[: int(ends[0])] if len(ends) else written


def check_prompts(model: ModelHandle, options: GenerationOptions) -> None:
    """Raise QtoolError for texts longer than the model takes, or prompts that cannot be had."""
    check_room(model.config, options.length, options.tokens, "evaluate/generation")
    read_tokens(options, model.tokenizer, 0)


METHOD = Method(
    run=generation,
    options=GenerationOptions,
    scope="model",
    check=check_prompts,
    measures=("first_token", "tokens_per_second", "model_memory", "cache_memory"),
    repeats=False,
)
