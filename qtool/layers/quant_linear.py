"""QuantLinear: a linear layer that keeps its weights as codes and decodes them when it is called.

    y = Q_a(x) W^ᵀ + bias      W^ [out, in] = decode(codes)      Q_a: rounding of x, where the scheme has one, see
    formats/inputs.py
With a low-rank part, A [out, rank] and B [rank, in]: y = Q_a(x) W^ᵀ + (Q_a(x) Bᵀ) Aᵀ + bias.
Why the scale is a parameter: training may tune it while the codes stay.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.inputs import InputScales, fit_inputs, grouped_inputs, outlying
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import ActivationScheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor


def snap_inputs(x: Tensor, scheme: ActivationScheme, static: InputScales | None = None) -> Tensor:
    """x [..., in] rounded, in float32, by static scales or each token, or group of its channels, in its own range.

    Returns x's dtype; gradients pass as if nothing were rounded.
    """
    kept = outlying(x, scheme)  # [in]
    wide = grouped_inputs(x.float() if kept is None else x.float().masked_fill(kept, 0), scheme)  # [..., groups, group]
    snapped = scheme.grid.snap(wide, fit_inputs(wide, scheme, static)).view(x.shape).to(x.dtype)
    snapped = snapped if kept is None else torch.where(kept, x, snapped)
    return snapped.detach() + (x - x.detach()) if x.requires_grad else snapped  # adds zeros, which carry the gradient


class QuantLinear(nn.Module):
    """Stands where an nn.Linear (or a Conv1D) with in and out features stood."""

    scale: Tensor

    def __init__(
        self,
        tensor: QuantizedTensor,
        bias: Tensor | None,
        activations: ActivationScheme | None = None,
        low_rank: LowRank | None = None,
        inputs: InputScales | None = None,
    ) -> None:
        """inputs: the scales of inputs that the scheme says are static."""
        super().__init__()
        assert (activations is not None and activations.static) == (inputs is not None), f"{activations} with {inputs}"
        self.out_features, self.in_features = tensor.shape
        self.activations = activations
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._facts = tensor.facts()
        self._dtypes = {name: part.dtype for name, part in tensor.parts().items()}
        for name, part in tensor.parts().items():
            if name == "scale":
                self.scale = nn.Parameter(part, requires_grad=False)
            else:
                self.register_buffer(name, part)
        self.left: Tensor | None
        self.right: Tensor | None
        self.scale_of_rank: Tensor | None
        self.register_buffer("left", None if low_rank is None else low_rank.left)
        self.register_buffer("right", None if low_rank is None else low_rank.right)
        self.register_buffer("scale_of_rank", None if low_rank is None else low_rank.scale)
        self.input_scale: Tensor | None
        self.input_zero: Tensor | None
        self.register_buffer("input_scale", None if inputs is None else inputs.scale)
        self.register_buffer("input_zero", None if inputs is None else inputs.zero)
        self._input_dtype = None if inputs is None else inputs.scale.dtype

    @property
    def scheme(self) -> WeightScheme:
        scheme: WeightScheme = self._facts["scheme"]
        return scheme

    @property
    def qt(self) -> QuantizedTensor:
        # Training widens buffers of floats, and may have moved scales off what they are stored as.
        parts = {name: getattr(self, name).detach().to(dtype) for name, dtype in self._dtypes.items() if name != "scale"}
        return QuantizedTensor.from_parts({**parts, "scale": self.scale.detach()}, self._facts).settled()

    @property
    def low_rank(self) -> LowRank | None:
        if self.left is None or self.right is None:
            return None
        return LowRank(self.left, self.right, self.scale_of_rank)

    @property
    def inputs(self) -> InputScales | None:
        """The static scales of inputs; None where they are found at run time, or nothing is rounded."""
        if self.activations is None or self.input_scale is None:
            return None
        return InputScales(self.activations, self.input_scale.to(self._input_dtype), self.input_zero)

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Weights [out, in] that the layer amounts to, the low-rank part among them; gradients reach the scale."""
        W, low_rank = self._decoded(), self.low_rank
        return (W if low_rank is None else W + low_rank.multiply()).to(dtype)

    def _decoded(self) -> Tensor:
        """W^ [out, in], float32."""
        parts = {name: getattr(self, name) for name in self._dtypes}
        return QuantizedTensor.from_parts(parts, self._facts).dequantize()

    def forward(self, x: Tensor) -> Tensor:
        if self.activations is not None:
            x = snap_inputs(x, self.activations, self.inputs)
        y = F.linear(x, self._decoded().to(x.dtype), self.bias)
        if (low_rank := self.low_rank) is not None:
            A, B = low_rank.factors()
            y = y + F.linear(F.linear(x, B.to(x.dtype)), A.to(x.dtype))
        return y
