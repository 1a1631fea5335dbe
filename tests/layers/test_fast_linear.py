"""FastLinear computes what QuantLinear does, for every format that has a product, and says why others have none.

The bound, against float64: three roundings of bfloat16 (of a scale, of a sum, of the result), each at most 2^-9, in the norm
of all outputs, of the worst token and of the worst output.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from qtool.formats.inputs import InputScales
from qtool.formats.low_rank import LowRank
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.kernels import cpu_int4, cpu_int8, weight_only
from qtool.kernels.whole_levels import WholeLevels, whole_levels
from qtool.layers import fast_linear, shared_product
from qtool.layers.fast_linear import CudaFp8Product, CudaInt8Product, CudaProduct, FastLinear, fast, fast_together
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.layers.rotated_input import rotate_input

BOUND = 3 * 2**-9
with_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the processor has no VNNI: whole products saturate")


def weights(scheme: str, n: int = 192, n_in: int = 256, seed: int = 0) -> QuantizedTensor:
    random = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(n, n_in, generator=random), Scheme.model_validate(scheme).weights)


def layer_of(scheme: str, n: int = 192, n_in: int = 256, **more: object) -> QuantLinear:
    bias = torch.randn(n, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    return QuantLinear(weights(scheme, n, n_in), bias, Scheme.model_validate(scheme).activations, **more)  # type: ignore[arg-type]


def inputs(tokens: int, n_in: int = 256) -> Tensor:
    """bfloat16 with one channel of outliers."""
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(tokens))
    x[:, 3] *= 20
    return x.to(torch.bfloat16)


def exact(layer: QuantLinear, x: Tensor) -> Tensor:
    """What the layer computes [tokens, out], in float64 but for the rounding of inputs."""
    rounded = x if layer.activations is None else snap_inputs(x.float(), layer.activations, layer.inputs)
    y = rounded.double() @ layer.qt.dequantize().double().T
    if layer.low_rank is not None:
        A, B = layer.low_rank.factors()
        y = y + rounded.double() @ B.double().T @ A.double().T
    return y if layer.bias is None else y + layer.bias.double()


def assert_near(y: Tensor, expected: Tensor, bound: float = BOUND) -> None:
    difference = y.double() - expected
    assert torch.isfinite(difference).all()
    assert difference.norm() <= bound * expected.norm()
    for side in (0, 1):  # a wrong tile hides in the norm of all
        of_all = expected.norm() / expected.shape[side] ** 0.5
        assert (difference.norm(dim=1 - side) <= 2 * bound * torch.maximum(expected.norm(dim=1 - side), of_all)).all()


INT4 = [f"w{bits}a16g{group}{ending}" for bits in (2, 3, 4) for group in (32, 128) for ending in ("", "-asym", "-asymf16")]
INT4 += ["w4a16", "w3a16g64-asym", "ternaryg64", "binary", "w2starg64-asymf16", "e1m2g32", "w4a16g64-dq", "w4a8g128"]


@pytest.mark.parametrize("scheme", INT4)
def test_four_bits_on_the_cpu(scheme: str) -> None:
    layer = layer_of(scheme)
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear) and made.product.name == "torch int4"
    for tokens in (1, 3, cpu_int4.FEW + 1):  # the packed product, and decoded
        assert_near(made(inputs(tokens)), exact(layer, inputs(tokens)))


@pytest.mark.parametrize("scheme", ["w8a16", "w8a16-asym", "w6a16", "w5a16-asymf16", "e2m1", "iq4_nl", "e3m0"])
def test_eight_bits_on_the_cpu(scheme: str) -> None:
    layer = layer_of(scheme)
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear) and made.product.name == "torch int8"
    for tokens in (1, 3, cpu_int8.FEW + 1):
        assert_near(made(inputs(tokens)), exact(layer, inputs(tokens)))


@with_vnni
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym", "w8-aint8asym", "w4a8", "w4-aint4", "w8-aint6asym", "ternary-aint8"])
def test_eight_bits_by_eight_on_the_cpu(scheme: str) -> None:
    layer = layer_of(scheme)
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear) and made.product.name == "oneDNN int8 x int8"
    for tokens in (1, 3, 65):
        assert_near(made(inputs(tokens)), exact(layer, inputs(tokens)), 2**-9)  # only the result is rounded


@with_vnni
@pytest.mark.parametrize("scheme", ["w8-aint8static", "w8-aint8asymstatic"])
def test_static_inputs_on_the_cpu(scheme: str) -> None:
    activations = Scheme.model_validate(scheme).activations
    assert activations is not None
    zero = None if activations.symmetric else torch.tensor([101], dtype=torch.uint8)
    layer = layer_of(scheme, inputs=InputScales(activations, torch.tensor([0.05]), zero))
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear) and made.product.name == "oneDNN int8 x int8"
    assert_near(made(inputs(7)), exact(layer, inputs(7)), 2**-9)


@pytest.mark.parametrize("scheme", ["w4a16g64-asym", "w8a16-asym"])
def test_inputs_in_float16_are_rounded_to_bfloat16(scheme: str) -> None:
    layer = layer_of(scheme)
    made = fast(layer, torch.float16)
    assert isinstance(made, FastLinear)
    for tokens in (2, cpu_int4.FEW + 1):
        x = inputs(tokens).half()
        assert made(x).dtype == torch.float16
        assert_near(made(x), exact(layer, x), 4 * 2**-9)


@pytest.mark.parametrize("tokens", [(0,), (2, 3), (5, 1, 2)])
@pytest.mark.parametrize("scheme", ["w4a16g64-asym", "w8a16-asym", "w8a8-asym"])
def test_any_number_of_tokens_in_any_shape(tokens: tuple[int, ...], scheme: str) -> None:
    layer = layer_of(scheme)
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear)
    x = torch.randn(*tokens, 256, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    y = made(x)
    assert y.shape == (*tokens, 192) and y.dtype == torch.bfloat16
    if x.numel():
        assert_near(y.flatten(0, -2), exact(layer, x.flatten(0, -2)))


def test_a_low_rank_part_a_rotation_and_inputs_that_are_not_contiguous_stay() -> None:
    random = torch.Generator().manual_seed(3)
    factors = LowRank(torch.randn(192, 4, generator=random) / 9, torch.randn(4, 256, generator=random)).stored_in("bfloat16")
    layer = layer_of("w4a16g64", low_rank=factors)
    rotate_input(layer, torch.randint(0, 2, (256,), generator=random) * 2 - 1)
    made = fast(layer, torch.bfloat16)
    assert isinstance(made, FastLinear)
    x = inputs(8)[::2]
    rotated: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: rotated.append(args[0]))
    layer(x)
    assert_near(made(x), exact(layer, rotated[0]))


@pytest.mark.parametrize(
    ("scheme", "dtype", "reason"),
    [
        ("w4a16g64", torch.float32, "w4g64: inputs in float32: torch's packed products are fast in bfloat16 alone"),
        ("nf4g64", torch.bfloat16, "nf4g64: levels of nf4 are no 16 neighbouring whole numbers"),
        ("nvfp4", torch.bfloat16, "nvfp4: groups of 16, which do not divide by 32"),
        ("w8a16g128", torch.bfloat16, "w8g128: groups of 128: products of int8 take one scale per output"),
        ("e4m3-ae4m3", torch.bfloat16, "e4m3: levels of e4m3 are no 256 neighbouring whole numbers"),
    ],
)
def test_what_has_no_product_says_why(scheme: str, dtype: torch.dtype, reason: str) -> None:
    assert fast(layer_of(scheme), dtype) == reason


def test_shapes_that_torchs_products_do_not_take_say_so() -> None:
    assert fast(layer_of("w4a16g32", n=40), torch.bfloat16) == "w4g32: 40 outputs, which do not divide by 64"
    assert fast(layer_of("w8a16", n_in=40), torch.bfloat16) == (
        "w8: [192, 40] weights, which do not divide by 16 outputs and 32 inputs"
    )


def test_a_flipped_scale_is_noticed() -> None:
    layer = layer_of("w4a16g64")
    tensor = layer.qt
    scale = tensor.scale.clone()
    scale[5, 1] *= -1
    made = fast(QuantLinear(replace(tensor, scale=scale), layer.bias), torch.bfloat16)
    assert isinstance(made, FastLinear)
    with pytest.raises(AssertionError):
        assert_near(made(inputs(4)), exact(layer, inputs(4)))


# ---- products of GPUs, by their references on the CPU ----



@pytest.mark.parametrize("scheme", ["w4a16g64-asym", "nf4g64", "nvfp4", "w8a16"])
def test_the_product_of_weights_alone(scheme: str) -> None:
    layer = layer_of(scheme)
    product = CudaProduct(weight_only.pack(layer.qt))
    assert_near(product(inputs(5), layer.bias), exact(layer, inputs(5)))
    assert product.hidden_bytes < 2 * 192 * 256


@pytest.mark.parametrize("scheme", ["w8a8", "w8-aint8asym"])
def test_the_product_of_int8(scheme: str) -> None:
    layer = layer_of(scheme)
    whole = whole_levels(layer.qt, 8)
    assert isinstance(whole, WholeLevels) and layer.activations is not None
    product = CudaInt8Product(whole.code, whole.scale[:, 0], layer.activations.symmetric)
    assert_near(product(inputs(33).view(3, 11, 256), layer.bias).flatten(0, 1), exact(layer, inputs(33)), 2**-9)


def test_the_product_of_fp8() -> None:
    layer = layer_of("e4m3-ae4m3")
    assert_near(CudaFp8Product(layer.qt)(inputs(5), layer.bias), exact(layer, inputs(5)))


@pytest.fixture
def kernels_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """qtool's kernels serve wherever they can, by their references; the list gains the outputs of each launch."""
    launched: list[int] = []
    own = weight_only.matmul

    def matmul(x: Tensor, packed: weight_only.PackedWeight, bias: Tensor | None = None) -> Tensor:
        launched.append(packed.shape[0])
        return own(x, packed, bias)

    monkeypatch.setattr(fast_linear, "_reason_without_kernel", lambda made, _: weight_only.supports(made.scheme, made.shape))
    monkeypatch.setattr(shared_product, "matmul", matmul)
    return launched


def siblings(scheme: str, *sizes: int) -> list[QuantLinear]:
    """Layers with the same inputs, each with weights and a bias of its own."""
    biases = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16).split(sizes)
    return [QuantLinear(weights(scheme, n, seed=seed), biases[seed]) for seed, n in enumerate(sizes)]


def together(layers: list[QuantLinear]) -> list[FastLinear]:
    made = fast_together(layers, torch.bfloat16)
    assert not isinstance(made, str), made
    return made


@pytest.mark.parametrize("scheme", ["w4a16g64-asym", "nf4g64", "w8a16"])
def test_linears_that_read_one_input_share_a_launch(scheme: str, kernels_on_cpu: list[int]) -> None:
    layers = siblings(scheme, 192, 40, 8)  # no multiples of a tile
    layers[1].bias = None
    parts, x = together(layers), inputs(6).view(2, 3, 256)
    for part, layer in zip(parts, layers, strict=True):
        assert_near(part(x).flatten(0, 1), exact(layer, inputs(6)))
        assert sorted(part.state_dict()) == ["bias"] * (layer.bias is not None)
    assert kernels_on_cpu == [240]
    with torch.inference_mode():
        assert torch.equal(parts[0](inputs(6)), parts[0](inputs(6)))
    assert sum(part.product.hidden_bytes for part in parts) < 2.5 * 240 * 256


def test_a_shared_output_is_of_its_own_input_and_handed_out_once(kernels_on_cpu: list[int]) -> None:
    layers = siblings("w4a16g64", 192, 64)
    (one, two), x = together(layers), inputs(3)
    expected = one(x), two(inputs(5))  # another input than the first linear had
    assert_near(expected[1], exact(layers[1], inputs(5)))
    one(x)
    x[:] = inputs(4)[:3]  # the same tensor, written into
    assert_near(two(x), exact(layers[1], inputs(4)[:3]))
    x[:] = inputs(3)
    one(x).fill_(torch.nan)
    assert torch.equal(one(x), expected[0])
    assert kernels_on_cpu == [256] * 6


def test_a_compiled_block_shares_too(kernels_on_cpu: list[int]) -> None:
    (gate, up), x = together(siblings("w4a16g64", 64, 64)), inputs(3)
    block = torch.compile(lambda x: torch.nn.functional.silu(gate(x)) * up(x), fullgraph=True, backend="aot_eager")
    expected = torch.nn.functional.silu(gate(x)) * up(x)
    assert torch.equal(block(x), expected) and torch.equal(block(x), expected)


def test_a_new_tensor_is_a_new_input_where_torch_counts_no_writes(kernels_on_cpu: list[int]) -> None:
    (gate, up), x = together(siblings("w4a16g64", 64, 64)), inputs(3)
    expected = gate(x), up(x + 1)
    with torch.inference_mode():
        assert torch.equal(gate(x), expected[0]) and torch.equal(up(x + 1), expected[1])
    block = torch.compile(lambda x: (gate(x), up(x + 1)), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(found, wanted) for found, wanted in zip(block(x), expected, strict=True))


def test_what_shares_nothing_says_why(kernels_on_cpu: list[int]) -> None:
    rotated = layer_of("w4a16g64")
    rotate_input(rotated, torch.ones(256))
    for other in (layer_of("w4a8g64"), rotated):
        assert fast_together([layer_of("w4a16g64"), other], torch.bfloat16) == (
            "inputs that are rounded or rotated first are a new tensor for each"
        )
    assert "are not the same" in str(fast_together([layer_of("w4a16g64"), layer_of("w4a16g32")], torch.bfloat16))
    assert "groups along `out`" in str(fast_together([layer_of("w4a16g64-ic")] * 2, torch.bfloat16))


def test_no_product_is_shared_on_the_cpu() -> None:
    assert fast_together([layer_of("w4a16g64")] * 2, torch.bfloat16) == "cpu has no kernels of qtool's"
