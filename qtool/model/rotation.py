"""Rotations that leave what a model computes alone: where they fit, what they make of the weights, and the trial of each block.

    x <- x Q                   the residual stream    x [tokens, hidden]    Q [hidden, hidden] orthogonal
        embedding              E <- E Q
        norm -> linears        W <- W diag(g) Q,  bias <- bias + W b;  gain g becomes 1, bias b of the norm 0
                               where a linear has no bias to take W b, the norm keeps (b / g) Q
        linears that write x   W <- Qᵀ W,  bias <- bias Q
    v <- v R                   values of one head     R [head_dim, head_dim] orthogonal
        value rows             W <- Rᵀ W,  bias <- bias R       output columns of the heads that read them   W <- W R
    v <- v / s                 outputs of a linear that another one reads, channel by channel, before v <- v R: W_1 <- W_1 / s,
                               W_2 <- W_2 s; where a trial says that it passes
    k <- k s,  q <- q / s      keys and queries of one head, s the same for both channels that a rotary position turns together:
                               rows of their linears, or gains of the norms they pass; where a trial says that it passes
    x <- (x D) H / √in         the input of one linear, while it runs; W <- W D H / √in (see layers/rotated_input.py)
RMSNorm without gain commutes with every Q, LayerNorm with those that keep the mean, Q 1 = 1: for both the module stays what it
was. What reads and writes x is found by tensor identity and shapes, where values lie in a fused linear by trial; the rotated
block, on rotated input, must then give the rotated output in float64 before anything is believed.
Source: Ashkboos et al. 2024, arXiv:2404.00456, section 4; arXiv:2401.15024, section 3. Differs: LayerNorm's mean is kept by Q
instead of being subtracted by the layer before.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from qtool.errors import QtoolError
from qtool.layers.experts import Experts
from qtool.layers.rotated_input import rotate_input, rotate_rows, signs_of
from qtool.linalg.hadamard import random_orthogonal
from qtool.model.architectures import gain_offset
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import is_linear, shape_of, weight_of
from qtool.model.wiring import Edits, Group, Scaling, linear_sources, oriented, scale_edits, trace

TOLERANCE = 1e-5  # relative change of what a block adds; norms that compute in float32 leave about 1e-7


@dataclass(frozen=True)
class Reading:
    """Linears, routers among them, that read the residual stream through one norm, or as it is."""

    norm: str | None
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ValueHeads:
    """Where the values of each head are made and read: rows [kv heads, head_dim], columns [kv heads, group, head_dim]."""

    value: str
    output: str
    rows: Tensor
    columns: Tensor


@dataclass(frozen=True)
class KeyScaling:
    """A verified place for a scale s [n] of keys: k <- k s, q <- q / s; which one each channel has, n where none."""

    query: str  # a linear or a norm; a fused linear makes both
    key: str
    of_query: Tensor  # [channels of query's source]
    of_key: Tensor  # [channels of key's source]
    n: int


@dataclass(frozen=True)
class UnitPlaces:
    """What can be rotated in a block, or outside the blocks; `refusal` says why the residual stream there cannot."""

    readings: tuple[Reading, ...]
    writers: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    values: ValueHeads | None = None
    inputs: dict[str, int] = field(default_factory=dict)  # linear that no norm feeds: its inputs
    refusal: str | None = None
    keeps_mean: bool = False  # a norm subtracts the mean
    scalings: tuple[Scaling, ...] = ()  # from one linear to another, where they were asked for
    keys: KeyScaling | None = None  # where they were asked for


@dataclass(frozen=True)
class Places:
    """What can be rotated in a whole model."""

    hidden: int
    blocks: tuple[UnitPlaces, ...]
    outer: UnitPlaces

    @property
    def keeps_mean(self) -> bool:
        """Whether Q must keep the mean, for LayerNorm."""
        return any(unit.keeps_mean for unit in (*self.blocks, self.outer))

    @property
    def heads(self) -> dict[str, tuple[int, int]]:
        """The linear that makes values, by its full name: (kv heads, head_dim)."""
        found = [unit.values for unit in self.blocks if unit.values is not None]
        return {values.value: (values.rows.shape[0], values.rows.shape[1]) for values in found}

    @property
    def scales(self) -> dict[str, int]:
        """Linears whose outputs can be scaled, where another linear reads them: their number of channels."""
        return {one.source: int(one.spread.max()) + 1 for unit in self.blocks for one in unit.scalings}

    @property
    def keys(self) -> dict[str, int]:
        """What makes keys, or norms them, where these can be scaled: their number of scales."""
        return {unit.keys.key: unit.keys.n for unit in self.blocks if unit.keys is not None}

    @property
    def inputs(self) -> dict[str, int]:
        """Linears whose input can be rotated while they run: their number of inputs."""
        return {name: width for unit in self.blocks for name, width in unit.inputs.items()}

    def note_heads(self, note: Callable[[str], None]) -> None:
        """Tell how many blocks have no values that could be rotated."""
        n = sum(unit.values is None for unit in self.blocks)
        if n:
            note(f"in {n} of {len(self.blocks)} blocks values do not pass from one linear to another; theirs are not rotated")

    def note_keys(self, note: Callable[[str], None]) -> None:
        """Tell how many blocks have no keys that could be scaled."""
        n = sum(unit.keys is None for unit in self.blocks)
        if n:
            note(f"in {n} of {len(self.blocks)} blocks no scale passes from keys to queries; theirs are not scaled")

    def check_residual(self) -> None:
        """Raise QtoolError, naming the layer, where the residual stream cannot be rotated."""
        refusal = next((unit.refusal for unit in (*self.blocks, self.outer) if unit.refusal is not None), None)
        if refusal is not None:
            raise QtoolError(f"the residual stream cannot be rotated: {refusal}; set residual: false")

    def check_heads(self) -> None:
        """Raise QtoolError where no block has values that could be rotated."""
        if not self.heads:
            raise QtoolError("values cannot be rotated: in no block do they pass from one linear to another; set heads: false")


@dataclass(frozen=True)
class Rotations:
    """What a transform of scope model answers: orthogonal matrices, in one floating dtype, and signs."""

    residual: Tensor | None = None  # Q [hidden, hidden]
    heads: dict[str, Tensor] = field(default_factory=dict)  # linear that makes values: R [kv heads, head_dim, head_dim]
    inputs: dict[str, Tensor] = field(default_factory=dict)  # linear: signs [in]
    scales: dict[str, Tensor] = field(default_factory=dict)  # linear that another one reads: s [channels]
    keys: dict[str, Tensor] = field(default_factory=dict)  # what makes keys, or norms them: s [n]
    losses: tuple[float, ...] = ()  # of the rounded model, where they were learned: at the start, then at each check
    qsur: tuple[float, float] | None = None  # of the linears' inputs, before and after, where it was looked at

    def detached(self, losses: Sequence[float]) -> "Rotations":
        """A copy that gradients do not reach, with the losses that led there."""
        residual = None if self.residual is None else self.residual.detach().clone()
        parts = (self.heads, self.scales, self.keys)
        heads, scales, keys = ({name: tensor.detach().clone() for name, tensor in part.items()} for part in parts)
        return Rotations(residual, heads, self.inputs, scales, keys, tuple(losses))

    def judged(self, before: float, after: float) -> "Rotations":
        """The same with the QSUR of the linears' inputs before and after it."""
        return replace(self, qsur=(before, after))


# ---- where ----


def find_places(model: ModelHandle, tokens: Tensor, with_scalings: bool = False, with_keys: bool = False) -> Places:
    """Everything that can be rotated; tokens [1, length] are what the trials look at. Loads one block at a time."""
    hidden = model.embed(tokens)
    units = []
    for block in model.blocks():
        units.append(find_block_places(block, hidden, with_scalings, with_keys))
        hidden = block.forward(hidden)
    return Places(hidden.shape[-1], tuple(units), find_outer_places(model, hidden))


def find_block_places(block: Block, sample: Tensor, with_scalings: bool = False, with_keys: bool = False) -> UnitPlaces:
    """The places of one block; sample [1, length, hidden] is what it is fed."""
    width = sample.shape[-1]
    groups, order = trace(block, sample)
    norms = _norms_of(block.module, f"{block.name}.", width)
    readings = {group.norm: list(group.linears) for group in groups if group.norm in norms}
    linears = block.linears()
    experts = [f"{block.name}.{name}" for name, module in block.module.named_modules() if isinstance(module, Experts)]
    for name in experts:  # they read copies of what their norm gives, for the tokens that are theirs
        before = [norm for norm, names in readings.items() if order.index(names[0]) < order.index(f"{name}.gate_up.0")]
        if before:
            readings[before[-1]] += [linear for linear in linears if linear.startswith(f"{name}.gate_up.")]
    readers = {name for names in readings.values() for name in names}
    writers = tuple(name for name, linear in linears.items() if name not in readers and shape_of(linear)[0] == width)
    inputs = {name: shape_of(linears[name])[1] for name in writers if signs_of(linears[name]) is None}
    trial = Trial(block, sample)
    alone = [name for name in writers if not name.startswith(tuple(experts))]
    values = _find_values(trial, alone, order)
    found = UnitPlaces(
        tuple(Reading(norm, tuple(names)) for norm, names in readings.items()),
        writers,
        values=values,
        inputs=inputs,
        keeps_mean=any(_subtracts_mean(norm) for norm in norms.values()),
        scalings=_find_scalings(trial, alone, order) if with_scalings else (),
        keys=None if values is None or not with_keys else _find_keys(trial, values, order),
    )
    return replace(found, refusal=_refusal(trial, found, norms))


def find_outer_places(model: ModelHandle, hidden: Tensor) -> UnitPlaces:
    """Embeddings, last norm and head; hidden [1, length, hidden] is the last block's output."""
    width = hidden.shape[-1]
    kept: list[Tensor] = []  # keeps what was seen alive, so that no address is used twice
    made: dict[tuple[int, int], str] = {}
    read: dict[str, tuple[int, int]] = {}
    hooks = []
    with model.outer():
        outside = [(name, module) for name, module in model.model.named_modules() if not _is_inside(model, name)]
        norms = {name: module for name, module in outside if _is_norm(module)}
        linears = [name for name, module in outside if is_linear(module)]

        def leave(module: nn.Module, args: Any, out: Tensor, name: str) -> None:
            kept.append(out)
            made[out.data_ptr(), out.numel()] = name

        def enter(module: nn.Module, args: tuple[Tensor, ...], name: str) -> None:
            kept.append(args[0])
            read[name] = (args[0].data_ptr(), args[0].numel())

        for name, module in norms.items():
            hooks.append(module.register_forward_hook(lambda m, args, out, name=name: leave(m, args, out, name)))
        for name in linears:
            module = model.model.get_submodule(name)
            hooks.append(module.register_forward_pre_hook(lambda m, args, name=name: enter(m, args, name)))
        with torch.no_grad():
            model.logits(hidden)
        for hook in hooks:
            hook.remove()
        keeps_mean = any(_subtracts_mean(module) for module in norms.values())
        last = [Reading(made.get(key), (name,)) for name, key in read.items()]
        all_of_it = Block(model, -1, model.model, "")
        stuck = [(r.norm, channel) for r in last if (channel := _stuck_channel(all_of_it, r)) is not None]
    tables = {name: module.embedding_dim for name, module in outside if isinstance(module, nn.Embedding)}
    refusal = next((f"{name} stands on it outside the blocks" for name in norms if name not in {r.norm for r in last}), None)
    if len(last) != 1 or len(linears) != 1:
        refusal = f"{(linears or ['nothing'])[0]} stands between the embedding, the blocks and the head"
    if stuck:
        refusal = _words_of_stuck(*stuck[0])
    narrow = [name for name, columns in tables.items() if columns != width]
    if narrow:
        refusal = f"{narrow[0]} gives {tables[narrow[0]]} channels, the blocks have {width}"
    return UnitPlaces(tuple(last), embeddings=tuple(tables), refusal=refusal, keeps_mean=keeps_mean)


def _refusal(trial: "Trial", places: UnitPlaces, norms: dict[str, nn.Module]) -> str | None:
    """Why the residual stream of a block cannot be rotated; None where a random rotation passes through it."""
    block = trial.block
    silent = next((name for name in norms if name not in {reading.norm for reading in places.readings}), None)
    if silent is not None:
        return f"the output of {silent} is not read by linears alone, so that its gain cannot move into weights"
    for reading in places.readings:
        stuck = _stuck_channel(block, reading)
        if stuck is not None:
            return _words_of_stuck(reading.norm, stuck)
    if not places.readings or not places.writers:
        return f"{block.name} has no norm that linears read, or no linear that writes to it"
    n = trial.width
    Q = trial_rotation(n, places.keeps_mean)
    rotations = Rotations(residual=Q.to(trial.reference.device))
    change = trial.change(block_edits(block, places, rotations), rotations)
    if not change <= TOLERANCE:
        return f"the output of {block.name}, rotated back, would change by {change:.1e}, more than {TOLERANCE:.0e}"
    return None


def trial_rotation(n: int, keeps_mean: bool) -> Tensor:
    """An orthogonal [n, n] that has no structure, float64; with Q 1 = 1 where the mean must stay."""
    random = torch.Generator().manual_seed(0)
    if not keeps_mean:
        return random_orthogonal(n, random)
    v = torch.randn(n, 2, generator=random, dtype=torch.float64)
    v = v - v.mean(0)
    Q = torch.eye(n, dtype=torch.float64)
    for column in v.T:  # two reflections across planes that hold the vector of ones
        Q = Q - 2 * torch.outer(Q @ column, column) / column.square().sum()
    return Q


def _find_values(trial: "Trial", outputs: list[str], order: list[str]) -> ValueHeads | None:
    """The first place where each head's values can be rotated, tried with random rotations."""
    random = torch.Generator().manual_seed(0)
    for output in outputs:
        for values in _value_candidates(trial.block, output, order):
            n, size = values.rows.shape
            R = torch.stack([random_orthogonal(size, random) for _ in range(n)]).to(trial.reference.device)
            rotations, places = Rotations(heads={values.value: R}), UnitPlaces((), values=values)
            if trial.change(block_edits(trial.block, places, rotations), rotations) <= TOLERANCE:
                return values
    return None


def _find_scalings(trial: "Trial", outputs: list[str], order: list[str]) -> tuple[Scaling, ...]:
    """For each linear that writes, the latest linear whose channels it reads one by one, tried with random scales."""
    found = []
    for output in (name for name in outputs if name in order):
        for scaling in linear_sources(trial.block, Group((output,), None), order):
            s = torch.rand(int(scaling.spread.max()) + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
            edits = scale_edits(trial.block, scaling, s.to(trial.reference.device))
            if trial.change(edits, Rotations()) <= TOLERANCE:
                found.append(scaling)
                break
    return tuple(found)


def _value_candidates(block: Block, output: str, order: list[str]) -> Iterator[ValueHeads]:
    """Where the heads that `output` reads might be made: a linear of values, or the values' part of a fused one."""
    width, size = shape_of(block.get(output))[1], block.head_dim
    if output not in order or not size or width % size:
        return
    n_heads = width // size
    columns = torch.arange(width).view(n_heads, size)
    for name in reversed(order[: order.index(output)]):
        if not is_linear(block.get(name)) or shape_of(block.get(name))[0] % size:
            continue
        n_slots = shape_of(block.get(name))[0] // size
        rows = torch.arange(n_slots * size).view(n_slots, size)
        candidates = [rows] if n_heads % n_slots == 0 else []
        n_kv = (n_slots - n_heads) // 2
        if n_kv > 0 and n_slots == n_heads + 2 * n_kv and n_heads % n_kv == 0:
            candidates = [rows[-n_kv:], rows.view(n_kv, -1, size)[:, -1]]  # queries, keys, values; or so for each group
        for found in candidates:
            yield ValueHeads(name, output, found, columns.view(len(found), -1, size))


def _find_keys(trial: "Trial", values: ValueHeads, order: list[str]) -> KeyScaling | None:
    """The place for most scales of keys that random ones pass."""
    for keys in _key_candidates(trial.block, values, order):
        s = torch.rand(keys.n, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
        edits: Edits = {}
        _scale_keys(trial.block, keys, s.to(trial.reference.device), edits)
        if trial.change(edits, Rotations()) <= TOLERANCE:
            return keys
    return None


def _key_candidates(block: Block, values: ValueHeads, order: list[str]) -> Iterator[KeyScaling]:
    """Where queries and keys might be made, or normed, with every way in which positions could turn their channels."""
    n_kv, group, size = values.columns.shape
    n_heads = n_kv * group
    before = [name for name in order[: order.index(values.output)] if is_linear(block.get(name)) and name != values.value]
    width = {name: shape_of(block.get(name))[0] for name in before}
    norms = [(f"{block.name}.{name}", module) for name, module in block.module.named_modules() if _is_norm(module)]
    gains = {name: cast(Tensor, module.weight).numel() for name, module in norms}
    for pair in _rotary_pairs(size):  # [size]
        n = int(pair.max()) + 1
        key = torch.arange(n_kv).mul(n).unsqueeze(1) + pair  # [kv heads, size]
        query = key.repeat_interleave(group, 0)  # [heads, size]
        for first, second in itertools.combinations((*before, *gains), 2):
            channels = (width | gains)[first], (width | gains)[second]
            if channels == (n_heads * size, n_kv * size):
                yield KeyScaling(first, second, query.flatten(), key.flatten(), n_kv * n)
            elif channels == (size, size) and first in gains and second in gains:
                yield KeyScaling(first, second, pair, pair, n)
        n_slots = shape_of(block.get(values.value))[0] // size
        if n_slots != n_heads + 2 * n_kv:
            continue
        of_values = torch.full_like(key, n_kv * n)  # [kv heads, size]
        none = torch.full_like(query, n_kv * n)  # [heads, size]
        in_a_row = torch.cat([query, of_values, of_values]), torch.cat([none, key, of_values])
        by_group = (
            torch.cat([query.view(n_kv, -1, size), of_values.expand(2, -1, -1).transpose(0, 1)], 1),
            torch.cat([none.view(n_kv, -1, size), key.unsqueeze(1), of_values.unsqueeze(1)], 1),
        )
        for of_query, of_key in (in_a_row, by_group):
            yield KeyScaling(values.value, values.value, of_query.flatten(), of_key.flatten(), n_kv * n)


def _rotary_pairs(size: int) -> Iterator[Tensor]:
    """Which channels of a head share a scale [size]: none, or those that positions turn together.

    Turned are all channels, or the first half or quarter; a channel with that of the other half, or with its neighbour.
    """
    yield torch.arange(size)
    for turned in (size, size // 2, size // 4):
        if turned % 2 == 0:
            half, rest = torch.arange(turned // 2), torch.arange(turned // 2, size - turned // 2)
            yield torch.cat([half, half, rest])
            yield torch.cat([half.repeat_interleave(2), rest])


# ---- what becomes of the weights ----


def block_edits(block: Block, places: UnitPlaces, rotations: Rotations) -> Edits:
    """Every parameter of the block, or outside the blocks, that rotations change; in their dtype, gradients reach them."""
    edits: Edits = {}
    for scaling in places.scalings:
        if (s := rotations.scales.get(scaling.source)) is not None:
            scale_edits(block, scaling, s, edits)
    if places.keys is not None and (s := rotations.keys.get(places.keys.key)) is not None:
        _scale_keys(block, places.keys, s, edits)
    if (Q := rotations.residual) is not None:
        for name in places.embeddings:
            edits[f"{name}.weight"] = _weight(block, name, edits, Q) @ Q
        for reading in places.readings:
            _turn_reading(block, reading, Q, edits)
        for name in places.writers:
            edits[f"{name}.weight"] = Q.T @ _weight(block, name, edits, Q)
            if (bias := _bias(block, name, edits, Q)) is not None:
                edits[f"{name}.bias"] = bias @ Q
    if (values := places.values) is not None and (R := rotations.heads.get(values.value)) is not None:
        _turn_values(block, values, R, edits)
    for name in places.inputs:
        if (signs := rotations.inputs.get(name)) is not None:
            W = edits.get(f"{name}.weight")
            edits[f"{name}.weight"] = rotate_rows(weight_of(block.get(name)).double() if W is None else W, signs)
    return edits


def _scale_keys(block: Block, keys: KeyScaling, s: Tensor, edits: Edits) -> None:
    """Multiply what makes keys by s [n], and divide what makes queries."""
    factor = torch.cat([s, s.new_ones(1)])
    for source, of_channel, divisor in ((keys.query, keys.of_query, factor), (keys.key, keys.of_key, 1 / factor)):
        scale_edits(block, Scaling(source, (), of_channel), divisor[of_channel.to(s.device)], edits)


def _turn_reading(block: Block, reading: Reading, Q: Tensor, edits: Edits) -> None:
    """Move the norm's gain and bias into its linears, and rotate their inputs."""
    norm = None if reading.norm is None else block.get(reading.norm)
    gain, shift = _gain(norm, Q), None if norm is None else _bias(block, str(reading.norm), edits, Q)
    takes_shift = all(_bias(block, name, edits, Q) is not None for name in reading.linears)
    for name in reading.linears:
        W, bias = _weight(block, name, edits, Q), _bias(block, name, edits, Q)
        if shift is not None and bias is not None and takes_shift:
            edits[f"{name}.bias"] = bias + W @ shift
        edits[f"{name}.weight"] = (W if gain is None else W * gain) @ Q
    if norm is not None and gain is not None:
        edits[f"{reading.norm}.weight"] = torch.ones_like(gain) - gain_offset(norm)
        if shift is not None:
            quotient = torch.where(gain == 0, torch.zeros_like(shift), shift / gain)
            edits[f"{reading.norm}.bias"] = torch.zeros_like(shift) if takes_shift else quotient @ Q


def _turn_values(block: Block, values: ValueHeads, R: Tensor, edits: Edits) -> None:
    """Rotate the rows that make each head's values, and the columns that read them; R [kv heads, head_dim, head_dim]."""
    n, size = values.rows.shape
    rows, columns = values.rows.flatten().to(R.device), values.columns.to(R.device)
    W, bias = _weight(block, values.value, edits, R), _bias(block, values.value, edits, R)
    turned = R.transpose(1, 2) @ W[rows].view(n, size, -1)  # [kv heads, head_dim, in]
    edits[f"{values.value}.weight"] = W.index_copy(0, rows, turned.flatten(0, 1))
    if bias is not None:
        of_heads = torch.einsum("hd,hde->he", bias[rows].view(n, size), R)
        edits[f"{values.value}.bias"] = bias.index_copy(0, rows, of_heads.flatten())
    O = _weight(block, values.output, edits, R)  # [out, in]  # noqa: E741
    edits[f"{values.output}.weight"] = torch.einsum("ohgd,hde->ohge", O[:, columns], R).reshape(len(O), -1)


def stored_edits(block: Block, edits: Edits) -> Edits:
    """Edits as the block's own parameters keep them: Conv1D's orientation, each parameter's dtype."""
    found = {}
    for name, value in edits.items():
        local = name.removeprefix(f"{block.name}.")
        parameter = block.module.get_parameter(local)
        found[name] = oriented(block.get(name.rpartition(".")[0]), value.detach()).to(parameter.dtype)
    return found


# ---- the trial ----


class Trial:
    """A float64 copy of a block, and what it gives for one sample before anything is rotated."""

    def __init__(self, block: Block, sample: Tensor) -> None:
        """sample [1, length, hidden]."""
        self.block = block
        self.width = sample.shape[-1]
        self._module = copy.deepcopy(block.module).double()
        args, kwargs = block.call_arguments(sample)
        self._args, self._kwargs = tree_map(_widen, args), tree_map(_widen, kwargs)
        self._sample = sample.to(block.device).double()
        self.reference = self._run(self._sample, {})

    def change(self, edits: Edits, rotations: Rotations) -> float:
        """How far the rotated block is from the original, rotated, relative to what the block adds; inputs rotate once."""
        prefix = f"{self.block.name}."
        values = {name: oriented(self.block.get(name.rpartition(".")[0]), value.double()) for name, value in edits.items()}
        local = {name.removeprefix(prefix): value for name, value in values.items()}
        for name, signs in rotations.inputs.items():
            if name.startswith(prefix):
                rotate_input(self._module.get_submodule(name.removeprefix(prefix)), signs.to(self._sample.device))
        Q = rotations.residual
        out = self._run(self._sample if Q is None else self._sample @ Q.double(), local)
        expected = self.reference if Q is None else self.reference @ Q.double()
        added = self.reference - self._sample
        return float((out - expected).norm() / added.norm().clamp(min=1e-30))

    @torch.no_grad()
    def _run(self, hidden: Tensor, parameters: dict[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(self._module, parameters, (hidden, *self._args), self._kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)


def outer_change(model: ModelHandle, tokens: Tensor, hidden: Tensor, edits: Edits, Q: Tensor) -> float:
    """How far rotated embedding and head are from the original ones, rotated; the larger of both, relative.

    tokens [1, length] were embedded before; hidden [1, length, hidden] is the last block's output.
    """
    with model.outer(), torch.no_grad():
        for name in model.outer_names():
            model.widen_outer(name)
        wide = hidden.to(model.device).double()
        embedded, logits = model.enter(tokens), model.logits(wide)
        for name, value in edits.items():
            model.put_outer(name, value.double())
        turned, again = model.enter(tokens), model.logits(wide @ Q.double())
        rotated = embedded.to(Q.device).double() @ Q.double()
        return max(
            float((turned.to(Q.device) - rotated).norm() / rotated.norm()), float((again - logits).norm() / logits.norm())
        )


def _widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _weight(block: Block, name: str, edits: Edits, like: Tensor) -> Tensor:
    """The weights [out, in] of a linear, router or embedding as the edits have them so far, in the dtype of `like`."""
    layer = block.get(name)
    found = edits.get(f"{name}.weight")
    if found is None:
        found = weight_of(layer) if is_linear(layer) else cast(Tensor, layer.weight).detach()
    return found.to(like)


def _bias(block: Block, name: str, edits: Edits, like: Tensor) -> Tensor | None:
    bias = edits.get(f"{name}.bias", getattr(block.get(name), "bias", None))
    return bias.detach().to(like) if isinstance(bias, nn.Parameter) else bias


def _gain(norm: nn.Module | None, like: Tensor) -> Tensor | None:
    """What a norm multiplies by [hidden]."""
    weight = None if norm is None else getattr(norm, "weight", None)
    return None if weight is None else weight.detach().to(like) + gain_offset(norm)


def _stuck_channel(block: Block, reading: Reading) -> int | None:
    """A channel of a norm with bias and without gain, where the linears cannot take the bias."""
    if reading.norm is None or all(getattr(block.get(name), "bias", None) is not None for name in reading.linears):
        return None
    bias = getattr(block.get(reading.norm), "bias", None)
    gain = _gain(block.get(reading.norm), torch.zeros(1, dtype=torch.float64, device=block.device))
    if bias is None or gain is None:
        return None
    stuck = ((gain == 0) & (bias != 0)).nonzero()
    return int(stuck[0]) if len(stuck) else None


def _words_of_stuck(norm: str | None, channel: int) -> str:
    return f"{norm} has a bias but no gain in channel {channel}, and linears without biases cannot take it"


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 1 and "Norm" in type(module).__name__


def _norms_of(root: nn.Module, prefix: str, width: int) -> dict[str, nn.Module]:
    """Norms of `width` channels by full name."""
    found = {f"{prefix}{name}": module for name, module in root.named_modules() if _is_norm(module)}
    return {name: module for name, module in found.items() if cast(Tensor, module.weight).numel() == width}


@torch.no_grad()
def _subtracts_mean(norm: nn.Module) -> bool:
    """Whether a norm gives the same for x and for x + 1: LayerNorm does, RMSNorm does not."""
    weight = cast(Tensor, norm.weight)
    x = torch.linspace(-1, 1, weight.numel(), device=weight.device).square().to(weight.dtype).unsqueeze(0)  # [1, hidden]
    plain, shifted = norm(x).float(), norm(x + 1).float()
    return bool((plain - shifted).norm() < 0.1 * plain.norm())


def _is_inside(model: ModelHandle, name: str) -> bool:
    return name.startswith(f"{model.blocks_name}.")
