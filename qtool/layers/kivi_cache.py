"""A cache that holds codes: KIVI's packed groups, a window of late tokens and the first ones as they are; and its attention.

A query that is the T-th token sees entries as they stand with T tokens, its own among them. Where several tokens come at once,
a prompt or a whole window, some entries are rounded for the later queries and not yet for the earlier ones, so that both forms
are multiplied and each query takes its own:
    S = q K^T,    S_ij = q_i k^_j  where sinks <= j < end_k(T_i),  else q_i k_j        A = softmax(S + mask)
    o_i = sum_j A_ij v^_j  where sinks <= j < end_v(T_i),  else  A_ij v_j
    q [batch, heads, queries, head_dim]    k, k^, v, v^ [batch, kv heads, tokens, head_dim]    A [batch, heads, queries, tokens]
So a window, a prompt and tokens one by one give the same, which is what decoding through the cache gives.
Source: Liu et al. 2024, arXiv:2402.02750, Algorithm 1. Differs: KIVI lets a prompt's queries see all its tokens unrounded.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.attention import AttentionRounding
from qtool.formats.kivi import KiviScheme, PackedGroups, Side

QUERIES = 256  # whose scores are in memory at a time


@dataclass(frozen=True)
class Held:
    """What a cache keeps of keys, or of values: the first tokens, packed ones, and the latest, in this order."""

    first: Tensor  # [batch, kv heads, tokens, head_dim]
    packed: PackedGroups | None
    last: Tensor  # [batch, kv heads, tokens, head_dim]

    def tensors(self) -> list[Tensor]:
        return [self.first, self.last, *(() if self.packed is None else self.packed.parts)]

    def of_samples(self, choose: Callable[[Tensor], Tensor]) -> "Held":
        """Of other samples: `choose` takes them from a tensor's first axis."""
        packed = None if self.packed is None else self.packed.of_samples(choose)
        return Held(choose(self.first), packed, choose(self.last))


@dataclass(frozen=True)
class Seen:
    """Keys, or values, of all tokens [batch, kv heads, tokens, head_dim]: as the first new query has them, and the last."""

    side: Side
    early: Tensor
    late: Tensor

    def is_rounded(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Whether the query that is the T-th token sees an entry as `late` has it [queries, tokens]."""
        return (positions >= self.side.sinks) & (positions < self.side.ends(lengths).unsqueeze(1))


@dataclass(frozen=True)
class View:
    """What the new queries see."""

    k: Seen
    v: Seen
    offset: int  # position of the first token that is there
    before: int  # tokens before the new ones
    after: int

    @property
    def is_settled(self) -> bool:
        """Whether all new queries see the same, which is `late`."""
        both = (self.k, self.v)
        return all(seen.early is seen.late or seen.side.end(self.before + 1) == seen.side.end(self.after) for seen in both)

    @classmethod
    def plain(cls, k: Tensor, v: Tensor, queries: int) -> "View":
        """Of k and v [batch, kv heads, tokens, head_dim] that all queries, the latest tokens, see as they are."""
        sides = KiviScheme().sides
        return cls(Seen(sides[0], k, k), Seen(sides[1], v, v), 0, k.shape[2] - queries, k.shape[2])


class KiviCache:
    """Keys and values of one attention; `window`: tokens that a query sees, None where it sees all."""

    def __init__(self, scheme: KiviScheme, window: int | None = None) -> None:
        self.scheme = scheme
        self.window = window
        self.length = 0  # tokens that came
        self.offset = 0  # of these, the first ones that no later query sees and that are forgotten
        self._k: Held | None = None
        self._v: Held | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in memory: codes, scales, zeros, and the tokens that are kept as they are."""
        return sum(tensor.nbytes for held in (self._k, self._v) if held is not None for tensor in held.tensors())

    def extend(self, k: Tensor, v: Tensor, keep: bool = True) -> View:
        """Take new keys, rotated, and values [batch, kv heads, tokens, head_dim]; returns what their queries see.

        keep: whether there will be later tokens; without, nothing is packed. Raises QtoolError where heads do not divide.
        """
        if self.length == 0 and (misfit := self.scheme.misfit(k.shape[-1], v.shape[-1])) is not None:
            raise QtoolError(f"the quantized cache: {misfit}")
        offset, before = self.offset, self.length
        self.length += k.shape[2]
        sides = self.scheme.sides
        k_seen, k_held = _extend(sides[0], self._k, k, (offset, before, self.length), keep)
        v_seen, v_held = _extend(sides[1], self._v, v, (offset, before, self.length), keep)
        if keep:
            self._k, self._v = self._forget(k_held, v_held)
        return View(k_seen, v_seen, offset, before, self.length)

    def choose_samples(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Go on with other samples: `choose` takes them from a tensor's first axis."""
        self._k, self._v = (None if held is None else held.of_samples(choose) for held in (self._k, self._v))

    def clear(self) -> None:
        """Forget everything."""
        self.length, self.offset, self._k, self._v = 0, 0, None, None

    def _forget(self, k: Held, v: Held) -> tuple[Held, Held]:
        """Let go what stands before every later query's window, keys and values up to the same token."""
        if self.window is None:
            return k, v
        sinks, unit = self.scheme.sinks, max(side.tokens for side in self.scheme.sides)
        unseen = self.length + 1 - self.window  # tokens that the next query does not see
        target = sinks + (unseen - sinks) // unit * unit
        if target <= self.offset or unseen < sinks:
            return k, v
        k, v = (_without(side, held, self.offset, target) for side, held in zip(self.scheme.sides, (k, v), strict=True))
        self.offset = target
        return k, v


def attend(
    query: Tensor,
    view: View,
    mask: Tensor | None,
    scaling: float,
    dropout: float,
    rounding: AttentionRounding | None = None,
) -> Tensor:
    """The attention's output [batch, queries, heads, head_dim of values] for rotated queries [batch, heads, queries, head_dim].

    mask: True where a query sees a token, or what is added to its score, [batch, 1 or heads, queries, tokens]; None: each query
    sees all tokens up to its own. Scores and sums are float32 at least, as fused kernels have them.
    """
    kv_heads, device, dtype = view.k.late.shape[1], query.device, torch.promote_types(query.dtype, torch.float32)
    positions = torch.arange(view.offset, view.after, device=device)  # [tokens]
    lengths = torch.arange(view.before + 1, view.after + 1, device=device)  # [queries]
    found = []
    for start in range(0, len(lengths), QUERIES):
        T = lengths[start : start + QUERIES]
        n = view.before + start + len(T) - view.offset  # tokens up to the last of these queries
        q = query[:, :, start : start + QUERIES].to(dtype).unflatten(1, (kv_heads, -1))  # [..., heads, queries, dim]
        early, late = (q @ k[:, :, None, :n].to(dtype).mT for k in (view.k.early, view.k.late))  # [..., queries, tokens]
        S = torch.where(view.k.is_rounded(positions[:n], T), late, early) * scaling
        if mask is None:
            shown = positions[:n] < T.unsqueeze(1)  # [queries, tokens]
        else:
            part = mask[:, :, start : start + QUERIES, :n]
            shown = part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, (kv_heads, -1))
        if shown.dtype == torch.bool:
            S = S.masked_fill(~shown, torch.finfo(dtype).min)
            A = S.softmax(-1) * shown.any(-1, keepdim=True)  # padding, which sees nothing, gets nothing
        else:
            A = (S + shown.to(dtype)).softmax(-1)
        A = A if rounding is None else rounding.round_probabilities(A)
        A = torch.nn.functional.dropout(A, dropout) if dropout else A
        A_late = A * view.v.is_rounded(positions[:n], T)
        v_early, v_late = (v[:, :, None, :n].to(dtype) for v in (view.v.early, view.v.late))
        found.append((A_late @ v_late + (A - A_late) @ v_early).flatten(1, 2))  # [batch, heads, queries, dim]
    return torch.cat(found, 2).transpose(1, 2).to(query.dtype)


def _extend(side: Side, held: Held | None, x: Tensor, lengths: tuple[int, int, int], keep: bool) -> tuple[Seen, Held]:
    """Of one side with new tokens x [batch, kv heads, tokens, head_dim]: what the new queries see, and what is kept then.

    lengths: tokens that are forgotten, that came before, and that came with the new ones.
    """
    offset, before, after = lengths
    held = Held(x[:, :, :0], None, x[:, :, :0]) if held is None else held
    n_first = min(max(side.sinks - before, 0), x.shape[2])
    first = torch.cat([held.first, x[:, :, :n_first]], 2)
    last = torch.cat([held.last, x[:, :, n_first:]], 2)
    n_leaving = max(side.end(after), offset) - max(side.end(before), offset)
    leaving, staying = last[:, :, :n_leaving], last[:, :, n_leaving:]
    old = [] if held.packed is None else [held.packed.dequantize(x.dtype)]
    if n_leaving == 0:
        same = torch.cat([first, *old, last], 2)
        return Seen(side, same, same), Held(first, held.packed, last)
    late = torch.cat([first, *old, side.round(leaving), staying], 2)
    early = late if after - before == 1 else torch.cat([first, *old, last], 2)
    packed = held.packed
    if keep:
        new = PackedGroups.of(side, leaving)
        packed, staying = new if packed is None else packed.followed_by(new), staying.clone()
    return Seen(side, early, late), Held(first, packed, staying)


def _without(side: Side, held: Held, offset: int, target: int) -> Held:
    """Without the tokens at positions from offset to target, which is no less than the first ones' number."""
    first, gone = held.first[:, :, :0], max(target - max(offset, side.sinks), 0)  # of packed and last ones
    n_units = 0 if held.packed is None else held.packed.words.shape[2]
    units = min(gone // side.tokens, n_units)
    packed = None if held.packed is None or units == n_units else held.packed.without_first(units)
    return Held(first, packed, held.last[:, :, gone - units * side.tokens :].clone())
