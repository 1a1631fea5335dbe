"""Twin: the model as it was before a step, which goes through the blocks beside the one that changes."""

import contextlib
from collections.abc import Iterator

from torch import Tensor

from qtool.model.handle import ModelHandle
from qtool.model.walk import Walk


class Twin:
    """The model as it was before the step, with what its next block is fed."""

    def __init__(self, model: ModelHandle, tokens: Tensor) -> None:
        self.model = model
        self.hidden = model.embed(tokens)

    def forward(self, index: int) -> Tensor:
        """Go through block `index`; returns its output [samples, length, hidden]."""
        self.hidden = self.model.block(index).forward(self.hidden)
        self.model.release(index)
        return self.hidden

    @contextlib.contextmanager
    def walk(self, index: int, stops: list[str]) -> Iterator[Walk]:
        """A walk through block `index`, which takes `hidden` along."""
        with Walk(self.model.block(index), self.hidden, stops) as walk:
            yield walk
        self.model.release(index)
