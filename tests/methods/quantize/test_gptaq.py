"""GPTQ with alpha (GPTAQ): making up for drifted inputs, against updates by fresh inverses, and by what it is for."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.methods.quantize.gptq import METHOD, GptqOptions, gptq

N_IN = 32


def inputs(drift: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What the original and the changed model feed the linear, [tokens, in]: correlated, and drifting apart together."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(N_IN, N_IN, generator=random) * (0.1 + torch.rand(N_IN, generator=random)) ** 2
    original = torch.randn(400, N_IN, generator=random) @ mix
    turn = torch.eye(N_IN) + drift * torch.randn(N_IN, N_IN, generator=random) / N_IN**0.5
    return original, original @ turn


def gather(original: Tensor, changed: Tensor) -> LayerStats:
    stats = LayerStats(N_IN, ("hessian", "drift"))
    for x, before in zip(changed.split(150), original.split(150), strict=True):
        stats.update(x, before)
    return stats


def run(W: Tensor, stats: LayerStats, short: str = "w3a16g8", **choices: object) -> QuantizedTensor:
    options = GptqOptions.model_validate({"scheme": short, "range": "minmax", **choices})
    notes: list[str] = []
    tensor = gptq(W.clone(), stats, Scheme.model_validate(short).weights, options, notes.append)
    assert notes == []
    return tensor


def golden(W: Tensor, original: Tensor, changed: Tensor, alpha: float, order: list[int]) -> Tensor:
    """Codes [out, in] by the paper's two updates, each with an inverse of its own in float64; one scale per row."""
    x, drifted = changed.double(), (original - changed).double()
    H, D = x.T @ x / len(x), drifted.T @ x / len(x)
    H += 0.01 * H.diagonal().mean() * torch.eye(N_IN, dtype=torch.float64)
    w, codes = W.double().clone(), torch.zeros(len(W), N_IN)
    low, high = -W.amin(1), W.amax(1)  # [out]
    size = torch.maximum(torch.maximum(low, high) / 4.5, torch.minimum(low, high) / 3.5)
    scale = torch.where(high > low, -1, 1) * size.bfloat16().double()  # [out]
    for turn, c in enumerate(order):
        left, later = order[turn:], order[turn + 1 :]
        current = w[:, c].clone()
        codes[:, c] = (current / scale).round().clamp(-4, 3)
        inverse = torch.linalg.inv(H[left][:, left])
        error = (current - codes[:, c] * scale) / inverse[0, 0]
        w[:, left] -= error[:, None] * inverse[0]
        if later:
            w[:, later] += alpha * current[:, None] * (D[c, later] @ torch.linalg.inv(H[later][:, later]))
    return codes


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("act_order", ["none", "static"])
def test_codes_equal_those_of_the_two_updates_by_fresh_inverses(act_order: str, alpha: float) -> None:
    W = torch.randn(6, N_IN, generator=torch.Generator().manual_seed(1))
    original, changed = inputs(drift=0.3)
    stats = gather(original, changed)
    diagonal = stats.hessian().diagonal()
    order = list(range(N_IN)) if act_order == "none" else diagonal.argsort(descending=True, stable=True).tolist()
    tensor = run(W, stats, "w3a16", alpha=alpha, act_order=act_order)
    assert torch.equal(tensor.codes.float(), golden(W, original, changed, alpha, order))


@pytest.mark.parametrize("act_order", ["none", "static", "group"])
def test_without_drift_it_is_gptq_to_the_bit(act_order: str) -> None:
    W = torch.randn(6, N_IN, generator=torch.Generator().manual_seed(1))
    original, _ = inputs(drift=0.0)
    stats = gather(original, original)
    first, second = (run(W, stats, alpha=alpha, act_order=act_order) for alpha in (0.0, 1.0))
    assert torch.equal(first.codes, second.codes) and torch.equal(first.scale, second.scale)


def test_the_original_output_is_met_better_than_by_gptq() -> None:
    W = torch.randn(24, N_IN, generator=torch.Generator().manual_seed(2))
    original, changed = inputs(drift=0.3)
    stats = gather(original, changed)
    errors = []
    for alpha in (0.0, 0.25, 1.0):
        values = run(W, stats, "w4a16g8", alpha=alpha).dequantize()
        errors.append(float((original @ W.T - changed @ values.T).square().mean()))
    assert errors[2] < errors[1] < errors[0]


def test_dead_inputs_pass_nothing_on() -> None:
    W = torch.randn(6, N_IN, generator=torch.Generator().manual_seed(1))
    original, changed = inputs(drift=0.3)
    changed[:, 5] = 0.0
    tensor = run(W, gather(original, changed), alpha=1.0)
    assert tensor.dequantize().isfinite().all()


def test_inputs_that_cannot_be_paired_are_noted() -> None:
    original, changed = inputs(drift=0.3)
    stats = LayerStats(N_IN, ("hessian", "drift"))
    stats.update(changed, original)
    stats.update(changed[:7], original[:9])  # a mixture's router sent other tokens here
    notes: list[str] = []
    options = GptqOptions.model_validate({"scheme": "w4a16g8", "alpha": 0.5})
    W = torch.randn(6, N_IN, generator=torch.Generator().manual_seed(1))
    tensor = gptq(W.clone(), stats, Scheme.model_validate("w4a16g8").weights, options, notes.append)
    assert len(notes) == 1 and "cannot be paired" in notes[0]
    plain = LayerStats(N_IN, ("hessian",))
    for x in (changed, changed[:7]):
        plain.update(x)
    assert torch.equal(tensor.codes, run(W, plain, "w4a16g8", range="mse").codes)


def test_the_drift_is_gathered_only_where_it_is_made_up_for() -> None:
    needs = {alpha: METHOD.needed(GptqOptions.model_validate({"scheme": "w4a16", "alpha": alpha})) for alpha in (0, 0.25)}
    assert needs == {0: ("hessian",), 0.25: ("hessian", "drift")}
    with pytest.raises(ValidationError, match="alpha needs true_sequential: true"):
        GptqOptions.model_validate({"scheme": "w4a16", "alpha": 0.25, "true_sequential": False})
