"""Generation: what a model writes after some prompts, taking the likeliest token, and how fast and in how much memory.

    first_token: seconds from a prompt to its first token      tokens_per_second: of those after it, one text at a time
    model_memory: GiB of parameters and buffers; on a GPU the peak of all that was allocated
Greedy, so that the texts of original and compressed model differ only where their likeliest tokens do; they stand side by
side in the report. Speed is that of the model as it runs here, in PyTorch, with quantized layers decoded on the fly: it
tells of this machine and qtool's own layers, not of the runtime that will serve an export.
Source: transformers' generate, https://huggingface.co/docs/transformers/main_classes/text_generation, greedy decoding.
For: reading what compression did, and whether qtool.load is fast enough for what you do with it.
Costs: the whole model in memory, and a pass for every written token.
"""

import time
from typing import cast

import torch
from pydantic import Field
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from qtool.artifact import Metric, Sample, mean_metric
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
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
        write(module, prompts[:1], 2, model.device)  # the first call of all also loads libraries
        for prompt in prompts.split(1):
            _, first = timed(module, prompt, 1, model.device)
            written, whole = timed(module, prompt, options.tokens, model.device)
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
        *samples,
    ]


def timed(module: PreTrainedModel, prompt: Tensor, n_tokens: int, device: torch.device) -> tuple[Tensor, float]:
    """What was written [tokens], and the seconds it took."""
    begun = time.perf_counter()
    written = write(module, prompt, n_tokens, device)
    return written, time.perf_counter() - begun


@torch.no_grad()
def write(module: PreTrainedModel, prompt: Tensor, n_tokens: int, device: torch.device) -> Tensor:
    """The likeliest tokens [tokens] after a prompt [1, length], whether or not one of them ends the text."""
    settings = GenerationConfig(max_new_tokens=n_tokens, do_sample=False, use_cache=True, pad_token_id=0)
    ids = prompt.to(device)
    out = cast(GenerationMixin, module).generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    return cast(Tensor, out)[0, prompt.shape[1] :].cpu()


def until_end(model: ModelHandle, written: Tensor) -> Tensor:
    """The tokens before the one that ends a text."""
    ends = (written == model.tokenizer.eos_token_id).nonzero() if model.tokenizer.eos_token_id is not None else written[:0]
    return written[: int(ends[0])] if len(ends) else written


def check_prompts(model: ModelHandle, options: GenerationOptions) -> None:
    """Raise QtoolError for texts longer than the model takes, or prompts that cannot be had."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and options.length + options.tokens > limit:
        raise QtoolError(
            f"evaluate/generation: length {options.length} and {options.tokens} written tokens are more than the model's "
            f"{limit} positions; lower one of them"
        )
    read_tokens(options, model.tokenizer, 0)


METHOD = Method(
    run=generation,
    options=GenerationOptions,
    scope="model",
    check=check_prompts,
    measures=("first_token", "tokens_per_second", "model_memory"),
    repeats=False,
)
