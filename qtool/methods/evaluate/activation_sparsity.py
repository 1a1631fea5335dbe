"""PPL-p% activation sparsity: how many neurons of the feed-forward layers can be left out before perplexity rises by p %.

    y = W a    a [ffn] neurons of a token, as the last linear W [hidden, ffn] of a block's feed-forward layer reads them
    neuron i is left out where  |a_i| · ‖W[:, i]‖ < t          t: one threshold for each block
    CETT(t) = mean over tokens of ‖sum of W[:, i] a_i that are left out‖ / ‖y‖      the same in all blocks
    sparsity: the mean share of neurons left out, zeros among them, at the largest CETT with ppl / ppl without <= 1 + p / 100
Thresholds come from the dense model's activations, by interpolation between 16 quantiles of |a_i| ‖W[:, i]‖.
Source: Luo et al. 2024, arXiv:2411.02335 (Sparsing Law), section 3.1. Differs: one threshold for a block, not for each
token: what a deployed model would use.
For: whether a runtime that skips neurons would gain, and what compression did to that.
Costs: the whole model in memory, about a dozen passes over the text, and 16 more of the last linears.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from qtool.artifact import Metric, mean_metric
from qtool.calibration.tokens import check_length
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.errors import QtoolError
from qtool.model.handle import BATCH, ModelHandle
from qtool.model.linear import weight_of
from qtool.registry import Method

LEVELS = torch.linspace(0.05, 0.99, 16)
TRIES = 10  # halvings of [0, 1], which leave a thousandth of CETT


class SparsityOptions(WindowOptions):
    """The text and its windows, and how much perplexity may rise."""

    samples: int = Field(16, ge=1, description="windows to take")
    percent: float = Field(1.0, ge=0, le=100, description="p: how much perplexity may rise, in percent; 0 counts zeros alone")


@dataclass
class Neurons:
    """One block's last feed-forward linear: what its neurons weigh, and CETT at some thresholds."""

    linear: nn.Module
    norms: Tensor  # [ffn], of W's columns
    W: Tensor  # [hidden, ffn] float32
    thresholds: Tensor | None = None  # [levels + 1], from zero
    error: Tensor = field(default_factory=lambda: torch.zeros(len(LEVELS) + 1, dtype=torch.float64))  # sums over tokens
    n_tokens: int = 0

    def tabulate(self, a: Tensor) -> None:
        """Add the tokens of a [..., ffn] to CETT at each threshold."""
        a = a.flatten(0, -2).float()  # [tokens, ffn]
        weight = a.abs() * self.norms  # [tokens, ffn]
        if self.thresholds is None:
            seen = weight.flatten()[:: max(1, weight.numel() // 1_000_000)]
            self.thresholds = F.pad(seen.quantile(LEVELS.to(seen.device)), (1, 0))
        whole = (a @ self.W.T).norm(dim=-1).clamp(min=1e-30)  # [tokens]
        for index, t in enumerate(self.thresholds):
            left_out = (a * (weight < t)) @ self.W.T  # [tokens, hidden]
            self.error[index] += float((left_out.norm(dim=-1) / whole).double().sum())
        self.n_tokens += len(a)

    def threshold(self, cett: float) -> float:
        """t at which CETT is what is asked for, the largest of the table where that is more."""
        assert self.thresholds is not None, "tabulate comes first"
        means, t = self.error / self.n_tokens, self.thresholds.double().cpu()
        above = int(torch.searchsorted(means, cett, right=True))
        if above == len(means):
            return float(t[-1])
        low, high = float(means[above - 1]), float(means[above])
        return float(t[above - 1] + (t[above] - t[above - 1]) * (cett - low) / (high - low))


@torch.no_grad()
def activation_sparsity(model: ModelHandle, reference: ModelHandle, options: SparsityOptions, seed: int) -> list[Metric]:
    """The sparsity, of all blocks and of each, and the CETT at which it is reached."""
    tokens = read_windows(options, model.tokenizer, seed).tokens  # [samples, length]
    with model.materialized() as module:
        neurons = find_neurons(model)
        with hooked(neurons, lambda one, a: one.tabulate(a)):
            dense = mean_loss(module, tokens, model.device)
        low, high = 0.0, 1.0
        for _ in range(TRIES if options.percent > 0 else 0):
            middle = (low + high) / 2
            loss, _ = sparse_pass(module, tokens, neurons, middle, model.device)
            low, high = (middle, high) if loss - dense <= math.log1p(options.percent / 100) else (low, middle)
        _, shares = sparse_pass(module, tokens, neurons, low, model.device)  # [blocks, samples]
    found = [mean_metric("activation_sparsity", options.source, "fraction", shares.mean(0).tolist(), higher_is_better=True)]
    for index, row in enumerate(shares):
        part = f"block: {index}"
        found.append(
            mean_metric("activation_sparsity", options.source, "fraction", row.tolist(), part=part, higher_is_better=True)
        )
    return [*found, Metric("cett", options.source, low, "fraction", higher_is_better=None)]


def find_neurons(model: ModelHandle) -> list[Neurons]:
    """The last feed-forward linear of each block; raises QtoolError where a block has none, or several, as mixtures do."""
    hidden = int(model.config.get_text_config().hidden_size)
    found = []
    for index in range(model.n_blocks):
        names = [name for name in model.linear_names() if name.startswith(f"{model.blocks_name}.{index}.")]
        last = [n for n in names if model.linear_shape(n)[0] == hidden and "attn" not in n and "attention" not in n]
        last = [name for name in last if model.linear_shape(name)[1] != hidden]
        if len(last) != 1:
            raise QtoolError(
                f"evaluate/activation_sparsity: block {index} has {len(last)} linears from a feed-forward layer's neurons to "
                "the residual stream, must have one; mixtures of experts are not measured"
            )
        linear = model.model.get_submodule(last[0])
        W = weight_of(linear)  # [hidden, ffn]
        found.append(Neurons(linear, W.norm(dim=0), W))
    return found


@contextmanager
def hooked(neurons: list[Neurons], act) -> Iterator[None]:  # type: ignore[no-untyped-def]
    """Inside, act(neurons, a) sees what each linear reads, and what it returns, if anything, is read instead."""
    with ExitStack() as stack:
        for one in neurons:
            handle = one.linear.register_forward_pre_hook(lambda _, args, one=one: act(one, args[0]))
            stack.callback(handle.remove)
        yield


def sparse_pass(
    module: nn.Module, tokens: Tensor, neurons: list[Neurons], cett: float, device: torch.device
) -> tuple[float, Tensor]:
    """Loss with neurons left out, and the share left out [blocks, samples] float64."""
    limits = [one.threshold(cett) for one in neurons]
    shares: list[list[Tensor]] = [[] for _ in neurons]

    def leave_out(one: Neurons, a: Tensor) -> Tensor:
        index = next(i for i, other in enumerate(neurons) if other is one)
        out = (a.float().abs() * one.norms < limits[index]) | (a == 0)
        shares[index].append(out.view(-1, tokens.shape[1], out.shape[-1]).double().mean((1, 2)).cpu())
        return a.masked_fill(out, 0)

    with hooked(neurons, leave_out):
        loss = mean_loss(module, tokens, device)
    return loss, torch.stack([torch.cat(row) for row in shares])


def mean_loss(module: nn.Module, tokens: Tensor, device: torch.device) -> float:
    """Nats a token over windows [samples, length]."""
    losses = []
    for batch in tokens.split(BATCH):
        logits = module(batch.to(device), use_cache=False).logits[:, :-1].float()  # [batch, length - 1, vocab]
        losses.append(F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten().to(device), reduction="none").double())
    return float(torch.cat(losses).mean())


def check_text(model: ModelHandle, options: SparsityOptions) -> None:
    """Raise QtoolError for windows too long, a text that is missing or too short, or blocks without such a layer."""
    check_length("evaluate/activation_sparsity", options, model.config.get_text_config())
    read_windows(options, model.tokenizer, 0)


METHOD = Method(
    run=activation_sparsity,
    options=SparsityOptions,
    scope="model",
    check=check_text,
    measures=("activation_sparsity", "cett"),
)
