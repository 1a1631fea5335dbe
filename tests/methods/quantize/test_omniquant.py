"""OmniQuant's weight clipping by hand, against a search over all ranges, and in a block: what it gains and keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.quantize.omniquant import OmniquantOptions, omniquant
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

DOWN = "mlp.down_proj"


def prepared(folder: Path, samples: int = 6, dtype: str = "float32") -> tuple[Block, Tensor, Tensor]:
    """A block, its inputs and its outputs [samples, length, hidden]."""
    model = ModelHandle(ModelOptions.model_validate({"path": str(folder), "dtype": dtype}))
    tokens = torch.randint(2, 4096, (samples, 16), generator=torch.Generator().manual_seed(0))
    hidden = model.embed(tokens)
    block = model.block(0)
    return block, hidden, block.forward(hidden)


def run(
    block: Block, hidden: Tensor, targets: Tensor, short: str, names: list[str] | None = None, **choices: object
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """What the method makes of the named linears, all where None, and what it notes."""
    options, notes = OmniquantOptions.model_validate({"scheme": short, **choices}), []
    schemes = dict.fromkeys(names or block.linears(), Scheme.model_validate(short))
    return omniquant(block, hidden, targets, schemes, options, 0, notes.append), notes


def error(block: Block, hidden: Tensor, targets: Tensor, tensors: dict[str, QuantizedTensor]) -> float:
    biases = {name: getattr(block.get(name), "bias", None) for name in tensors}
    with block.replaced({name: QuantLinear(tensor, biases[name]) for name, tensor in tensors.items()}):
        return float((block.forward(hidden).float() - targets.float()).square().mean())


def inputs_of(block: Block, name: str, hidden: Tensor) -> Tensor:
    """What a linear is fed, [tokens, in]."""
    seen: list[Tensor] = []
    hook = block.get(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    block.forward(hidden)
    hook.remove()
    return torch.cat(seen)


def rounding(block: Block, names: list[str], short: str) -> dict[str, QuantizedTensor]:
    return {name: quantize(weight_of(block.get(name)), Scheme.model_validate(short).weights) for name in names}


@pytest.mark.parametrize("short", ["w2a16-asym", "w3a16-asym", "w3a16"])
def test_gradients_find_what_a_search_over_clipped_ranges_finds(short: str, tiny_model: Callable[..., Path]) -> None:
    """One linear, one group a row: the rows' errors add up, so each row's best pair of shares is found by trying all."""
    block, hidden, _ = prepared(tiny_model("llama", intermediate_size=512), samples=48)
    name = f"{block.name}.{DOWN}"
    weight = block.get(name).get_parameter("weight")
    weight.data = weight.data * 10 * weight.data.abs()  # a few weights far out, as real ones have
    targets = block.forward(hidden)
    found, _ = run(block, hidden, targets, short, [name], steps=100, lr=0.1, batch=48)

    W, scheme = weight_of(block.get(name)), Scheme.model_validate(short).weights
    x, shares = inputs_of(block, name, hidden), torch.linspace(0.3, 1.0, 15)  # [tokens, in]
    best = torch.full((len(W),), torch.inf)
    for upper in shares:
        for lower in shares if not scheme.symmetric else upper.view(1):
            params = scheme.grid.fit_range(lower * W.amin(1).view(-1, 1, 1), upper * W.amax(1).view(-1, 1, 1))
            D = quantize(W, scheme, params).dequantize() - W  # [out, in]
            best = torch.minimum(best, (x @ D.T).square().mean(0))  # [out]
    oracle, plain = float(best.mean()), error(block, hidden, targets, rounding(block, [name], short))
    learned = error(block, hidden, targets, found)
    # A row's error jumps as weights change codes: the search takes the luckiest jump, gradients the valley it lies in.
    assert learned <= oracle + 0.25 * (plain - oracle)


def test_three_steps_equal_the_algorithm_written_out(tiny_model: Callable[..., Path]) -> None:
    """One linear alone is quantized, symmetric and with a scale per row, so that AdamW's path can be followed by hand."""
    block, hidden, targets = prepared(tiny_model("llama"))
    name = f"{block.name}.{DOWN}"
    scheme = Scheme.model_validate({"weights": {"bits": 2, "scale_dtype": "float32"}})
    options = OmniquantOptions.model_validate({"scheme": scheme, "steps": 3, "lr": 0.5, "batch": 6})
    found = omniquant(block, hidden, targets, {name: scheme}, options, 0, print)[name]

    W, x = weight_of(block.get(name)), inputs_of(block, name, hidden)  # [out, in], [tokens, in]
    ends = torch.stack([W.amax(1), -W.amin(1)])  # [2, out]: what a and b multiply
    p, m, v = torch.full_like(ends, 4.0), torch.zeros_like(ends), torch.zeros_like(ends)
    tried = []
    for step in range(1, 4):
        reach = p.sigmoid() * ends
        sign = torch.where(reach[0] > reach[1], -1, 1)  # [out]
        steps = torch.where(reach == reach.amax(0), 2.5, 1.5)  # [2, out], on the longer side and on the other
        scale = (sign * (reach / steps).amax(0))[:, None]  # [out, 1]
        codes = (W / scale).round().clamp(-2, 1)
        residual = x @ (codes * scale - W).T  # [tokens, out]
        tried.append((float(residual.norm()), scale.squeeze(1), codes))
        G = residual.T @ x / residual.norm()  # [out, in], of the weights
        inside = (W / scale >= -2) & (W / scale <= 1)
        by_scale = (G * (codes - W / scale * inside)).sum(1)  # [out]
        tells = reach / steps == (reach / steps).amax(0)
        gradient = sign * by_scale * tells * p.sigmoid() * (1 - p.sigmoid()) * ends / steps
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        p = p - 0.5 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    _, scale, codes = min(tried, key=lambda entry: entry[0])
    assert torch.allclose(found.scale.squeeze(1), scale, rtol=1e-4)
    # A weight whose two nearest levels are equally far may fall to either side.
    assert float((found.codes == codes).float().mean()) > 0.999
    assert len({float(scale.sum()) for _, scale, _ in tried}) == 3  # every step changed something


def test_without_a_step_98_percent_of_each_range_is_left(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    share = 1 / (1 + torch.tensor(-4.0).exp())
    for name, tensor in run(block, hidden, targets, "w4a16g32-asym", steps=0)[0].items():
        grouped = weight_of(block.get(name)).view(tensor.shape[0], -1, 32)  # [out, groups, group]
        params = tensor.scheme.grid.fit_range(share * grouped.amin(-1, keepdim=True), share * grouped.amax(-1, keepdim=True))
        expected = quantize(grouped.flatten(1), tensor.scheme, params)
        assert torch.equal(tensor.codes, expected.codes) and torch.equal(tensor.scale, expected.scale), name


@pytest.mark.parametrize("short", ["w4a16g32", "w3a16g32-asym", "w2a16g32-asym", "w2a16g64-asymf16", "nf4g32", "w4a4"])
def test_learning_lowers_the_blocks_error_below_roundings(short: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    found, notes = run(block, hidden, targets, short, steps=60)
    # Activations of four bits are rounded while it learns; here weights alone are compared.
    assert error(block, hidden, targets, found) < 0.95 * error(block, hidden, targets, rounding(block, list(found), short))
    assert notes == []


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral"])
def test_biases_conv1d_and_experts_learn_too(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model(family))
    found, _ = run(block, hidden, targets, "w3a16g32", steps=30)
    assert list(found) == list(block.linears())
    assert error(block, hidden, targets, found) < error(block, hidden, targets, rounding(block, list(found), "w3a16g32"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_block_in_half_precision_learns_too(dtype: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"), dtype=dtype)
    found, _ = run(block, hidden, targets, "w2a16g32-asym", steps=40)
    assert error(block, hidden, targets, found) < 0.9 * error(
        block, hidden, targets, rounding(block, list(found), "w2a16g32-asym")
    )


def test_where_no_smaller_range_helps_the_full_one_stays_and_is_noted(tiny_model: Callable[..., Path]) -> None:
    """Weights of two values per group stand at both ends of the range, and a smaller one only cuts them off."""
    block, hidden, _ = prepared(tiny_model("llama"))
    name = f"{block.name}.{DOWN}"
    weight = block.get(name).get_parameter("weight")
    weight.data = weight.data.sign() * 0.5625 + 0.1875  # 0.75 and -0.375, whose ends lie beyond the last levels
    found, notes = run(block, hidden, block.forward(hidden), "w2a16g32-asym", [name], steps=3)
    assert torch.equal(found[name].dequantize(), rounding(block, [name], "w2a16g32-asym")[name].dequantize())
    assert len(notes) == 1 and "full range" in notes[0]


def test_a_group_of_zeros_stays_zero_and_experts_without_tokens_are_clipped_like_none(tiny_model: Callable[..., Path]) -> None:
    block, hidden, _ = prepared(tiny_model("mixtral", num_local_experts=64, num_experts_per_tok=1), samples=2)
    value = next(name for name in block.linears() if name.endswith("v_proj"))
    block.get(value).get_parameter("weight").data[:, :32] = 0.0
    found, _ = run(block, hidden, block.forward(hidden), "w4a16g32-asym", steps=5)
    assert torch.equal(found[value].dequantize()[:, :32], torch.zeros(len(found[value].codes), 32))
    assert all(torch.isfinite(tensor.dequantize()).all() for tensor in found.values())
