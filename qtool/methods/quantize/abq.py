"""ABQ: learn each group's range, and a correction of the last linear, by outputs' size and direction and by attention.

Minimize over a block f whose linears round to nearest, W + m u vᵀ in ranges [sigmoid(b) min, sigmoid(a) max] of each group
    d(f^(x), f(x°)) + d(f^(x), f(x)) + J(A^(x), A(x)),    d, J of linalg/distance.py
    x, x° [samples, length, hidden]: what the block is fed in the changed and in the original model
    A [samples, heads, length, length] attention    a, b [out, groups, 1], 4 at first    m: mean |W|
    u [out, 1], v [1, in]: 0 and 1 at first, of the last linear of the first and the last blocks (down_proj), elsewhere none
by AdamW. u vᵀ is added before W is rounded, so that nothing of it is stored. Two bits have five levels, -2 .. 2, in the format
w2star (bit balance): 2.32 bits, and a level at zero in the middle.
Source: Zeng et al. 2024, arXiv:2408.08554 (ABQ-LLM), section 3. Differs: scales of channels are transform/let, put before; the
attention that A^ is compared with is that of f on the same x, not on x°; A and A^ are compared as they are, where the released
code takes their softmax once more; u counts in mean |W|; rates fall to zero. A block keeps plain rounding where that has the
less squared error.
Why 0.3: a and b must come from 4 to about 1, at a rate that falls. KL on 24 windows of the demo model's validation text after
30 steps of 4 windows of 128 tokens, w2starg64-aint8: 0.54 at 0.1; at 0.3 without the correction 0.324, with it 0.332, after as
many steps of LET 0.316; omniquant at 0.1 and 0.3 0.364, 0.334; plain rounding 1.37. What the correction can give shows after
a ReLU, whose outputs all have one sign.
For: two-bit weights, or inputs of eight and fewer bits, where clipping alone leaves the block's direction wrong.
Costs: two forward passes and one backward pass through every block per update; eager attention, length² shares a head.
"""

import re
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.rounded_linear import RoundedLinear, group_values
from qtool.linalg.distance import distance_from_both, symmetric_kl
from qtool.model.attention import EagerAttention
from qtool.model.handle import Block
from qtool.model.linear import weight_of
from qtool.model.tuning import window_errors
from qtool.model.wiring import find_groups
from qtool.options import BlockTuning
from qtool.registry import Method

START = 4.0  # of a and b


class AbqOptions(SchemeSelection, BlockTuning):
    """Options of ABQ."""

    batch: int = Field(4, ge=1, description="windows in one update")
    lr: float = Field(0.3, gt=0, le=1, description="AdamW's rate for a and b, at first")
    correction_lr: float = Field(0.03, gt=0, le=1, description="AdamW's rate for u and v, at first")
    corrected: int = Field(1, ge=0, description="blocks at either end whose last linear is corrected; the paper: 3 and 4")


class Learned:
    """What learns in one linear: the ends of its ranges, and u and v where it is corrected."""

    def __init__(self, W: Tensor, bias: Tensor | None, scheme: Scheme, is_corrected: bool) -> None:
        """W [out, in], float32."""
        self._W, self._bias, self._scheme, self._unit = W, bias, scheme, W.abs().mean()
        self.ends = [group_values(W, scheme, START).requires_grad_() for _ in range(2)]  # a, b
        self.correction = [torch.zeros_like(W[:, :1]), torch.ones_like(W[:1])] if is_corrected else []  # u, v
        for p in self.correction:
            p.requires_grad_()

    def layer(self) -> RoundedLinear:
        """The linear as it is rounded now; gradients reach all that learns."""
        a, b = self.ends
        W = self._W if not self.correction else self._W + self._unit * self.correction[0] * self.correction[1]
        return RoundedLinear(W, self._bias, self._scheme, a.sigmoid(), b.sigmoid())

    def plain(self) -> RoundedLinear:
        """The linear rounded to nearest in full ranges."""
        return RoundedLinear(self._W, self._bias, self._scheme)


def abq(
    block: Block,
    inputs: Tensor,
    targets: Tensor,
    schemes: dict[str, Scheme],
    options: AbqOptions,
    seed: int,
    note: Callable[[str], None],
) -> dict[str, QuantizedTensor]:
    """Quantize the linears named in `schemes`; inputs, targets [samples, length, hidden], the targets f(x°)."""
    corrected = last_linears(block, inputs) if is_near_an_end(block, options.corrected) else set()
    linears = {
        name: Learned(weight_of(block.get(name)), getattr(block.get(name), "bias", None), scheme, kind_of(name) in corrected)
        for name, scheme in schemes.items()
    }
    batch = min(options.batch, len(inputs))
    attention = EagerAttention(block.model, inputs.shape[1], batch)
    reason = attention.weights(block, inputs[:batch])
    if isinstance(reason, str):
        note(f"attention takes no part in the loss: {reason}")
    own = block.forward(inputs)  # [samples, length, hidden], f(x)

    def loss_of(rows: Tensor) -> Tensor:
        x = inputs[rows]  # [batch, length, hidden]
        n_tokens = x[..., 0].numel()  # a sum, as float16 would not hold the gradients of a mean
        if isinstance(reason, str):
            with block.replaced({name: linear.layer() for name, linear in linears.items()}):
                return n_tokens * distance_from_both(block.call_from_host(x), targets[rows], own[rows])
        with torch.no_grad():
            _, maps = attention.forward(block, x)
        with block.replaced({name: linear.layer() for name, linear in linears.items()}):
            out, rounded = attention.forward(block, x)
        divergence = sum((symmetric_kl(A, B) for A, B in zip(maps, rounded, strict=True)), torch.zeros((), device=out.device))
        return n_tokens * (distance_from_both(out.to(x.device), targets[rows], own[rows]) + divergence.to(x.device))

    learn(linears, loss_of, len(inputs), batch, options, seed)
    with block.replaced({name: linear.plain() for name, linear in linears.items()}):
        before = window_errors(block.call_from_host, inputs, targets).sum()
    with torch.no_grad(), block.replaced({name: linear.layer() for name, linear in linears.items()}):
        after = window_errors(block.call_from_host, inputs, targets).sum()
    if not after <= before:
        note("learning did not lower the error of the block's output; rounded to nearest in the full range")
        return {name: linear.plain().quantized() for name, linear in linears.items()}
    return {name: linear.layer().quantized() for name, linear in linears.items()}


def learn(
    linears: dict[str, Learned],
    loss_of: Callable[[Tensor], Tensor],
    n_windows: int,
    batch: int,
    options: AbqOptions,
    seed: int,
) -> None:
    """Carry out the updates, each by the loss of a few windows; loss_of takes their numbers [batch]."""
    groups = [
        {"params": [p for linear in linears.values() for p in linear.ends], "lr": options.lr},
        {"params": [p for linear in linears.values() for p in linear.correction], "lr": options.correction_lr},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(options.steps, 1))
    learned = [p for group in optimizer.param_groups for p in group["params"]]
    random = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        loss = loss_of(torch.randperm(n_windows, generator=random)[:batch])
        gradients = torch.autograd.grad(loss, learned, allow_unused=True)
        for p, gradient in zip(learned, gradients, strict=True):
            p.grad = torch.zeros_like(p) if gradient is None else gradient  # an expert that no token came to
        optimizer.step()
        falling.step()


def is_near_an_end(block: Block, n: int) -> bool:
    """Whether the block is one of the first n or of the last n."""
    return block.index < n or block.index >= block.model.n_blocks - n


def last_linears(block: Block, inputs: Tensor) -> set[str]:
    """The kind of the linear that the block calls last."""
    return {kind_of(name) for name in find_groups(block, inputs[:1])[-1].linears}


def kind_of(name: str) -> str:
    """A linear's name without numbers, so that experts are of one kind."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", name)


METHOD = Method(run=abq, options=AbqOptions, scope="block")
