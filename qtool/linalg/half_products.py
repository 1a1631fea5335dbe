"""Products of 16-bit matrices on a processor without units for them: by its float32 units, each result rounded once.

    C = round16(A B), the sums in float32, as units for bfloat16 and float16 do it too
torch's own way there is a loop over elements, of which one product takes 8 to 25 times as long as in float32 (512 x 512 on an
AVX2 processor: 169 ms and 7 ms); such processors are most of those on which CI jobs run.
Why the operators of torch are given another kernel, and models are not converted to float32: what a model computes stays what
it computes elsewhere, in half the memory, and everything that multiplies is reached, gradients too.
"""

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import cast

import torch
from torch import Tensor
from torch.library import Library

HALF = (torch.bfloat16, torch.float16)


def has_units() -> bool:
    """Whether this processor multiplies matrices in bfloat16 at least as fast as in float32."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Where training computes: in bfloat16, and on a processor that gains nothing by it in the weights' float32."""
    if device.type == "cpu" and not has_units():
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


@functools.cache
def use_float32_units() -> None:
    """From now on this process multiplies 16-bit matrices on the CPU by `mm` and those below, unless it has units for them."""
    if not has_units():
        register()


def register() -> None:
    """Give torch's products on the CPU these kernels, whatever the processor has."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that kernels are replaced: the purpose
        for kernel in (mm, bmm, addmm, baddbmm):
            _library().impl(kernel.__name__, kernel, "CPU")


@functools.cache
def _library() -> Library:
    """Holds the kernels for as long as the process lives."""
    return Library("aten", "IMPL")


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a [n, k] b [k, m]."""
    if a.dtype in HALF:
        return torch.mm(a.float(), b.float()).to(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[1])
    return cast(Tensor, torch.ops.aten.mm.out(a, b, out=out))  # an operator of its own, whose kernel is still torch's


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a [batch, n, k] b [batch, k, m]."""
    if a.dtype in HALF:
        return torch.bmm(a.float(), b.float()).to(a.dtype)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return cast(Tensor, torch.ops.aten.bmm.out(a, b, out=out))


def addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a b; a [n, k], b [k, m], c of a shape that expands to [n, m]."""
    if a.dtype in HALF:
        return torch.addmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
    out = a.new_empty(a.shape[0], b.shape[1])
    return cast(Tensor, torch.ops.aten.addmm.out(c, a, b, beta=beta, alpha=alpha, out=out))


def baddbmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """beta c + alpha a b; a [batch, n, k], b [batch, k, m], c of a shape that expands to [batch, n, m]."""
    if a.dtype in HALF:
        return torch.baddbmm(c.float(), a.float(), b.float(), beta=beta, alpha=alpha).to(a.dtype)
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return cast(Tensor, torch.ops.aten.baddbmm.out(c, a, b, beta=beta, alpha=alpha, out=out))
