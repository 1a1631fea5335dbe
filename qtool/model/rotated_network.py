"""The whole model in memory, rotated by matrices that gradients reach and rounded as it will be: what rotations learn by.

    logits = f(tokens; W^ of the rotated W, rounded inputs, rounded keys and values)      straight through every rounding
Weights are folded and rotated anew for every forward, in float32; `learn` keeps the best rotations that it saw.
Why the whole model: one Q serves all blocks, and what it costs shows at the end alone.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.errors import QtoolError
from qtool.formats.rotations import LearnedRotations
from qtool.formats.scheme import ActivationScheme
from qtool.layers.rotated_input import rotate_input
from qtool.layers.rounded_linear import RoundedLinear, soft_snap_inputs
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import is_linear, weight_of
from qtool.model.rotation import Places, Rotations, block_edits
from qtool.model.rounded_attention import rounded_by_kivi
from qtool.model.wiring import Edits, oriented

See = Callable[..., None]  # (module, arguments, name=...): a pre-hook that knows the linear's name
JUDGED = 32  # windows that tell which rotations are the best
CHECKS = 4  # times that they are asked, besides the start


class SnappedLinear(nn.Module):
    """A linear whose input alone is rounded; gradients reach W [out, in] and the input."""

    def __init__(self, W: Tensor, bias: Tensor | None, scheme: ActivationScheme | None) -> None:
        super().__init__()
        self._W, self.bias, self._scheme = W, bias, scheme

    def forward(self, x: Tensor) -> Tensor:
        if self._scheme is not None:
            x = soft_snap_inputs(x, self._scheme)
        return F.linear(x, self._W, self.bias)


class RotatedNetwork:
    """A model in memory, float32, with its calibration tokens [samples, length] and all places for rotations."""

    def __init__(
        self,
        model: ModelHandle,
        module: PreTrainedModel,
        places: Places,
        tokens: Tensor,
        advance: Callable[[str], None] = lambda text: None,
    ) -> None:
        """advance: told of every update."""
        self.tokens = tokens
        self.advance = advance
        self._module = module
        self._places = places
        self._whole = Block(model, -1, module, "")
        self._attentions = [module.get_submodule(name) for name in model.attention_names()]
        self._linears = [name for name in model.linear_names() if is_linear(module.get_submodule(name))]

    @property
    def n_windows(self) -> int:
        return len(self.tokens)

    @property
    def device(self) -> torch.device:
        return self._whole.device

    def original_logits(self, rows: Tensor) -> Tensor:
        """Those of the model as it was [batch, length, vocab], for rows [batch] of the tokens; no gradients."""
        with torch.no_grad():
            logits: Tensor = self._module(self.windows(rows), use_cache=False).logits
            return logits

    def logits(self, rotations: Rotations, options: LearnedRotations, rows: Tensor, see: See | None = None) -> Tensor:
        """Those of the rotated and rounded model [batch, length, vocab]; gradients reach the rotations.

        With `see`, nothing is rounded, and it is told of every linear that would be, its input and its name.
        """
        edits: Edits = {}
        for unit in (*self._places.blocks, self._places.outer):
            edits |= block_edits(self._whole, unit, rotations)
        layers = self._rounded_layers({name: value.float() for name, value in edits.items()}, rotations, options, see)
        rest = {name: value.float() for name, value in edits.items() if name.rpartition(".")[0] not in layers}
        placed = {name: oriented(self._whole.get(name.rpartition(".")[0]), value) for name, value in rest.items()}
        with self._whole.replaced(layers), ExitStack() as stack:
            if options.cache is not None and see is None:
                stack.enter_context(rounded_by_kivi(self._attentions, options.cache))
            arguments = (self.windows(rows),), {"use_cache": False}
            logits: Tensor = torch.func.functional_call(self._module, placed, *arguments, tie_weights=False).logits
        return logits

    def reading_covariance(self) -> Tensor:
        """Covariance [hidden, hidden], float64, of the rows of all weights, gains folded, that read the residual stream."""
        I = torch.eye(self._places.hidden, dtype=torch.float64, device=self.device)  # noqa: E741
        total, mean, count = torch.zeros_like(I), torch.zeros_like(I[0]), 0
        for unit in self._places.blocks:
            edits = block_edits(self._whole, unit, Rotations(I))  # folds gains, turns nothing
            for name in (name for reading in unit.readings for name in reading.linears):
                W = edits[f"{name}.weight"]  # [out, hidden]
                total, mean, count = total + W.T @ W, mean + W.sum(0), count + len(W)
        return total / count - torch.outer(mean / count, mean / count)

    def reading_of_heads(self) -> dict[str, Tensor]:
        """By the linear that makes values: covariance [kv heads, head_dim, head_dim] of what reads each head's, float64."""
        found = {}
        for values in (unit.values for unit in self._places.blocks if unit.values is not None):
            O = weight_of(self._whole.get(values.output)).double()  # [out, in]  # noqa: E741
            rows = O[:, values.columns.to(O.device)].permute(1, 0, 2, 3).flatten(1, 2)  # [kv heads, out · group, head_dim]
            rows = rows - rows.mean(1, keepdim=True)
            found[values.value] = rows.transpose(1, 2) @ rows / rows.shape[1]
        return found

    def input_moments(self, rotations: Rotations, options: LearnedRotations, rows: Tensor) -> dict[str, Tensor]:
        """Mean of x xᵀ [in, in] over inputs x of every linear that will be rounded, float64, before any rounding."""
        found: dict[str, Tensor] = {}

        def see(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
            x = args[0].reshape(-1, args[0].shape[-1])  # [tokens, in]
            if len(x):
                found[name] = (x.T @ x / len(x)).double()

        with torch.no_grad():
            self.logits(rotations, options, rows, see)
        return found

    def windows(self, rows: Tensor) -> Tensor:
        """Tokens [batch, length] of rows [batch], on the model's device."""
        return self.tokens[rows].to(self._whole.device)

    def _rounded_layers(
        self, edits: Edits, rotations: Rotations, options: LearnedRotations, see: See | None
    ) -> dict[str, nn.Module]:
        """What stands for the linears that are rounded, or whose inputs rotate, for one forward."""
        layers: dict[str, nn.Module] = {}
        for name in self._linears:
            scheme, signs = options.scheme_of(name), rotations.inputs.get(name)
            if scheme is None and signs is None:
                continue
            linear = self._whole.get(name)
            W, bias = edits.get(f"{name}.weight"), edits.get(f"{name}.bias", getattr(linear, "bias", None))
            W = weight_of(linear) if W is None else W
            if scheme is None or options.rounds == "inputs" or see is not None:
                layers[name] = SnappedLinear(W, bias, None if scheme is None or see is not None else scheme.activations)
            else:
                rounded = scheme if options.rounds == "both" else scheme.model_copy(update={"activations": None})
                layers[name] = RoundedLinear(W, bias, rounded)
            if signs is not None:
                rotate_input(layers[name], signs)
            if see is not None and scheme is not None:
                layers[name].register_forward_pre_hook(partial(see, name=name))
        return layers


def learn(
    learned: Sequence[Tensor],
    loss: Callable[[Tensor], Tensor],
    update: Callable[[Sequence[Tensor], int], None],
    network: RotatedNetwork,
    options: LearnedRotations,
    seed: int,
) -> list[float]:
    """Carry out updates and leave `learned` at the best values seen; returns the losses at the start and at each check.

    loss: of rows [batch] among the windows, a mean; update: gradients of what learns, and the step: changes it in place.
    """
    random = torch.Generator().manual_seed(seed)
    judged = torch.randperm(network.n_windows, generator=random)[:JUDGED]

    def judge() -> float:
        with torch.no_grad():
            total = sum(float(loss(rows)) * len(rows) for rows in judged.split(options.batch))
        if not math.isfinite(total):
            raise QtoolError(f"the loss of the rounded model is {total / len(judged)}; lower the learning rate")
        return total / len(judged)

    losses, best = [judge()], [p.detach().clone() for p in learned]
    checks = {round(options.steps * check / CHECKS) for check in range(1, CHECKS + 1)}
    for step in range(options.steps):
        now = loss(torch.randperm(network.n_windows, generator=random)[: options.batch])
        update(torch.autograd.grad(now, learned, materialize_grads=True), step)
        network.advance(f"loss {float(now.detach()):.4f}")
        if step + 1 in checks:
            losses.append(judge())
            if losses[-1] == min(losses):
                best = [p.detach().clone() for p in learned]
    with torch.no_grad():
        for p, value in zip(learned, best, strict=True):
            p.copy_(value)
    return losses
