"""Sensitivity: what rounding one unit of linears to one scheme costs the model's predictions, in nats a token.

Measured: the unit alone is rounded, and its block's changed output goes through all later blocks beside what the other
candidates give there; then KL of the logits from the model's own. What the block is fed is always the original's.
Predicted: the second-order form of the same KL (see linalg/divergence.py). One pass forward rounds every linear to every
candidate and keeps the codes on disk; one pass back, block by block and each run once more from its kept input, holds the
gradients of a window against the changes that rounding makes.
Memory: one block, its candidates' codes and its statistics; and the activations of one block's candidates on their way, or
those before every block. Never the model.
Rounding sees statistics of all windows, losses are taken over the first few: from few tokens alone, errors of wide linears
would vanish on just those tokens.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qtool import registry
from qtool.calibration.statistics import LayerStats
from qtool.errors import QtoolError
from qtool.formats.allocation import SearchOptions
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor
from qtool.layers.quant_linear import QuantLinear
from qtool.linalg.divergence import kl, squared_product
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.store import load_changes, save_changes
from qtool.model.wiring import oriented
from qtool.options import Needs
from qtool.pipeline.backward import Take, go_back
from qtool.pipeline.blockwise import inputs_of_head
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.linear_scope import chosen_groups
from qtool.progress import Progress

Unit = tuple[str, ...]  # full names of linears that share a scheme
Losses = dict[Unit, list[float]]  # of every candidate
Rounded = dict[str, list[QuantizedTensor]]  # full name of a linear: itself in every candidate


def join_experts(groups: Sequence[Unit], block: Block) -> list[Unit]:
    """Units of linears that share an input; of a mixture, the same linear of all experts belongs to one.

    Why: runtimes keep a mixture's gate and up, and its down, as one stacked matrix each.
    """
    units: list[list[str]] = []
    for group in groups:
        kinds = {kind_of(name, block) for name in group}
        same = next((unit for unit in units if kinds & {kind_of(name, block) for name in unit}), None)
        if same is None:
            units.append(list(group))
        else:
            same += group
    return [tuple(unit) for unit in units]


def kind_of(name: str, block: Block) -> str:
    """A linear's name inside its block without the numbers of experts: mlp.experts.down.#."""
    return re.sub(r"\.\d+(?=\.|$)", ".#", name.removeprefix(f"{block.name}."))


class Rounding:
    """Rounds linears to every candidate, as a quantize method of scope linear does with its default options."""

    def __init__(self, options: SearchOptions) -> None:
        self._method = registry.load(options.quantizer)
        self._choices = [(scheme, self._method.options.model_validate({"scheme": scheme})) for scheme in options.candidates]
        self.needs: Needs = self._method.needed(self._choices[0][1])

    def round_block(self, block: Block, groups: Sequence[Unit], hidden: Tensor) -> Rounded:
        """Every linear of the groups, which share an input each; hidden [samples, length, hidden] enters the block."""
        stats = {names[0]: LayerStats(shape_of(block.get(names[0]))[1], self.needs, block.device) for names in groups}
        if self.needs:
            block.observe(hidden, stats)
        return {name: self.round(name, block.get(name), stats[names[0]]) for names in groups for name in names}

    def round_head(self, model: ModelHandle, head: str, hidden: Tensor) -> Rounded:
        """The output head, which the last block's output hidden [samples, length, hidden] goes to; inside `outer()`."""
        stats = LayerStats(model.linear_shape(head)[1], self.needs, model.device)
        for x in inputs_of_head(model, head, hidden) if self.needs else []:
            stats.update(x)
        with model.outer():
            return {head: self.round(head, model.model.get_submodule(head), stats)}

    def round(self, name: str, linear: nn.Module, stats: LayerStats) -> list[QuantizedTensor]:
        """One linear in every candidate; what the method notes, the quantize step will say again."""
        try:
            return [
                self._method.run(weight_of(linear), stats, scheme.weights, options, lambda text: None)
                for scheme, options in self._choices
            ]
        except QtoolError as error:
            raise QtoolError(f"{self._method.key}: {name}: {error}") from error


# ---- measured ----


@torch.no_grad()
def measure(
    model: ModelHandle, options: SearchOptions, tokens: Tensor, head: str | None, folder: StepFolder, progress: Progress
) -> Losses:
    """Mean KL in nats a token of every unit and candidate; goes on after the blocks that `folder` has records of."""
    rounding, candidates, n = Rounding(options), options.candidates, options.samples
    final, hidden = model.final_hidden(tokens[:n]), model.embed(tokens)  # [samples, length, hidden]
    losses: Losses = {}
    for index in range(model.n_blocks):
        record = f"block_{index:03d}"
        block = model.block(index)
        groups = chosen_groups(block, options, hidden, only_quantized=False)
        units, changed = join_experts(groups, block), []
        if not folder.has_records(record):
            rounded = rounding.round_block(block, groups, hidden)
            for unit in units:
                for c, scheme in enumerate(candidates):
                    with block.replaced({name: layer(block.get(name), rounded[name][c], scheme) for name in unit}):
                        changed.append(block.forward(hidden[:n]))
            del rounded
        hidden = block.forward(hidden)
        model.release(index)
        if not folder.has_records(record):
            for later in range(index + 1, model.n_blocks):
                block = model.block(later)
                changed = [block.forward(x) for x in changed]
                model.release(later)
            found = divergences(model, final, [(x, {}) for x in changed])
            folder.write_records(record, {"losses": split(found, len(candidates))})
        losses |= zip(units, folder.records(record)["losses"], strict=True)
        progress.advance(f"{model.blocks_name}.{index}")
    if head is not None:
        (tensors,) = rounding.round_head(model, head, hidden).values()
        pairs = zip(tensors, candidates, strict=True)
        losses[(head,)] = divergences(model, final, [(final, {head: pair}) for pair in pairs])
        progress.advance(head)
    return losses


def layer(linear: nn.Module, tensor: QuantizedTensor, scheme: Scheme) -> QuantLinear:
    """What stands where the linear stood."""
    return QuantLinear(tensor, getattr(linear, "bias", None), scheme.activations)


def divergences(
    model: ModelHandle,
    final: Tensor,
    changed: Sequence[tuple[Tensor, dict[str, tuple[QuantizedTensor, Scheme]]]],
) -> list[float]:
    """Mean KL, from the logits of final [samples, length, hidden], of those of each other one, its head replaced."""
    totals = torch.zeros(len(changed), dtype=torch.float64)  # [changed]
    with model.outer():
        outside = Block(model, -1, model.model, "")
        for place, original in enumerate(final.split(1)):  # one window's logits at a time
            p = model.logits(original)  # [1, length, vocab]
            for which, (hidden, heads) in enumerate(changed):
                with outside.replaced({name: layer(outside.get(name), *pair) for name, pair in heads.items()}):
                    totals[which] += float(kl(p, model.logits(hidden[place : place + 1])).double().mean())
    return [float(total) / len(final) for total in totals]


def split(values: list[float], size: int) -> list[list[float]]:
    """Pieces of a list, `size` values each."""
    return [values[start : start + size] for start in range(0, len(values), size)]


# ---- predicted ----


def predict(
    model: ModelHandle,
    options: SearchOptions,
    tokens: Tensor,
    head: str | None,
    seed: int,
    folder: StepFolder,
    progress: Progress,
) -> Losses:
    """The same from gradients of the log-likelihood of the model's own draws; goes on after the blocks that are rounded."""
    rounding, n = Rounding(options), options.samples
    hidden = model.embed(tokens if rounding.needs else tokens[:n])  # [samples, length, hidden]
    inputs: list[Tensor] = []  # before each block, of the first n windows
    units: list[list[Unit]] = []
    for block in model.blocks():
        groups = chosen_groups(block, options, hidden, only_quantized=False)
        units.append(join_experts(groups, block))
        inputs.append(hidden[:n])
        if not is_kept(folder, f"block_{block.index:03d}", options):
            keep(folder, f"block_{block.index:03d}", rounding.round_block(block, groups, hidden), options)
        hidden = block.forward(hidden)
        progress.advance(block.name)
    units.append([] if head is None else [(head,)])
    if head is not None and not is_kept(folder, "outer", options):
        keep(folder, "outer", rounding.round_head(model, head, hidden), options)

    losses: Losses = {}
    n_tokens = tokens[:n].numel()

    @contextlib.contextmanager
    def watch(block: Block) -> Iterator[Take]:
        record = "outer" if block.index < 0 else f"block_{block.index:03d}"
        gradients = Gradients(block, units.pop(), kept(folder, record, options))
        yield gradients.take
        losses.update(gradients.losses(n_tokens))

    go_back(model, [*inputs, hidden[:n]], seed, watch, progress)
    return losses


class Gradients:
    """What the gradients of one block's linears say of every unit and candidate, summed over windows."""

    def __init__(self, block: Block, units: Sequence[Unit], rounded: Rounded) -> None:
        self._units = units
        self._linears = {name: block.get(name) for unit in units for name in unit}
        self._changes: dict[str, list[Tensor]] = {}  # [out, in] of every candidate
        for name, linear in self._linears.items():
            W = weight_of(linear)  # [out, in]
            self._changes[name] = [tensor.dequantize().to(W.device) - W for tensor in rounded[name]]
            linear.get_parameter("weight").requires_grad_()
        self._sums = torch.zeros(len(units), max((len(x) for x in rounded.values()), default=0), dtype=torch.float64)

    def take(self, output: Tensor, x: Tensor, upstream: Tensor | None) -> Tensor:
        """Take in one window, whose gradient after the block is `upstream`; returns the gradient before it, that of x."""
        weights = [linear.get_parameter("weight") for linear in self._linears.values()]
        found = torch.autograd.grad(output, [x, *weights], upstream, allow_unused=True, materialize_grads=True)
        G = {name: oriented(linear, g.float()) for (name, linear), g in zip(self._linears.items(), found[1:], strict=True)}
        for u, unit in enumerate(self._units):
            for c in range(self._sums.shape[1]):
                self._sums[u, c] += sum(squared_product(G[name], self._changes[name][c]) for name in unit)
        return found[0]

    def losses(self, n_tokens: int) -> Losses:
        """KL in nats a token of every unit and candidate, from windows of n_tokens in all."""
        return dict(zip(self._units, (self._sums / (2 * n_tokens)).tolist(), strict=True))


# ---- rounded linears on disk ----


def is_kept(folder: StepFolder, name: str, options: SearchOptions) -> bool:
    return all(folder.unit(f"{name}-{c}").is_file() for c in range(len(options.candidates)))


def keep(folder: StepFolder, name: str, rounded: Rounded, options: SearchOptions) -> None:
    """Write a file for each candidate."""
    for c, scheme in enumerate(options.candidates):
        save_changes(folder.unit(f"{name}-{c}"), {linear: (tensors[c], scheme) for linear, tensors in rounded.items()})


def kept(folder: StepFolder, name: str, options: SearchOptions) -> Rounded:
    """What `keep` wrote; nothing where it wrote nothing."""
    rounded: Rounded = {}
    for c in range(len(options.candidates)):
        path = folder.unit(f"{name}-{c}")
        for linear, stored in (load_changes(path) if path.is_file() else {}).items():
            assert isinstance(stored, tuple), f"{path} holds more than rounded linears"
            rounded.setdefault(linear, []).append(stored[0])
    return rounded


def discard(folder: StepFolder) -> None:
    """Delete what `keep` wrote."""
    for path in folder.path.glob("*.safetensors"):
        path.unlink()
