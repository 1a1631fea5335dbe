"""TrainedLinear: a linear layer whose weights are computed from what trains, such as two factors.

    y = x W^ᵀ + bias      W^ [out, in] = form()
`form` is a module that gives W^ and holds whatever learns. Once trained, the layer becomes the linear it stood for again.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainedLinear(nn.Module):
    """Stands where a linear stood while the model trains."""

    def __init__(self, bias: Tensor | None, form: nn.Module) -> None:
        super().__init__()
        self.bias = bias
        self.form = form

    def weight_values(self) -> Tensor:
        """W^ [out, in] in float32: products of factors in bfloat16 would round what is about to learn."""
        with torch.autocast(self.device_type, enabled=False):
            W: Tensor = self.form()
        return W

    @property
    def device_type(self) -> str:
        return next(tensor.device.type for tensor in (*self.form.parameters(), *self.form.buffers()))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_values().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def trained_linears(model: nn.Module) -> Iterator[tuple[str, TrainedLinear]]:
    """Every such layer with its full name."""
    for name, module in model.named_modules():
        if isinstance(module, TrainedLinear):
            yield name, module
