"""ABQ by hand, with and without its correction and attention, in a block: what it gains, keeps and notes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.linalg.distance import distance, symmetric_kl
from qtool.methods.quantize.abq import AbqOptions, abq, is_near_an_end, kind_of, last_linears
from qtool.model.attention import EagerAttention
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions

DOWN = "mlp.down_proj"


def prepared(folder: Path, samples: int = 6, dtype: str = "float32", index: int = 0) -> tuple[Block, Tensor, Tensor]:
    """A block, its inputs and, as after blocks that were rounded, targets beside its outputs [samples, length, hidden]."""
    model = ModelHandle(ModelOptions.model_validate({"path": str(folder), "dtype": dtype}))
    random = torch.Generator().manual_seed(0)
    hidden = model.embed(torch.randint(2, 4096, (samples, 16), generator=random))
    block = model.block(index)
    targets = block.forward(hidden)
    return block, hidden, targets + 0.02 * torch.randn(targets.shape, generator=random).to(targets.dtype)


def run(
    block: Block, hidden: Tensor, targets: Tensor, short: str, names: list[str] | None = None, **choices: object
) -> tuple[dict[str, QuantizedTensor], list[str]]:
    """What the method makes of the named linears, all where None, and what it notes."""
    options, notes = AbqOptions.model_validate({"scheme": short, **choices}), []
    schemes = dict.fromkeys(names or block.linears(), Scheme.model_validate(short))
    return abq(block, hidden, targets, schemes, options, 0, notes.append), notes


def error(block: Block, hidden: Tensor, targets: Tensor, tensors: dict[str, QuantizedTensor]) -> float:
    biases = {name: getattr(block.get(name), "bias", None) for name in tensors}
    with block.replaced({name: QuantLinear(tensor, biases[name]) for name, tensor in tensors.items()}):
        return float((block.forward(hidden).float() - targets.float()).square().mean())


def rounding(block: Block, names: list[str], short: str) -> dict[str, QuantizedTensor]:
    return {name: quantize(weight_of(block.get(name)), Scheme.model_validate(short).weights) for name in names}


# ---- the golden ----


def test_two_steps_equal_the_algorithm_written_out(tiny_model: Callable[..., Path]) -> None:
    """down_proj alone on five levels, a scale per row: forward, losses and AdamW by hand; attention comes before it."""
    block, hidden, targets = prepared(tiny_model("llama"))
    name = f"{block.name}.{DOWN}"
    scheme = {"weights": {"format": "w2star", "scale_dtype": "float32"}}
    found, notes = run(block, hidden, targets, scheme, [name], steps=2, lr=0.4, correction_lr=0.05, batch=6)  # type: ignore[arg-type]

    W, seen = weight_of(block.get(name)), []
    hook = block.get(name).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    own = block.forward(hidden)
    hook.remove()
    x, residual = seen[0], own - seen[0] @ W.T  # [samples, length, in], [samples, length, hidden]

    def rounded(a: Tensor, b: Tensor, u: Tensor, v: Tensor) -> Tensor:
        w = W + W.abs().mean() * u * v
        reach = torch.maximum(a.sigmoid() * w.amax(1, keepdim=True), -b.sigmoid() * w.amin(1, keepdim=True))
        scale = reach / 2  # [out, 1]
        units = w / scale
        return (units.clamp(-2, 2) + (units.round().clamp(-2, 2) - units.clamp(-2, 2)).detach()) * scale

    def loss(W_rounded: Tensor) -> Tensor:
        out = x @ W_rounded.T + residual
        squares = (out - targets).square().mean() + (out - own).square().mean()
        return squares - sum(F.cosine_similarity(out, other, dim=-1).log().mean() for other in (targets, own))

    p = [torch.full((len(W), 1), 4.0), torch.full((len(W), 1), 4.0), torch.zeros(len(W), 1), torch.ones(1, W.shape[1])]
    m, v = [torch.zeros_like(q) for q in p], [torch.zeros_like(q) for q in p]
    for step in (1, 2):
        for q in p:
            q.requires_grad_()
        gradients = torch.autograd.grad(loss(rounded(*p)), p)
        rates = [rate * (1 - (step - 1) / 2) for rate in (0.4, 0.4, 0.05, 0.05)]
        for i, g in enumerate(gradients):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.999 * v[i] + 0.001 * g**2
            root = (v[i] / (1 - 0.999**step)).sqrt()
            p[i] = (p[i] - rates[i] * (m[i] / (1 - 0.9**step)) / (root + 1e-12)).detach()
    assert notes == [] and bool((p[2] != 0).any()) and bool((p[3] != 1).any())
    # A weight half way between two levels may go to either, and gradients near zero lose digits in AdamW's quotient.
    assert float((found[name].dequantize() - rounded(*p)).abs().gt(1e-3 * W.abs().mean()).float().mean()) < 0.02


def test_distance_and_divergence_are_what_they_say() -> None:
    a = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    b = torch.tensor([[4.0, 3.0], [1.0, 0.0]])
    assert float(distance(a, b)) == pytest.approx(0.5 - torch.tensor(24 / 25).log().item() / 2)
    A, B = torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]])
    assert float(symmetric_kl(A, B)) == pytest.approx(torch.tensor(3.0).log().item() / 2)  # 2 · (½ log 3) of two queries
    assert float(symmetric_kl(A, A)) == 0


# ---- what it promises ----


@pytest.mark.parametrize("short", ["w2starg32-aint8", "w2a8g32-asym"])
def test_learning_lowers_the_blocks_error_below_roundings(short: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"))
    found, notes = run(block, hidden, targets, short, steps=20)
    # Inputs are rounded while it learns; here weights alone are compared.
    assert error(block, hidden, targets, found) < 0.95 * error(block, hidden, targets, rounding(block, list(found), short))
    assert notes == []


def test_the_correction_lowers_the_error_and_belongs_to_the_blocks_at_the_ends(tiny_model: Callable[..., Path]) -> None:
    """After a ReLU all inputs are positive, so that what rounding adds to a row is its output's mean error."""
    folder = tiny_model("opt", num_hidden_layers=4)
    block, hidden, _ = prepared(folder)
    names, targets = [f"{block.name}.fc2"], block.forward(hidden)
    with_it, without = (run(block, hidden, targets, "w2star", names, steps=30, corrected=n, batch=6)[0] for n in (1, 0))
    assert error(block, hidden, targets, with_it) < 0.9 * error(block, hidden, targets, without)
    model = block.model
    ends = [[is_near_an_end(Block(model, index, block.module, ""), n) for index in range(4)] for n in (0, 1, 2)]
    assert ends == [[False] * 4, [True, False, False, True], [True] * 4]
    middle, hidden, targets = prepared(folder, index=1)
    names = [f"{middle.name}.fc2"]
    one, none = (run(middle, hidden, targets, "w2star", names, steps=3, corrected=n)[0] for n in (1, 0))
    assert torch.equal(one[names[0]].codes, none[names[0]].codes)


def test_attention_counts_in_the_loss(tiny_model: Callable[..., Path]) -> None:
    """With outputs that do not depend on it (a zero o_proj), attention alone can move the ranges of queries and keys."""
    block, hidden, targets = prepared(tiny_model("llama"))
    with torch.no_grad():
        block.get(f"{block.name}.self_attn.o_proj").get_parameter("weight").zero_()
        for which in "qk":
            block.get(f"{block.name}.self_attn.{which}_proj").get_parameter("weight").mul_(6)
    targets, names = block.forward(hidden), [f"{block.name}.self_attn.{which}_proj" for which in "qk"]
    found, _ = run(block, hidden, targets, "w2a16g32-asym", names, steps=20)

    def scores(tensors: dict[str, QuantizedTensor]) -> float:
        attention = EagerAttention(block.model, 16, 6)
        _, (expected,) = attention.forward(block, hidden)
        with block.replaced({name: QuantLinear(tensor, None) for name, tensor in tensors.items()}):
            _, (maps,) = attention.forward(block, hidden)
        return float(symmetric_kl(expected, maps))

    assert scores(found) < 0.95 * scores(rounding(block, names, "w2a16g32-asym"))


# ---- edges ----


@pytest.mark.parametrize(("family", "last"), [("opt", "fc2"), ("gpt2", "mlp.c_proj"), ("mixtral", "down.#")])
def test_other_families_learn_too_from_their_last_linear(family: str, last: str, tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model(family))
    (kind,) = last_linears(block, hidden)
    assert kind.endswith(last) and any(kind_of(name) == kind for name in block.linears())
    found, _ = run(block, hidden, targets, "w3a16g32", steps=4)
    assert list(found) == list(block.linears())
    assert error(block, hidden, targets, found) <= error(block, hidden, targets, rounding(block, list(found), "w3a16g32"))


def test_a_block_in_float16_learns_too(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("llama"), dtype="float16")
    found, _ = run(block, hidden, targets, "w2starg32", steps=15)
    assert error(block, hidden, targets, found) < error(block, hidden, targets, rounding(block, list(found), "w2starg32"))


class Silent(nn.Module):
    """In place of attention: changes nothing and returns no weights."""

    def forward(self, hidden_states: Tensor, **rest: object) -> tuple[Tensor, None]:
        return hidden_states, None


def test_a_block_without_attention_weights_learns_by_its_output_and_that_is_noted(tiny_model: Callable[..., Path]) -> None:
    block, hidden, _ = prepared(tiny_model("llama"))
    block.module.self_attn = Silent()
    found, notes = run(block, hidden, block.forward(hidden), "w2starg32", steps=5)
    assert list(found) == list(block.linears())
    assert len(notes) == 1 and notes[0].startswith("attention takes no part in the loss: its forward returns no attention")


def test_where_learning_does_not_help_rounding_stays_and_is_noted(tiny_model: Callable[..., Path]) -> None:
    """Weights of two values per group stand on levels already, and any smaller range only moves them off."""
    block, hidden, _ = prepared(tiny_model("llama"))
    name = f"{block.name}.{DOWN}"
    weight = block.get(name).get_parameter("weight")
    weight.data = weight.data.sign()
    found, notes = run(block, hidden, block.forward(hidden), "w2star", [name], steps=2)
    assert torch.equal(found[name].dequantize(), weight_of(block.get(name)))
    assert len(notes) == 1 and "full range" in notes[0]


def test_a_group_of_zeros_stays_zero_and_experts_without_tokens_stay_finite(tiny_model: Callable[..., Path]) -> None:
    block, hidden, targets = prepared(tiny_model("mixtral", num_local_experts=16, num_experts_per_tok=1), samples=2)
    value = next(name for name in block.linears() if name.endswith("v_proj"))
    block.get(value).get_parameter("weight").data[:, :32] = 0.0
    found, _ = run(block, hidden, targets, "w4a16g32-asym", steps=3)
    assert torch.equal(found[value].dequantize()[:, :32], torch.zeros(len(found[value].codes), 32))
    assert all(torch.isfinite(tensor.dequantize()).all() for tensor in found.values())
