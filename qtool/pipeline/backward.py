"""One pass of gradients from the logits to the first block, one block in memory at a time.

What is differentiated is the log-likelihood of the model's own draws: sum over positions of log p(y_t), y_t drawn from p_t;
see linalg/divergence.py for what its gradients say of KL.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from qtool.linalg.divergence import log_likelihood_of_draws
from qtool.model.handle import Block, ModelHandle
from qtool.progress import Progress

# (output, x, gradient by the output, None where that is the log-likelihood itself) -> gradient by x [1, length, hidden]
Take = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def go_back(
    model: ModelHandle,
    hidden: list[Tensor],
    seed: int,
    watch: Callable[[Block], AbstractContextManager[Take]],
    progress: Progress,
) -> None:
    """Take every block, last first, and before them what stands outside, one window at a time: its logits are the largest.

    hidden: what each block is fed [samples, length, hidden], and what the last one gives; emptied on the way. `watch` is
    entered once for each block, with the outside as a block that has no name.
    """
    upstream: list[Tensor] = []  # gradient after the block in hand, of every window [1, length, hidden]
    random = torch.Generator().manual_seed(seed)
    with model.outer(), watch(Block(model, -1, model.model, "")) as take:
        for window in hidden.pop().split(1):
            x = window.to(model.device).requires_grad_()
            upstream.append(take(log_likelihood_of_draws(model.logits(x)[0], random), x, None))
    progress.advance("output")
    for index in reversed(range(model.n_blocks)):
        block = model.block(index)
        with watch(block) as take:
            for place, window in enumerate(hidden.pop().split(1)):
                x = window.to(model.device).requires_grad_()
                upstream[place] = take(block.call(x), x, upstream[place])
        model.release(index)
        progress.advance(block.name)
