"""The three kinds of linear layer that models hold, behind one view of their weights, always [out, in]."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qtool.layers.quant_linear import QuantLinear

Linear = nn.Linear | Conv1D | QuantLinear


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D, QuantLinear))


def weight_of(linear: nn.Module) -> Tensor:
    """The weights [out, in], float32, a copy; GPT-2's Conv1D keeps them transposed."""
    if isinstance(linear, QuantLinear):
        return linear.weight_values(torch.float32).detach()
    assert isinstance(linear, (nn.Linear, Conv1D))
    weight = linear.weight.detach().to(torch.float32, copy=True)
    return weight.T.contiguous() if isinstance(linear, Conv1D) else weight


def input_place(linear: nn.Module) -> int:
    """Which side of the weight, as the layer stores it, its inputs meet."""
    return 0 if isinstance(linear, Conv1D) else 1


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in), as the layer was made, whatever stands in its weight: nothing yet, or a checkpoint's packed words."""
    if isinstance(linear, Conv1D):
        return int(linear.nf), int(linear.nx)
    assert isinstance(linear, (nn.Linear, QuantLinear))
    return linear.out_features, linear.in_features
