"""Windows that the model writes itself, from its beginning-of-text token: calibration without any text.

    x_0 = BOS, or any token where the tokenizer has none,  x_t ~ softmax(logits(x_0 .. x_t-1) / T)
Source: Liu et al. 2023, arXiv:2305.17888 (LLM-QAT), section 3.1, its data-free text. Differs: every token is drawn, where it
takes the first three to five greedily; windows differ from their second token on.
For: models whose data are not to be had; what they write has the kinds of text that they know, in the shares they know them.
Costs: the whole model in memory, and a pass for every token of a window.
"""

import contextlib

import torch
from pydantic import Field
from torch import Tensor

from qtool.calibration.tokens import WrittenOptions, check_length
from qtool.model.handle import ModelHandle
from qtool.model.sampling import continued, in_float32
from qtool.registry import Method

TOGETHER = 64  # windows written side by side


class SelfGeneratedOptions(WrittenOptions):
    """How much is written, and how freely."""

    temperature: float = Field(1.0, gt=0, le=10, description="T: below 1, likely tokens are drawn yet more often")


def self_generated(model: ModelHandle, options: SelfGeneratedOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64."""
    random = torch.Generator().manual_seed(seed)
    bos, vocabulary = model.tokenizer.bos_token_id, len(model.tokenizer)
    first = torch.randint(vocabulary, (options.samples, 1), generator=random)  # [samples, 1]
    if bos is not None:
        first = torch.full_like(first, bos)
    with contextlib.ExitStack() as stack:
        module = stack.enter_context(model.materialized())
        if model.device.type == "cpu":
            stack.enter_context(in_float32(module))
        written = [continued(module, begun, options.length, options.temperature, random) for begun in first.split(TOGETHER)]
    return torch.cat(written)


def check_windows(model: ModelHandle, options: SelfGeneratedOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, before any work."""
    check_length("calibrate/self_generated", options, model.config.get_text_config())


METHOD = Method(run=self_generated, options=SelfGeneratedOptions, scope="model", check=check_windows)
