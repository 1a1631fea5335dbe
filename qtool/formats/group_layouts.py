"""GPTQ's and AWQ's layouts of one quantized linear, written and read: unsigned codes in words, scales by groups.

    w^[o, i] = scales[g, o] (code[o, i] - zero[g, o]),  g = i // group        codes and zero points of b bits, 0 .. 2^b - 1
GPTQ: words along `in`; b is 2, 3, 4 or 8.
    qweight [in b / 32, out] int32    qzeros [groups, out b / 32] int32    scales [groups, out]    g_idx [in] int32, all g
    Code i of a column stands at bits i b .. i b + b - 1 of its words, at three bits across words too (see packing.py).
    Checkpoint format gptq stores each zero point less one, gptq_v2 as it is.
AWQ "gemm": words along `out`, four bits.
    qweight [in, out / 8] int32       qzeros [groups, out / 8] int32       scales [groups, out]
    Nibble k of a word, lowest first, holds output ORDER[k] of the word's eight.
Symmetric codes -2^(b-1) .. 2^(b-1) - 1 are stored plus 2^(b-1), which then is every zero point. Their scales may be negative.
Scales are written in float16, which the layouts' kernels multiply in; bfloat16 ones outside of 2^-17 .. 65504 lose by that.
Why a zero point of 0 is read from format gptq only where GPTQModel wrote it, and written into none: less one it becomes the
largest code, and runtimes disagree about what that means. GPTQModel takes the ones from a whole word at a time, so that 0
borrows from its neighbour, and gives them back in the same way; at three bits it did so in other ways over time.
Source: GPTQModel 7.7, pack_original of nn_modules/qlinear (GPTQ) and pack_awq of quantization/awq (AWQ).
"""

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.packing import n_words, pack_int32, unpack_int32
from qtool.formats.scheme import WeightScheme
from qtool.formats.tensor import QuantizedTensor

GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = (4,)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AWQ: output of each nibble of a word
Parts = dict[str, Tensor]


def pack_gptq(quantized: QuantizedTensor, is_v2: bool) -> Parts:
    """qweight, qzeros, scales and g_idx; raises QtoolError for scales beyond float16."""
    codes, zero = _unsigned(quantized)  # [out, in], [out, groups]
    bits, columns = quantized.scheme.bits, quantized.shape[1]
    stored = zero if is_v2 else zero - 1
    assert int(stored.min()) >= 0, "zero points of 0 do not go into format gptq"
    return {
        "qweight": pack_int32(codes, bits).T,  # [in b / 32, out]
        "qzeros": pack_int32(stored.T, bits),  # [groups, out b / 32]
        "scales": _half(quantized.scale).T,  # [groups, out]
        "g_idx": _group_of_inputs(columns, quantized.scheme),  # [in]
    }


def unpack_gptq(parts: Parts, scheme: WeightScheme, is_v2: bool, borrows: bool = False) -> QuantizedTensor:
    """What `pack_gptq` was given, its scales as stored; raises QtoolError where the parts do not fit each other.

    `borrows`: the ones that format gptq takes from zero points were taken from whole words.
    """
    bits, (groups, rows) = scheme.bits, parts["scales"].shape
    columns = parts["qweight"].shape[0] * 32 // bits
    _expect(parts, "qweight", (n_words(columns, bits), rows), scheme)
    _expect(parts, "qzeros", (groups, n_words(rows, bits)), scheme)
    if groups * (scheme.group or columns) != columns:
        raise QtoolError(f"{groups} groups of scales do not belong to {columns} columns of {scheme}")
    if "g_idx" in parts and not torch.equal(parts["g_idx"].int(), _group_of_inputs(columns, scheme)):
        raise QtoolError(
            "g_idx orders columns into groups by their activations (desc_act), groups of neighbours can be read; "
            "quantize again with desc_act: false"
        )
    codes = unpack_int32(parts["qweight"].T.contiguous(), bits, columns)  # [out, in]
    words, ones = parts["qzeros"].contiguous(), torch.ones(1, rows, dtype=torch.int32)
    zero = unpack_int32(words, bits, rows).T  # [out, groups]
    if not is_v2 and borrows and 32 % bits == 0:
        zero = unpack_int32(words + pack_int32(ones, bits), bits, rows).T
    elif not is_v2:
        zero = zero + 1
        if int(zero.max()) == 1 << bits:
            raise QtoolError(
                "a zero point of 0, which checkpoint format gptq cannot tell from others; save it again as gptq_v2"
            )
    return _signed(codes, zero, parts["scales"], scheme)


def pack_awq(quantized: QuantizedTensor) -> Parts:
    """qweight, qzeros and scales; raises QtoolError for scales beyond float16."""
    codes, zero = _unsigned(quantized)  # [out, in], [out, groups]
    return {
        "qweight": pack_int32(_interleave(codes.T, ORDER), 4),  # [in, out / 8]
        "qzeros": pack_int32(_interleave(zero.T, ORDER), 4),  # [groups, out / 8]
        "scales": _half(quantized.scale).T,  # [groups, out]
    }


def unpack_awq(parts: Parts, scheme: WeightScheme) -> QuantizedTensor:
    """What `pack_awq` was given, its scales as stored; raises QtoolError where the parts do not fit each other."""
    columns, (groups, rows) = parts["qweight"].shape[0], parts["scales"].shape
    _expect(parts, "qweight", (columns, n_words(rows, 4)), scheme)
    _expect(parts, "qzeros", (groups, n_words(rows, 4)), scheme)
    if groups * (scheme.group or columns) != columns:
        raise QtoolError(f"{groups} groups of scales do not belong to {columns} columns of {scheme}")
    inverse = tuple(ORDER.index(output) for output in range(8))
    codes = _interleave(unpack_int32(parts["qweight"], 4, rows), inverse).T  # [out, in]
    zero = _interleave(unpack_int32(parts["qzeros"], 4, rows), inverse).T  # [out, groups]
    return _signed(codes, zero, parts["scales"], scheme)


def awq_is_symmetric(qzeros: Tensor) -> bool:
    """Whether every zero point of qzeros [groups, out / 8] is 8, the middle of the codes."""
    return bool((qzeros == -0x77777778).all())  # eight nibbles of 8


def _unsigned(quantized: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """Codes [out, in] and zero points [out, groups], both from 0, int32."""
    assert quantized.is_plain, "what stands beside codes, scales and zero points does not go into this layout"
    low = quantized.grid.low
    zero = torch.full(quantized.scale.shape, -low) if quantized.zero is None else quantized.zero
    return quantized.codes.int() - low, zero.int().to(quantized.codes.device)


def _signed(codes: Tensor, zero: Tensor, scales: Tensor, scheme: WeightScheme) -> QuantizedTensor:
    """The tensor of unsigned codes [out, in], zero points [out, groups] and scales [groups, out]."""
    scale = scales.T.contiguous()  # [out, groups]
    if not scheme.symmetric:
        return QuantizedTensor(codes.to(torch.uint8).contiguous(), scale, zero.to(torch.uint8).contiguous(), scheme)
    if not bool((zero == -scheme.grid.low).all()):
        raise QtoolError(f"zero points other than {-scheme.grid.low} contradict its symmetric scheme; export it again")
    return QuantizedTensor((codes + scheme.grid.low).to(torch.int8).contiguous(), scale, None, scheme)


def _half(scale: Tensor) -> Tensor:
    half: Tensor = scale.to(torch.float16)
    if not bool(half.isfinite().all()):
        raise QtoolError(
            f"a scale of {float(scale.abs().max()):.3g} is beyond float16, whose largest number is 65504; use "
            "export/compressed_tensors"
        )
    return half


def _group_of_inputs(columns: int, scheme: WeightScheme) -> Tensor:
    return (torch.arange(columns) // (scheme.group or columns)).int()  # [in]


def _interleave(values: Tensor, order: tuple[int, ...]) -> Tensor:
    """values [..., out] with every eight neighbours in this order."""
    eights: Tensor = values.unflatten(-1, (-1, 8))
    return eights[..., list(order)].flatten(-2)


def _expect(parts: Parts, name: str, shape: tuple[int, int], scheme: WeightScheme) -> None:
    tensor = parts[name]
    if tensor.dtype != torch.int32 or tuple(tensor.shape) != shape:
        raise QtoolError(
            f"{name} is {tensor.dtype} {list(tensor.shape)}, must be torch.int32 {list(shape)} for {scheme} with scales "
            f"{list(parts['scales'].shape)}; config.json does not describe this file"
        )
