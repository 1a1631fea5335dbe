"""SignRound against its algorithm written out for one linear, and in a block: what it starts from, gains and keeps."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.methods.quantize.sign_round import SignRoundOptions, sign_round
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
    options = SignRoundOptions.model_validate({"scheme": short, **choices})
    schemes = dict.fromkeys(block.linears(), Scheme.model_validate(short))
    return sign_round(block, hidden, targets, schemes, options, 0, print)


def error(block: Block, hidden: Tensor, targets: Tensor, tensors: dict[str, QuantizedTensor]) -> float:
    biases = {name: getattr(block.get(name), "bias", None) for name in tensors}
    with block.replaced({name: QuantLinear(tensor, biases[name]) for name, tensor in tensors.items()}):
        return float((block.forward(hidden) - targets).square().mean())


def test_without_a_step_it_is_rounding_to_nearest(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    for name, tensor in run(block, hidden, targets, "w4a16g32", steps=0).items():
        assert torch.equal(tensor.codes, quantize(weight_of(block.get(name)), tensor.scheme).codes), name


def test_three_steps_equal_the_algorithm_written_out(tiny_model: Callable[..., Path]) -> None:
    """One linear alone is quantized, with a scale per row that stays (range_lr nearly 0), so V can be followed by hand."""
    block, hidden, targets = prepared(tiny_model("llama"))
    name = f"{block.name}.mlp.down_proj"
    scheme = Scheme.model_validate({"weights": {"bits": 2, "scale_dtype": "float32"}})
    options = SignRoundOptions.model_validate({"scheme": scheme, "steps": 3, "lr": 0.2, "range_lr": 1e-30, "batch": 6})
    found = sign_round(block, hidden, targets, {name: scheme}, options, 0, print)[name]

    W = weight_of(block.get(name))
    low, high = -W.amin(1, keepdim=True), W.amax(1, keepdim=True)  # [out, 1]
    size = torch.maximum(torch.maximum(low, high) / 2.5, torch.minimum(low, high) / 1.5)
    scale = torch.where(high > low, -1, 1) * size  # the largest value takes the longer side
    seen: list[Tensor] = []
    hook = block.get(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    out = block.forward(hidden)
    hook.remove()
    x = torch.cat(seen)  # [tokens, in]
    rest = (targets - out).flatten(0, 1) + x @ W.T  # what the linear alone must give, [tokens, hidden]
    V, tried = torch.zeros_like(W), []
    for step in range(3):
        codes = (W / scale + V).round().clamp(-2, 1)
        residual = x @ (codes * scale).T - rest
        tried.append((float(residual.square().mean()), codes))
        soft = W / scale + V
        gradient = 2 * residual.T @ x / residual.numel() * scale * ((soft >= -2) & (soft <= 1))
        V = (V - 0.2 * (1 - step / 3) * gradient.sign()).clamp(-0.5, 0.5)
    assert torch.equal(found.codes.float(), min(tried, key=lambda entry: entry[0])[1])
    assert len({codes.sum().item() for _, codes in tried}) == 3  # every step changed something


@pytest.mark.parametrize("short", ["w4a16g32", "w3a16g32-asym", "w2a16g32-asym", "mxfp4"])
def test_learning_lowers_the_blocks_error_well_below_roundings(short: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    plain = error(block, hidden, targets, run(block, hidden, targets, short, steps=0))
    learned = error(block, hidden, targets, run(block, hidden, targets, short, steps=60))
    assert learned < 0.8 * plain


@pytest.mark.parametrize("family", ["opt", "gpt2", "mixtral"])
def test_biases_conv1d_and_experts_learn_too(family: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model(family))
    found = run(block, hidden, targets, "w3a16g32", steps=30)
    assert list(found) == list(block.linears())
    plain = run(block, hidden, targets, "w3a16g32", steps=0)
    assert error(block, hidden, targets, found) < error(block, hidden, targets, plain)


def test_a_batch_may_be_of_any_size(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"), samples=11)
    for batch in (1, 3, 11, 64):
        assert run(block, hidden, targets, "w4a16g32", steps=2, batch=batch)


def test_a_pruned_weight_may_stay_zero_and_a_dead_column_does_no_harm(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    weight = block.get(f"{block.name}.mlp.down_proj").get_parameter("weight")
    weight.data[:, :32] = 0.0
    found = run(block, hidden, block.forward(hidden), "w4a16g32", steps=5)
    assert torch.equal(found[f"{block.name}.mlp.down_proj"].dequantize()[:, :32], torch.zeros(64, 32))
