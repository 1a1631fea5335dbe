"""Walk: all samples through a block in step, so that one pass observes its linears and carries their changes on.

Every batch runs the block's own forward in a greenlet of its own. Where it comes to a stop, a linear, it waits with the
input in hand until the linear was changed, and goes on through whatever layer stands there then.
Why greenlets: the forward is transformers' own code and cannot be cut apart; threads would each start OpenMP's workers.
Memory: what the forwards hold while they wait, a few times the samples' activations; outputs take the inputs' place.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import cast

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor

from qtool.errors import QtoolError
from qtool.model.handle import Block


class Walk:
    """Iterate for the stops in the order of their calls, each with its inputs; then `finish`. A context manager."""

    def __init__(self, block: Block, hidden: Tensor, stops: Sequence[str]) -> None:
        """hidden [samples, length, hidden] in host memory becomes the walk's own: outputs are written over it."""
        self._block = block
        self._hidden = hidden
        self._stops = stops
        self._passed: set[str] = set()
        self._walkers = [_Walker(block, batch) for batch in block.batches(hidden)]

    def __enter__(self) -> "Walk":
        self._guard()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for walker in self._walkers:
            walker.throw()
        for name in self._stops:
            vars(self._block.get(name)).pop("forward", None)

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[str, list[Tensor]]]:
        """(stop, its input [batch, length, in] of every batch that comes there); change the linear, then go on."""
        order = list(self._block.linears())
        while waiting := self._advance():
            name = min(waiting, key=order.index)  # batches part only where experts are left out; those keep their order
            self._passed.add(name)
            yield name, [walker.input for walker in self._walkers if walker.at == name and walker.input is not None]
            self._guard()

    def finish(self) -> Tensor:
        """The block's output for all samples [samples, length, hidden], in host memory; only after the last stop."""
        assert all(walker.dead for walker in self._walkers), "finish() of a walk that still waits at a stop"
        return self._hidden

    def _advance(self) -> set[str]:
        """Let every batch go on to a stop not yet passed, or to the end; the stops where some wait now."""
        for walker in self._walkers:
            while not walker.dead and (walker.at is None or walker.at in self._passed):
                walker.switch()
        return {walker.at for walker in self._walkers if walker.at is not None}

    def _guard(self) -> None:
        """Let every stop's layer, as it stands now, call `_arrive` instead of its own forward."""
        for name in self._stops:
            self._block.get(name).forward = partial(self._arrive, name)

    def _arrive(self, name: str, x: Tensor) -> Tensor:
        if name in self._passed:
            raise QtoolError(f"{name} is called out of turn in the block's forward; set true_sequential: false")
        walker = cast(_Walker, getcurrent())
        walker.wait(name, x)
        layer = self._block.get(name)
        return cast(Tensor, type(layer).forward(layer, x))


class _Walker(greenlet):
    """One batch on its way through the block."""

    def __init__(self, block: Block, batch: Tensor) -> None:
        super().__init__()
        self.at: str | None = None
        self.input: Tensor | None = None
        self._block = block
        self._batch = batch

    def run(self) -> None:
        self._batch.copy_(self._block.call_from_host(self._batch))

    def wait(self, name: str, x: Tensor) -> None:
        """Hand over to the driver until it switches back."""
        assert self.parent is not None, "a walker always has the driver as its parent"
        self.at, self.input = name, x
        self.parent.switch()
        self.at = self.input = None
