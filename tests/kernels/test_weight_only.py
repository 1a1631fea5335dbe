"""Packed weights and their product on the CPU: the layout, what is refused, and the operator that torch.compile sees."""

import pytest
import torch

from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.kernels.fragments import BLOCK, from_fragments, to_fragments
from qtool.kernels.weight_only import join, matmul, pack, supports, unpack

SCHEMES = (
    *("w4a16g128", "w4g32", "w4", "w4g64-asym", "w4g64-asymf16", "w3g64-asym", "w3g128", "w2g32-asym", "w2g64", "w8"),
    *("w8g128-asym", "nf4g64", "nf4g64-dq", "fp4_bnbg64", "e2m1g32-asymf16", "iq4_nlg32", "power4g128", "ternaryg64"),
    *("mxfp4", "nvfp4", "mxint8"),
)


def quantized(scheme: str, out: int = 70, n_in: int = 256, seed: int = 0) -> QuantizedTensor:
    w = torch.randn(out, n_in, generator=torch.Generator().manual_seed(seed))
    return quantize(w * torch.logspace(-2, 2, out).unsqueeze(1), Scheme.model_validate(scheme.replace(" ", "")).weights)


@pytest.mark.parametrize("bits", BLOCK)
@pytest.mark.parametrize("shape", [(1, 8), (70, 96), (128, 256)])
def test_fragment_order_gives_every_code_back(bits: int, shape: tuple[int, int]) -> None:
    codes = torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int32)
    assert torch.equal(from_fragments(to_fragments(codes, bits), bits, *shape), codes)


def test_a_code_stands_where_the_docstring_says() -> None:
    n, k = 16 * 3 + 8 * 1 + 5, 64 * 1 + 32 * 1 + 8 * 3 + 4 * 0 + 2 * 1 + 1  # tile 3, r 1, g 5; block 1, h 1, t 3, j 0, c 1, e 1
    codes = torch.zeros(64, 128, dtype=torch.int32)
    codes[n, k] = 15
    words = to_fragments(codes, 4)
    i, e, lane, word = 2 * 1 + 1, 1, 4 * 5 + 3, 2 * 1 + 0
    assert words[3, 1, 4 * lane + word].item() & 0xFFFFFFFF == 15 << (4 * i + 16 * e)
    assert words.count_nonzero() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_gives_the_values_to_the_bit(scheme: str) -> None:
    tensor = quantized(scheme)
    assert torch.equal(unpack(pack(tensor)), tensor.dequantize())


@pytest.mark.parametrize("scheme", ["w4g32", "w3", "w2-asym", "w8g32-asymf16", "nf4g32"])
def test_a_width_of_less_than_a_block_is_padded(scheme: str) -> None:
    tensor = quantized(scheme, out=5, n_in=32)
    x = torch.randn(3, 32)
    torch.testing.assert_close(matmul(x, pack(tensor)), x @ tensor.dequantize().T, rtol=1e-5, atol=1e-3)  # float32 sums


@pytest.mark.parametrize("scheme", ["w4g32", "w2g64-asym", "w3g64-asymf16", "nvfp4", "mxfp4"])
def test_one_product_for_several_linears_is_each_ones_own(scheme: str) -> None:
    parts = [quantized(scheme, out, seed=out) for out in (64, 32, 32)]
    x = torch.randn(2, 5, 256).bfloat16()
    joined = join(parts)
    assert isinstance(joined, QuantizedTensor)
    whole = matmul(x, pack(joined))
    own = torch.cat([matmul(x, pack(part)) for part in parts], -1)
    # The same products, but a wider matrix may be summed in another order, which moves a rounding to bfloat16 by one step.
    torch.testing.assert_close(whole, own, rtol=2**-7, atol=1e-2)
    assert torch.equal(unpack(pack(joined)), torch.cat([part.dequantize() for part in parts]))


@pytest.mark.parametrize(
    ("scheme", "shape", "what"),
    [
        ("w5g64", (64, 64), "5 bits"),
        ("w4g16", (64, 64), "groups of 16"),
        ("w4g96", (64, 96), "groups of 96"),
        ("w4g32-ic", (64, 64), "along `out`"),
        ("e4m3g64", (64, 64), "up to 16 levels"),
        ("e8pg64", (64, 64), "e8p"),
        ("w4", (64, 60), "60 inputs"),
    ],
)
def test_what_has_no_kernel_is_named(scheme: str, shape: tuple[int, int], what: str) -> None:
    weights = Scheme.model_validate(scheme).weights
    reason = supports(weights, shape)
    assert reason is not None and what in reason
    with pytest.raises(QtoolError, match=what):
        pack(quantize(torch.randn(shape), weights))


def test_linears_of_different_schemes_are_not_joined() -> None:
    assert join([quantized("w4g32"), quantized("w4g64")]) == (
        "w4g32 [70, 256], w4g64 [70, 256]: scheme and inputs are not the same"
    )
    small = quantized("nvfp4")
    large = quantize(1e6 * small.dequantize(), small.scheme)
    assert join([small, large]) == "scales of the parts do not fit one scale of the whole exactly"


@pytest.mark.parametrize("scheme", ["w4g32-asym", "nf4g64", "nvfp4"])
def test_torch_checks_the_operator(scheme: str) -> None:
    packed = pack(quantized(scheme, n_in=64))
    arguments = (
        packed.codes,
        packed.scale,
        packed.zero,
        packed.table,
        torch.randn(70),
        packed.bits,
        70,
        packed.group,
        packed.alpha,
    )
    torch.library.opcheck(torch.ops.qtool.weight_only_matmul, (torch.randn(3, 64), *arguments))
