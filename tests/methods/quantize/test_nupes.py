"""NUPES against its steps written out for one linear, and in a block: what it starts from, gains, keeps and may reach."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.codebook import EXPONENTS
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.power_linear import PowerLinear
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.quantize.nupes import NupesOptions, check, nupes
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions


def prepared(folder: Path, samples: int = 6) -> tuple[Block, Tensor, Tensor]:
    """A block, its inputs and its outputs [samples, length, hidden]."""
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    tokens = torch.randint(2, 4096, (samples, 16), generator=torch.Generator().manual_seed(0))
    hidden = model.embed(tokens)
    block = model.block(0)
    return block, hidden, block.forward(hidden)


def run(block: Block, hidden: Tensor, targets: Tensor, short: str, **choices: object) -> dict[str, QuantizedTensor]:
    options = NupesOptions.model_validate({"scheme": short, **choices})
    schemes = dict.fromkeys(block.linears(), Scheme.model_validate(short))
    return nupes(block, hidden, targets, schemes, options, 0, print)


def error(block: Block, hidden: Tensor, targets: Tensor, tensors: dict[str, QuantizedTensor]) -> float:
    biases = {name: getattr(block.get(name), "bias", None) for name in tensors}
    with block.replaced({name: QuantLinear(tensor, biases[name]) for name, tensor in tensors.items()}):
        return float((block.forward(hidden) - targets).square().mean())


@pytest.mark.parametrize("short", ["power4g32", "power3", "power2g32"])
def test_without_a_step_it_is_powerquant(short: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    for name, tensor in run(block, hidden, targets, short, steps=0).items():
        plain = quantize(weight_of(block.get(name)), tensor.scheme)
        assert tensor.exponent == plain.exponent and torch.equal(tensor.scale, plain.scale)
        # A weight half way between two levels may go to either.
        assert float((tensor.codes == plain.codes).float().mean()) > 0.999, name


def test_three_steps_equal_the_algorithm_written_out(tiny_model: Callable[..., Path]) -> None:
    """The last linear of the block alone, three bits, a float32 scale for each row, and all windows in every step."""
    block, hidden, targets = prepared(tiny_model("llama"))
    name = f"{block.name}.mlp.down_proj"
    scheme = Scheme.model_validate({"weights": {"format": "power", "bits": 3, "scale_dtype": "float32"}})
    options = NupesOptions.model_validate({"scheme": scheme, "steps": 3, "lr": 0.3, "exponent_lr": 0.05, "batch": 6})
    found = nupes(block, hidden, targets, {name: scheme}, options, 0, print)[name]

    W, m = weight_of(block.get(name)), 3
    plain = quantize(W, scheme.weights)
    seen: list[Tensor] = []
    hook = block.get(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    out = block.forward(hidden)
    hook.remove()
    x = torch.cat(seen)  # [tokens, in]
    rest = (targets - out).flatten(0, 1) + x @ W.T  # what the linear alone must give, [tokens, hidden]
    scale, a = W.abs().amax(1, keepdim=True), torch.tensor(plain.exponent)

    def level(k: Tensor) -> Tensor:
        return k.sign() * (k.abs() / m) ** (1 / a)

    ladder = level(torch.arange(-m, m + 1.0))
    unit = (W / scale).contiguous()
    below = (torch.bucketize(unit, ladder, right=True) - 1).clamp(0, 2 * m - 1)
    v = below - m + (unit - ladder[below]) / (ladder[below + 1] - ladder[below])
    tried, state = [], [(torch.zeros_like(v), torch.zeros_like(v)), (torch.zeros(()), torch.zeros(()))]
    for step in range(3):
        k = v.round()
        residual = x @ (scale * level(k)).T - rest
        tried.append((float(residual.square().mean()), k, float(a)))
        of_weights = 2 * residual.T @ x / residual.numel() * scale
        lower = v.floor().clamp(max=m - 1)
        logs = torch.where(k == 0, 0.0, (k.abs().clamp(min=1) / m).log())
        gradients = (of_weights * (level(lower + 1) - level(lower)), (of_weights * level(k) * logs * (-1 / a**2)).sum())
        moves = []
        for i, (g, rate) in enumerate(zip(gradients, (0.3, 0.05), strict=True)):
            state[i] = (0.9 * state[i][0] + 0.1 * g, 0.999 * state[i][1] + 0.001 * g * g)
            mean, spread = state[i][0] / (1 - 0.9 ** (step + 1)), state[i][1] / (1 - 0.999 ** (step + 1))
            moves.append(rate * (1 - step / 3) * mean / (spread.sqrt() + 1e-8))
        v, a = (v - moves[0]).clamp(-m, m), (a - moves[1]).clamp(*EXPONENTS)
    _, codes, exponent = min(tried, key=lambda entry: entry[0])
    assert found.exponent == pytest.approx(exponent, abs=1e-4)
    # A place in the middle of two codes, or a gradient of nearly zero, may go either way.
    assert float((found.codes.float() - m == codes).float().mean()) > 0.995
    assert len({float(k.sum()) for _, k, _ in tried}) == 3  # every step changed something
    assert len({a for *_, a in tried}) == 3


@pytest.mark.parametrize("short", ["power4g32", "power3g32", "power2"])
def test_learning_lowers_the_blocks_error_well_below_powerquants(short: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    plain = error(block, hidden, targets, run(block, hidden, targets, short, steps=0))
    assert error(block, hidden, targets, run(block, hidden, targets, short, steps=60)) < 0.8 * plain


def test_any_code_may_be_reached_from_any_other() -> None:
    layer = PowerLinear(torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), None, Scheme.model_validate("power3"))
    with torch.no_grad():
        layer.v.fill_(-9.0)
    layer.clamp()
    assert layer.quantized().codes.unique().tolist() == [0]
    with torch.no_grad():
        layer.v.fill_(9.0)
        layer.a.fill_(5.0)
    layer.clamp()
    assert layer.quantized().codes.unique().tolist() == [6] and layer.quantized().exponent == EXPONENTS[1]


def test_the_gradient_of_v_is_that_of_straight_lines_between_levels_at_zero_too() -> None:
    layer = PowerLinear(torch.tensor([[0.0, 0.2, 0.55, -1.0]]), None, Scheme.model_validate("power3"))
    (gradient,) = torch.autograd.grad(layer.weight_values().sum(), layer.v)
    a, k = float(layer.a.detach()), layer.v.detach().flatten()

    def level(place: float) -> float:
        return math.copysign((abs(place) / 3) ** (1 / a), place) if place else 0.0

    expected = [level(min(math.floor(p), 2) + 1) - level(min(math.floor(p), 2)) for p in k.tolist()]
    assert gradient.flatten().tolist() == pytest.approx(expected, rel=1e-4)
    assert float(gradient.min()) > 0


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral"])
def test_biases_conv1d_and_experts_learn_too(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model(family))
    found = run(block, hidden, targets, "power3g32", steps=20)
    assert list(found) == list(block.linears())
    plain = run(block, hidden, targets, "power3g32", steps=0)
    assert error(block, hidden, targets, found) < error(block, hidden, targets, plain)


def test_a_group_of_zeros_stays_zero_without_a_step(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    block.get(f"{block.name}.mlp.down_proj").get_parameter("weight").data[:, :32] = 0.0
    found = run(block, hidden, block.forward(hidden), "power4g32", steps=0)
    assert torch.equal(found[f"{block.name}.mlp.down_proj"].dequantize()[:, :32], torch.zeros(64, 32))


def test_schemes_without_an_exponent_are_refused_before_any_work() -> None:
    with pytest.raises(QtoolError, match="w4a16g128 has no exponent to learn; write a power grid"):
        check(None, NupesOptions.model_validate({"scheme": "w4a16g128"}))
