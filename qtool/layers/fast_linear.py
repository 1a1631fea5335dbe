"""FastLinear: a quantized linear that multiplies by its codes, without decoding all of them for each call.

    y = Q_a(x) W^ᵀ + bias      as QuantLinear computes it, to the rounding of 16-bit arithmetic, by one of these products:
    torch int4           CPU     up to 16 levels that are whole numbers, groups of 32 and more; 2 and 3 bits are kept as 4
    torch int8           CPU     up to 256 such levels, one scale per output
    oneDNN int8 x int8   CPU     the same, inputs in whole numbers of up to 8 bits, with one scale per token or static
    qtool CUDA           CUDA    whole numbers of 2, 3, 4 and 8 bits and tables of 16 levels: see kernels/weight_only.py
    qtool CUDA int8      CUDA    weights and inputs in int8: see kernels/int8.py
    torch FP8            CUDA    weights and inputs in E4M3, on GPUs with FP8 arithmetic: torch._scaled_mm
Inputs that a product does not round itself are rounded before it, as QuantLinear rounds them. Linears that read one input share
a product of qtool CUDA: `fast_together`, see shared_product.py.
Why a class of its own: runs measure and export what QuantLinear decodes, the same to the bit everywhere; this is for speed.

How far it is from the exact product: `qtool bench kernels` measures it before it times anything.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from qtool.formats.scheme import ActivationScheme, WeightScheme
from qtool.formats.tensor import QuantizedTensor
from qtool.kernels import int8, launch, weight_only
from qtool.kernels.cpu_int4 import int4_product
from qtool.kernels.cpu_int8 import int8_by_8_product, int8_product
from qtool.kernels.whole_levels import whole_levels
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.layers.rotated_input import carry_rotation, signs_of
from qtool.layers.shared_product import SharedPart, SharedProduct

FP8 = WeightScheme.model_validate({"format": "e4m3"})
FP8_INPUTS = ActivationScheme.model_validate({"format": "e4m3"})
FP8_MULTIPLE = 16  # that torch._scaled_mm asks of both sides
KERNEL_DTYPES = (torch.bfloat16, torch.float16)  # of inputs that kernels on CUDA take


class Product(Protocol):
    """x [..., in] and bias [out] to y [..., out]; a module that holds the weights, hidden_bytes of them outside its buffers."""

    name: str
    hidden_bytes: int

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor: ...


class CudaProduct(nn.Module):
    """Weights alone in few bits: kernels/weight_only.py."""

    name = "qtool CUDA"

    def __init__(self, packed: weight_only.PackedWeight) -> None:
        super().__init__()
        self._packed = packed
        self.hidden_bytes = packed.nbytes

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return weight_only.matmul(x, self._packed, bias)


class CudaInt8Product(nn.Module):
    """Weights and inputs in int8, each token rounded in its own range: kernels/int8.py."""

    name = "qtool CUDA int8"
    hidden_bytes = 0
    codes: Tensor
    scale: Tensor
    sums: Tensor | None

    def __init__(self, codes: Tensor, scale: Tensor, symmetric: bool) -> None:
        """codes [out, in] int8, scale [out] float32; symmetric: whether inputs have no zero points."""
        super().__init__()
        self._symmetric = symmetric
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("sums", None if symmetric else codes.sum(-1, dtype=torch.int32))  # [out]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        codes, scale, zero = int8.quantize_tokens(x.reshape(-1, x.shape[-1]), self._symmetric)  # [tokens, in], [tokens] twice
        x_zero = None if self._symmetric else zero
        y = int8.matmul_int8(codes, self.codes, scale, self.scale, bias, x_zero, self.sums, x.dtype)  # [tokens, out]
        return y.view(*x.shape[:-1], -1)


class CudaFp8Product(nn.Module):
    """Weights and inputs in E4M3, each token and each output with a scale of its own: torch._scaled_mm."""

    name = "torch FP8"
    hidden_bytes = 0
    codes: Tensor
    scale: Tensor

    def __init__(self, tensor: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("codes", tensor.codes.view(torch.float8_e4m3fn))  # codes are the format's own bits
        self.register_buffer("scale", tensor.params().scale.reshape(1, -1))  # [1, out]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()  # [tokens, in]
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = (rows.abs().amax(-1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)  # [tokens, 1]
        codes = (rows / scale).clamp(-largest, largest).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(codes, self.codes.T, scale_a=scale, scale_b=self.scale, out_dtype=torch.bfloat16)
        return (y.to(x.dtype) if bias is None else y.to(x.dtype) + bias).view(*x.shape[:-1], -1)


class FastLinear(nn.Module):
    """Stands where a QuantLinear stood; made by `fast`."""

    left: Tensor | None
    right: Tensor | None

    def __init__(self, layer: QuantLinear, product: Product, rounds_inputs: bool, dtype: torch.dtype) -> None:
        """rounds_inputs: whether the product rounds them itself."""
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.product = product
        self._activations = None if rounds_inputs else layer.activations
        self._static = None if rounds_inputs else layer.inputs
        self.bias = layer.bias
        factors = (None, None) if layer.low_rank is None else layer.low_rank.factors()
        for name, factor in zip(("left", "right"), factors, strict=True):
            self.register_buffer(name, None if factor is None else factor.to(dtype))  # [out, rank], [rank, in]
        carry_rotation(layer, self)

    def forward(self, x: Tensor) -> Tensor:
        if self._activations is not None:
            x = snap_inputs(x, self._activations, self._static)
        y = self.product(x, self.bias)
        if self.left is not None and self.right is not None:
            y = y + nn.functional.linear(nn.functional.linear(x, self.right), self.left)
        return y


def fast(layer: QuantLinear, dtype: torch.dtype) -> FastLinear | str:
    """A layer that computes what `layer` does, faster, for inputs in a dtype on the layer's device; else why there is none."""
    tensor, activations = layer.qt, layer.activations
    device = tensor.codes.device.type
    if device == "cpu":
        if activations is not None and layer.low_rank is None:  # a low-rank part reads the rounded inputs too
            whole = int8_by_8_product(tensor, activations, layer.inputs)
            if not isinstance(whole, str):
                return FastLinear(layer, whole, True, dtype)
        four, eight = int4_product(tensor, dtype), int8_product(tensor, dtype)
        if not isinstance(four, str):
            return FastLinear(layer, four, False, dtype)
        if not isinstance(eight, str):
            return FastLinear(layer, eight, False, dtype)
        return f"{tensor.scheme}: {four if tensor.grid.n_levels <= 16 else eight}"
    if device != "cuda":
        return f"no product of codes for {device}"
    found = _on_cuda(layer, tensor, dtype)
    return f"{tensor.scheme}: {found}" if isinstance(found, str) else found


def fast_together(layers: list[QuantLinear], dtype: torch.dtype) -> list[FastLinear] | str:
    """Layers that compute what `layers` do, which read the same input, by one product; else why they share none."""
    if any(layer.activations is not None or signs_of(layer) is not None for layer in layers):
        return "inputs that are rounded or rotated first are a new tensor for each"
    tensors = [layer.qt for layer in layers]
    for tensor in tensors:
        if (reason := _reason_without_kernel(tensor, dtype)) is not None:
            return reason
    joined = weight_only.join(tensors)
    if isinstance(joined, str):
        return joined
    sizes, bias = [layer.out_features for layer in layers], _joined_bias(layers, dtype)
    shared = SharedProduct(weight_only.pack(joined), sizes, bias)
    made = [FastLinear(layer, SharedPart(shared, index), False, dtype) for index, layer in enumerate(layers)]
    if bias is not None:
        for one, view in zip(made, bias.split(sizes), strict=True):
            if one.bias is not None:
                one.bias.data = view
    return made


def _joined_bias(layers: list[QuantLinear], dtype: torch.dtype) -> Tensor | None:
    """[out of all], zeros for layers without one; None where none has one."""
    if all(layer.bias is None for layer in layers):
        return None
    device = layers[0].scale.device
    parts = [torch.zeros(layer.out_features, device=device) if layer.bias is None else layer.bias for layer in layers]
    return torch.cat([part.detach().to(dtype) for part in parts])


def _on_cuda(layer: QuantLinear, tensor: QuantizedTensor, dtype: torch.dtype) -> FastLinear | str:
    activations = layer.activations
    if activations is not None and layer.low_rank is None and dtype in KERNEL_DTYPES:
        if activations in (int8.SYMMETRIC, int8.ASYMMETRIC) and tensor.scheme.group in (None, tensor.shape[1]):
            whole = whole_levels(tensor, 8)
            if not isinstance(whole, str) and whole.shift is None and launch.reason_not_to_run() is None:
                scale = whole.scale[:, 0].contiguous()
                return FastLinear(layer, CudaInt8Product(whole.code, scale, activations.symmetric), True, dtype)
        if _has_fp8_product(tensor, activations):
            return FastLinear(layer, CudaFp8Product(tensor), True, dtype)
    if (reason := _reason_without_kernel(tensor, dtype)) is not None:
        return reason
    return FastLinear(layer, CudaProduct(weight_only.pack(tensor)), False, dtype)


def _reason_without_kernel(tensor: QuantizedTensor, dtype: torch.dtype) -> str | None:
    """Why qtool's own kernels do not multiply inputs in a dtype by a tensor, where it is; None where they do."""
    if tensor.codes.device.type != "cuda":
        return f"{tensor.codes.device.type} has no kernels of qtool's"
    if dtype not in KERNEL_DTYPES:
        return f"inputs in {str(dtype).removeprefix('torch.')}: kernels take bfloat16 and float16"
    if (reason := launch.reason_not_to_run()) is not None:
        return reason
    if extras := [what for what in ("column_scale", "salient", "outliers") if getattr(tensor, what) is not None]:
        return f"{' and '.join(extras)} beside the codes"
    return weight_only.supports(tensor.scheme, tensor.shape)


def _has_fp8_product(tensor: QuantizedTensor, activations: ActivationScheme) -> bool:
    is_fp8 = (tensor.scheme.format, tensor.scheme.group) == ("e4m3", None) and activations == FP8_INPUTS and tensor.is_plain
    divides = all(side % FP8_MULTIPLE == 0 for side in tensor.shape)
    return is_fp8 and divides and torch.cuda.get_device_capability(tensor.codes.device) >= (8, 9)
