"""Peers: other libraries' products for the same format, each made from the same quantized tensor where its layout allows.

A peer is a function of a tensor and a device; it returns a Peer, whose `weights` are what it itself holds, decoded, so that
each is compared with its own exact product; or the reason, in words, why it does not serve this format or does not load here.
    torch int4           aten::_weight_int4pack_mm, CUDA, bfloat16, groups of 32 to 256
    torch int8           torch._int_mm with scales afterwards, w8a8; over 16 tokens on CUDA
    torchao              Int8WeightOnly, Int8DynamicActivationInt8Weight, Int4WeightOnly (tile_packed_to_4d)
    bitsandbytes         NF4 and FP4 without nested scales, by its own quantizer; absmax of blocks in float32
    gemlite              whole numbers of 2, 4 and 8 bits with zero points, Triton, tuned at its first call
    humming-kernels      whole numbers of 1 to 8 bits and NF4's size in floats, by its own quantizer, compiled at its first call
    Marlin               vLLM's kernel as gptqmodel ships it: 4 and 8 bits without zero points, compiled by nvcc at first use
A peer that refuses to load, to build or to run is a row with its message, never a missing one.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qtool.formats.inputs import fit_inputs
from qtool.formats.packing import pack_int32
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.kernels.whole_levels import whole_levels

TORCH_INT4_GROUPS = (32, 64, 128, 256)
MARLIN_BITS, MARLIN_GROUPS = (4, 8), (None, 32, 64, 128)
INNER_TILES = 8  # of torch's packed layout on CUDA; the most, for wide inputs


@dataclass(frozen=True)
class Peer:
    """call: y [tokens, out] of x [tokens, in]; weights [out, in] that it holds; n_bytes that a call reads of them."""

    call: Callable[[Tensor], Tensor]
    weights: Tensor
    n_bytes: int
    rounds_in_its_own_way: bool = False  # inputs


MakePeer = Callable[[QuantizedTensor, Scheme, torch.device], Peer | str]


def make_peers(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> dict[str, Peer | str]:
    """Every peer by its name, or why it is not there."""
    found: dict[str, Peer | str] = {}
    for name, make in PEERS.items():
        try:
            found[name] = make(tensor, scheme, device)
        except ImportError as error:
            found[name] = f"does not load: {_first_line(error)}"
        except Exception as error:  # a peer's faults are its own: they are shown, and the bench goes on
            found[name] = f"failed: {type(error).__name__}: {_first_line(error)}"
    return found


def loading() -> dict[str, str]:
    """Library: its version, or why it does not load."""
    found = {}
    for name in ("torchao", "bitsandbytes", "gemlite", "humming", "gptqmodel", "triton"):
        try:
            found[name] = str(getattr(importlib.import_module(name), "__version__", "loads"))
        except Exception as error:  # libraries that find no GPU raise all kinds of errors when they are imported
            found[name] = f"does not load: {type(error).__name__}: {_first_line(error)}"
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def torch_int4(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    if device.type != "cuda":
        return "what qtool itself takes on the CPU"
    if scheme.activations is not None or tensor.scheme.group not in TORCH_INT4_GROUPS:
        return "weights alone, in groups of 32 to 256"
    whole = whole_levels(tensor, 4)
    if isinstance(whole, str):
        return whole
    unsigned = (whole.code + 8).to(torch.uint8)  # [out, in]
    pairs = (unsigned[:, ::2] << 4 | unsigned[:, 1::2]).contiguous()
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, INNER_TILES)
    scale = whole.scale.to(torch.bfloat16)
    zero = torch.zeros_like(scale) if whole.shift is None else (whole.scale * whole.shift).to(torch.bfloat16)
    both = torch.stack([scale.T, zero.T], -1).contiguous()  # [groups, out, 2]
    group = tensor.scheme.group
    levels = whole.code.float().unflatten(1, (-1, group)) * scale.float().unsqueeze(-1) + zero.float().unsqueeze(-1)
    n_bytes = packed.nbytes + both.nbytes
    return Peer(lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, group, both), levels.flatten(1), n_bytes)


def torch_int8(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    activations = scheme.activations
    if activations is None or str(activations) != "int8" or tensor.scheme.group not in (None, tensor.shape[1]):
        return "w8a8 alone"
    whole = whole_levels(tensor, 8)
    if isinstance(whole, str) or whole.shift is not None:
        return whole if isinstance(whole, str) else "no zero points"
    code, scale = whole.code, whole.scale[:, 0]

    def call(x: Tensor) -> Tensor:
        wide = x.float().unsqueeze(1)  # [tokens, 1, in]
        params = fit_inputs(wide, activations)
        codes = activations.grid.encode(wide, params).squeeze(1).to(torch.int8)
        return (torch._int_mm(codes, code.T).float() * params.scale.view(-1, 1) * scale).to(x.dtype)

    return Peer(call, code.float() * scale[:, None], code.nbytes + scale.nbytes)


def torchao(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    from torchao.quantization import (
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )

    word = str(scheme)
    if word == "w8a16":
        config: object = Int8WeightOnlyConfig()
    elif word == "w8a8":
        config = Int8DynamicActivationInt8WeightConfig()
    elif device.type == "cuda" and word.startswith("w4a16g"):
        config = Int4WeightOnlyConfig(group_size=tensor.scheme.group, int4_packing_format="tile_packed_to_4d")
    else:
        return "w8a16, w8a8, and on CUDA w4a16 in groups"
    linear = _plain(tensor, device)
    quantize_(linear, config)
    return Peer(linear, linear.weight.dequantize().float(), tensor.stored_bytes, rounds_in_its_own_way=word == "w8a8")


def bitsandbytes(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    from bitsandbytes import functional
    from bitsandbytes import matmul_4bit as product

    kind = {"nf4": "nf4", "fp4_bnb": "fp4"}.get(tensor.scheme.format)
    if kind is None or scheme.activations is not None or tensor.scheme.group is None:
        return "nf4 and fp4_bnb in groups"
    W = tensor.dequantize().to(torch.bfloat16)
    packed, state = functional.quantize_4bit(W, blocksize=tensor.scheme.group, quant_type=kind)
    weights = functional.dequantize_4bit(packed, state).float()
    return Peer(lambda x: product(x, packed.t(), quant_state=state), weights, packed.nbytes + state.absmax.nbytes)


def gemlite(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    if device.type != "cuda":
        return "CUDA alone"
    from gemlite.core import DType, GemLiteLinearTriton

    weights = tensor.scheme
    if weights.format != "int" or weights.bits not in (2, 4, 8) or scheme.activations is not None or weights.group is None:
        return "whole numbers of 2, 4 and 8 bits in groups, weights alone"
    whole = whole_levels(tensor, weights.bits)
    if isinstance(whole, str):
        return whole
    half = 1 << (weights.bits - 1)
    zero = torch.full_like(whole.scale, half) if whole.shift is None else half - whole.shift
    n, n_in = tensor.shape
    layer = GemLiteLinearTriton(weights.bits, weights.group, n_in, n, DType.BF16, DType.BF16)
    scale = whole.scale.to(torch.bfloat16)
    layer.pack((whole.code.int() + half).to(torch.uint8), scale.reshape(-1, 1), zero.to(torch.bfloat16).reshape(-1, 1))
    codes = (whole.code.float() + half).unflatten(1, (-1, weights.group))  # [out, groups, group]
    W = ((codes - zero.to(torch.bfloat16).float().unsqueeze(-1)) * scale.float().unsqueeze(-1)).flatten(1)
    return Peer(layer, W, tensor.stored_bytes)


def humming(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    if device.type != "cuda":
        return "CUDA alone"
    from humming.layer import HummingLayer

    weights = tensor.scheme
    if weights.format != "int" or scheme.activations is not None:
        return "whole numbers, weights alone"
    n, n_in = tensor.shape
    config = {"dtype": f"int{weights.bits}"} | ({} if weights.group is None else {"group_size": weights.group})
    layer = HummingLayer(shape_n=n, shape_k=n_in, weight_config=config, torch_dtype=torch.bfloat16).to(device)
    layer.load_from_unquantized(tensor.dequantize().to(torch.bfloat16))
    layer.transform()
    # It rounds weights by its own ranges: what it holds is read off its product with the identity, in bfloat16.
    W = layer(torch.eye(n_in, dtype=torch.bfloat16, device=device)).T.float()
    return Peer(layer, W, tensor.stored_bytes)


def marlin(tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Peer | str:
    if device.type != "cuda":
        return "CUDA alone"
    weights = tensor.scheme
    if weights.format != "int" or weights.bits not in MARLIN_BITS or scheme.activations is not None:
        return "whole numbers of 4 and 8 bits, weights alone"
    if weights.group not in MARLIN_GROUPS:
        return "groups of 32, 64 and 128, or one per output"
    whole = whole_levels(tensor, weights.bits)
    if isinstance(whole, str) or whole.shift is not None:
        return whole if isinstance(whole, str) else "no zero points"
    from gptqmodel.nn_modules.qlinear.marlin import MarlinLinear

    n, n_in = tensor.shape
    layer = MarlinLinear(
        bits=weights.bits,
        group_size=weights.group or -1,
        desc_act=False,
        sym=True,
        in_features=n_in,
        out_features=n,
        dtype=torch.bfloat16,
    )
    scale = whole.scale.to(torch.bfloat16)
    layer.qweight.data = pack_int32(whole.code.int() + (1 << (weights.bits - 1)), weights.bits).T.contiguous()  # GPTQ's
    layer.scales.data = scale.T.contiguous()  # [groups, out]
    layer = layer.to(device).eval()
    layer.post_init()  # into Marlin's own order
    W = (whole.code.float().unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(-1)).flatten(1)
    return Peer(layer, W, layer.qweight.nbytes + layer.scales.nbytes)


def _plain(tensor: QuantizedTensor, device: torch.device) -> nn.Linear:
    n, n_in = tensor.shape
    linear = nn.Linear(n_in, n, bias=False, dtype=torch.bfloat16, device=device)
    linear.weight = nn.Parameter(tensor.dequantize().to(torch.bfloat16), requires_grad=False)
    return linear


PEERS: dict[str, MakePeer] = {
    "torch int4": torch_int4,
    "torch int8": torch_int8,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
    "gemlite": gemlite,
    "humming": humming,
    "Marlin": marlin,
}
