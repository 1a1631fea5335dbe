"""Eight bits on the CPU: products of whole numbers for weights with one scale per output.

    weights alone     y = s_w ((x q_wᵀ) + z_w Σ x)                aten::_weight_int8pack_mm for few tokens, else decoded
    inputs too        y = s_x s_w ((q_x - z_x) q_wᵀ + z_w Σ (q_x - z_x))     onednn::qlinear_pointwise, exact in int32
    x [tokens, in] bfloat16, or float16 rounded to it    q_x in uint8
    q_w [out, in] int8    s_w, z_w [out]: scale and shift of whole_levels.py
    s_x, z_x [tokens]: each token's own, or static; sums over `in`
Why only with VNNI: without it the instruction for uint8 by int8 adds pairs in 16 bits, and large ones saturate.
Source: torch, aten/src/ATen/native/cpu/int8mm_kernel.cpp and native/quantized/cpu/qlinear.cpp.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.inputs import InputScales, fit_inputs
from qtool.formats.scheme import ActivationScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.kernels.cpu_int4 import DTYPES
from qtool.kernels.whole_levels import WholeLevels, whole_levels

BITS = 8
MIDDLE = 128  # of uint8: the zero point that codes of inputs have
# Tokens up to which the packed product is faster than decoding; `qtool bench kernels --device cpu --format w8a16 --batch 12,13`
# times one and the other, which take about the same there.
FEW = 12
DECODED_BYTES = 1 << 20  # of weights that are decoded at a time: what a core's own cache holds
ROWS, COLUMNS = 16, 32  # that outputs and inputs must divide by


class Int8Product(nn.Module):
    """Weights of eight bits, inputs as they are; made by `int8_product`."""

    name = "torch int8"
    hidden_bytes = 0
    codes: Tensor
    scale: Tensor
    shift: Tensor | None

    def __init__(self, whole: WholeLevels) -> None:
        super().__init__()
        self.register_buffer("codes", whole.code.contiguous())
        self.register_buffer("scale", whole.scale[:, 0].contiguous())
        self.register_buffer("shift", None if whole.shift is None else whole.shift[:, 0].contiguous())

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., out] of x [..., in], in x's dtype."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)  # [tokens, in]
        if len(rows) <= FEW:
            ones = torch.ones_like(self.scale, dtype=rows.dtype)
            y: Tensor = torch.ops.aten._weight_int8pack_mm(rows, self.codes, ones).float()  # [tokens, out]
        else:
            step = max(1, DECODED_BYTES // (2 * self.codes.shape[1]))
            y = torch.cat([F.linear(rows, part.to(rows.dtype)) for part in self.codes.split(step)], 1).float()  # [tokens, out]
        if self.shift is not None:
            y = y + rows.sum(-1, dtype=torch.float32).unsqueeze(-1) * self.shift
        y = y * self.scale
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self.scale))


class Int8By8Product(nn.Module):
    """Weights and inputs of eight bits; made by `int8_by_8_product`. Rounds inputs itself."""

    name = "oneDNN int8 x int8"
    scale: Tensor
    shift: Tensor | None
    sums: Tensor
    ones: Tensor
    zeros: Tensor

    def __init__(self, whole: WholeLevels, activations: ActivationScheme, static: InputScales | None) -> None:
        super().__init__()
        self._activations, self._static = activations, static
        self._offset = MIDDLE if activations.symmetric else 0
        self._packed = torch.ops.onednn.qlinear_prepack(whole.code.contiguous(), None)  # oneDNN's own layout, no plain tensor
        self.hidden_bytes = whole.code.numel()  # oneDNN pads them to whole blocks, which is not counted
        self.register_buffer("scale", whole.scale[:, 0].contiguous())
        self.register_buffer("shift", None if whole.shift is None else whole.shift[:, 0].contiguous())
        self.register_buffer("sums", whole.code.sum(-1, dtype=torch.float32))  # [out]
        self.register_buffer("ones", torch.ones(len(whole.code)))
        self.register_buffer("zeros", torch.zeros(len(whole.code), dtype=torch.int32))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """y [..., out] of x [..., in], in x's dtype."""
        rows = x.reshape(-1, 1, x.shape[-1]).float()  # [tokens, 1, in]
        params = fit_inputs(rows, self._activations, self._static)  # [tokens, 1, 1], or [1]
        codes = (self._activations.grid.encode(rows, params) + self._offset).squeeze(1).to(torch.uint8)  # [tokens, in]
        scale = params.scale.view(-1, 1)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, MIDDLE, self._packed, self.ones, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )  # [tokens, out]
        if params.zero is not None:
            y = y - (params.zero.view(-1, 1) - MIDDLE) * self.sums
        if self.shift is not None:
            zero = MIDDLE if params.zero is None else params.zero.view(-1, 1)
            y = y + (codes.sum(-1, keepdim=True, dtype=torch.float32) - zero * codes.shape[1]) * self.shift
        y = y * scale * self.scale
        y = y if bias is None else y + bias
        return y.to(x.dtype).view(*x.shape[:-1], len(self.scale))


def int8_product(tensor: QuantizedTensor, dtype: torch.dtype) -> Int8Product | str:
    """The product for inputs in a dtype; else why there is none."""
    if dtype not in DTYPES:
        return f"inputs in {str(dtype).removeprefix('torch.')}: torch's packed products are fast in bfloat16 alone"
    whole = _per_output(tensor)
    return whole if isinstance(whole, str) else Int8Product(whole)


def int8_by_8_product(tensor: QuantizedTensor, scheme: ActivationScheme, static: InputScales | None) -> Int8By8Product | str:
    """The product for inputs that a scheme rounds; else why there is none."""
    if scheme.format != "int" or scheme.group is not None or scheme.threshold is not None or scheme.scale_dtype != "float32":
        return f"inputs in {scheme}: whole numbers with one scale a token have a product"
    if not (torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()):
        return "a processor without VNNI, whose sums of int8 saturate"
    whole = _per_output(tensor)
    return whole if isinstance(whole, str) else Int8By8Product(whole, scheme, static)


def _per_output(tensor: QuantizedTensor) -> WholeLevels | str:
    n, n_in = tensor.shape
    if n % ROWS or n_in % COLUMNS:
        return f"[{n}, {n_in}] weights, which do not divide by {ROWS} outputs and {COLUMNS} inputs"
    if tensor.scheme.group not in (None, n_in):
        return f"groups of {tensor.scheme.group}: products of int8 take one scale per output"
    return whole_levels(tensor, BITS)
