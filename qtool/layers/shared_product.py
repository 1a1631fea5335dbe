"""SharedProduct: linears that read the same input, as q, k and v do, and gate and up, computed in one launch.

    [y_1 y_2 ...] = x [W_1; W_2; ...]ᵀ + [bias_1 bias_2 ...]      x [..., in]    W_i [out_i, in], all of one format and group
The first linear that is called computes the outputs of all; each other takes its own, where its input is that very tensor and
nobody has written into it since. Otherwise all are computed anew: right, though of no use to speed. An output is handed out
once, so that a caller who writes into it writes into nobody else's.
What goes unseen: torch counts no writes in inference mode, nor while it compiles. There a block that writes into x in place
between two of its linears gets for the second what the first one's x gives; one that makes a new tensor gets what is right.
Why that is left: the one other way to see a write is to read all of x again at each call.
Why at the call and not in the block: what stands where in a block is the model's own code, which stays as it is.
Why weights alone: inputs that are rounded or rotated first are a new tensor for each linear.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.kernels.weight_only import PackedWeight, matmul


@dataclass
class _Computed:
    """Outputs of all linears for one input, and which of them are left to hand out."""

    x: Tensor
    version: int | None
    outputs: tuple[Tensor, ...]
    left: set[int]


class SharedProduct:
    """Weights of several linears one after another, and their biases, if any has one."""

    def __init__(self, packed: PackedWeight, sizes: list[int], bias: Tensor | None) -> None:
        """packed: of all outputs; sizes: how many of them each linear has; bias [out of all] in the inputs' dtype."""
        assert sum(sizes) == packed.shape[0], f"{sizes} outputs of {packed.shape}"
        self.packed = packed
        self._sizes = sizes
        self._bias = bias
        self._last: _Computed | None = None

    def outputs_of(self, index: int, x: Tensor) -> Tensor:
        """y [..., out of linear `index`] of x [..., in]."""
        last = self._last  # read once: another thread may put its own there
        if last is None or last.x is not x or last.version != _version(x) or index not in last.left:
            y = matmul(x, self.packed, self._bias)  # [..., out of all]
            last = _Computed(x, _version(x), y.split(self._sizes, -1), set(range(len(self._sizes))))
        last.left.discard(index)
        self._last = last if last.left else None  # nothing is kept from one layer to the next
        return last.outputs[index]


class SharedPart(nn.Module):
    """One linear's product of a shared one."""

    name = "qtool CUDA"

    def __init__(self, shared: SharedProduct, index: int) -> None:
        super().__init__()
        self._shared, self._index = shared, index
        self.hidden_bytes = 0 if index else shared.packed.nbytes  # counted once

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., out] of x [..., in]; bias is a view of the shared one, which the product adds."""
        return self._shared.outputs_of(self._index, x)


def _version(x: Tensor) -> int | None:
    """Counts what is written into x; None where torch does not count: in inference mode, and while it compiles."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version
