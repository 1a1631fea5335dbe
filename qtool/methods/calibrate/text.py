"""Windows of tokens from text, the inputs that later steps take their statistics from.

    tokens [samples, length]
Source: the usual 128 windows of GPTQ (arXiv:2210.17323, section 4) and AWQ (arXiv:2306.00978, section 5).
For: every step after it that looks at inputs; text like what the model will read.
Costs: a minute of tokenizing at most; 128 windows of 512 tokens are enough for most methods.
"""

from pydantic import Field
from torch import Tensor

from qtool.calibration.tokens import TextOptions, check_length, read_tokens
from qtool.model.handle import ModelHandle
from qtool.registry import Method


class CalibrationOptions(TextOptions):
    """Which text, and how much of it."""

    samples: int = Field(128, ge=1, description="windows to take")


def text(model: ModelHandle, options: CalibrationOptions, seed: int) -> Tensor:
    """Tokens [samples, length] int64."""
    return read_tokens(options, model.tokenizer, seed)


def check_windows(model: ModelHandle, options: CalibrationOptions) -> None:
    """Raise QtoolError for windows longer than the model takes, before any work."""
    check_length("calibrate/text", options, model.config.get_text_config())


METHOD = Method(run=text, options=CalibrationOptions, scope="model", check=check_windows)
