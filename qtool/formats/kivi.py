"""KIVI's cache in numbers: which entries are rounded once so many tokens are there, in which groups, and the packed groups.

    x^ = s q + z    q = clip(round((x - z) / s), 0, 2^b - 1)    z = min x,  s = (max x - min x) / (2^b - 1) over a group
    entry j of T is rounded where    sinks <= j < end(T)
        end(T) = max(sinks, T - residual)                                       where a group is of one token's channels
        end(T) = sinks + group floor(max(0, T - residual - sinks) / group)      where it is of one channel's tokens
Once rounded an entry stays so. A group's scale s and zero z are float16, the rest is computed in float32.
Source: Liu et al. 2024, arXiv:2402.02750, section 3 and Algorithm 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.packing import n_words, pack_int32, unpack_int32
from qtool.linalg.hadamard import hadamard_product
from qtool.options import Options

Bits = Literal[2, 3, 4, 8]
SMALLEST = 2.0**-24  # of float16's numbers above zero


@dataclass(frozen=True)
class Side:
    """How keys, or values, are rounded."""

    bits: int
    group: int
    along: Literal["tokens", "channels"]
    sinks: int
    residual: int
    is_rotated: bool

    @property
    def tokens(self) -> int:
        """Tokens that are rounded together."""
        return self.group if self.along == "tokens" else 1

    def end(self, length: int) -> int:
        """The first position after the rounded ones, of `length` tokens; `sinks` where none is rounded."""
        return self.sinks + max(0, length - self.residual - self.sinks) // self.tokens * self.tokens

    def ends(self, lengths: Tensor) -> Tensor:
        """The same of whole numbers of tokens, of any shape."""
        n_old = (lengths - self.residual - self.sinks).clamp(min=0)
        return n_old.div(self.tokens, rounding_mode="floor").mul(self.tokens).add(self.sinks)

    def to_groups(self, x: Tensor) -> Tensor:
        """x [batch, kv heads, tokens, head_dim] as groups [batch, kv heads, units, rows, group] float32, whole units."""
        x = hadamard_product(x.float()) if self.is_rotated else x.float()
        groups: Tensor = x.unflatten(2, (-1, self.group)).mT if self.along == "tokens" else x.unflatten(3, (-1, self.group))
        return groups

    def from_groups(self, groups: Tensor) -> Tensor:
        """What `to_groups` was given; the rotation is its own inverse."""
        x = groups.mT.flatten(2, 3) if self.along == "tokens" else groups.flatten(3)  # [batch, kv heads, tokens, head_dim]
        return hadamard_product(x) if self.is_rotated else x

    def round(self, x: Tensor) -> Tensor:
        """x [batch, kv heads, tokens, head_dim], whole units, as the cache gives it back, in x's dtype.

        Gradients pass as if an error were a fixed share of its group's scale: x^ = x + s e,  e = (x^ - x) / s held.
        """
        groups = self.to_groups(x)
        q, scale, zero = fit(groups.detach(), self.bits)
        rounded = decode(q, scale, zero)
        if groups.requires_grad:
            error = ((rounded - groups) / scale).detach()
            reach = groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)  # [..., 1]
            soft = groups + reach / ((1 << self.bits) - 1) * error
            rounded = soft + (rounded - soft).detach()
        return self.from_groups(rounded).to(x.dtype)

    def bytes_per_token(self, head_dim: int) -> float:
        """Of one head's codes, scales and zeros; words of a group are whole."""
        groups = head_dim / self.group if self.along == "channels" else head_dim / self.tokens
        return groups * (4 * n_words(self.group, self.bits) + 4)


class KiviScheme(Options):
    """A key/value cache whose older entries are codes in groups, each with its own range, found when they are rounded."""

    key_bits: Bits = Field(2, description="bits of a key's number")
    value_bits: Bits = Field(2, description="bits of a value's number")
    group: Literal[16, 32, 64, 128] = Field(32, description="numbers that share a scale and a zero point")
    residual: int = Field(128, ge=0, description="latest tokens whose keys and values stay as they are")
    sinks: int = Field(0, ge=0, description="first tokens whose keys and values stay as they are")
    keys: Literal["per_channel", "per_token"] = Field(
        "per_channel",
        description="per_channel: a group of keys is one channel of `group` tokens, as KIVI has it, since few channels stand "
        "out; per_token: `group` channels of one token, as of values",
    )
    rotate: Literal["none", "hadamard"] = Field(
        "none", description="hadamard: keys are rounded in a basis in which no channel stands out, which goes with per_token"
    )

    @property
    def sides(self) -> tuple[Side, Side]:
        """Of keys and of values."""
        along: Literal["tokens", "channels"] = "tokens" if self.keys == "per_channel" else "channels"
        shared = self.sinks, self.residual
        return (
            Side(self.key_bits, self.group, along, *shared, self.rotate == "hadamard"),
            Side(self.value_bits, self.group, "channels", *shared, False),
        )

    def misfit(self, k_dim: int, v_dim: int) -> str | None:
        """Why heads of so many channels of keys and of values cannot be cached so; None where they can."""
        for what, size, divides in (("keys", k_dim, self.keys == "per_token"), ("values", v_dim, True)):
            if divides and size % self.group:
                fitting = [str(group) for group in (16, 32, 64, 128) if size % group == 0]
                advice = f"use group: {', '.join(fitting)}" if fitting else "use quantize/kv_cache"
                return f"a head's {size} channels of {what} do not divide into groups of {self.group}; {advice}"
        if self.rotate == "hadamard" and k_dim & (k_dim - 1):
            return f"rotate: hadamard takes heads of a power of two of channels, not {k_dim}; use rotate: none"
        return None

    def bytes_per_token(self, k_dim: int, v_dim: int) -> float:
        """Of one head's rounded key and value."""
        keys, values = self.sides
        return keys.bytes_per_token(k_dim) + values.bytes_per_token(v_dim)

    def __str__(self) -> str:
        """kivi-k2v2g32r128, with -s4, -per_token, -hadamard where they are."""
        ends = f"-s{self.sinks}" * (self.sinks > 0) + "-per_token" * (self.keys == "per_token")
        rotated = "-hadamard" * (self.rotate == "hadamard")
        return f"kivi-k{self.key_bits}v{self.value_bits}g{self.group}r{self.residual}{ends}{rotated}"


@dataclass(frozen=True)
class PackedGroups:
    """Rounded groups as they lie in memory: words [batch, kv heads, units, rows, words] int32; scale, zero [..., 1] float16."""

    side: Side
    words: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def of(cls, side: Side, x: Tensor) -> "PackedGroups":
        """Of x [batch, kv heads, tokens, head_dim], whole units."""
        groups = side.to_groups(x.detach())
        q, scale, zero = fit(groups, side.bits)
        words = pack_int32(q.flatten(0, -2).to(torch.int32), side.bits).unflatten(0, groups.shape[:-1])
        return cls(side, words, scale.to(torch.float16), zero.to(torch.float16))

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[batch, kv heads, tokens, head_dim] in dtype."""
        codes = unpack_int32(self.words.flatten(0, -2), self.side.bits, self.side.group).unflatten(0, self.words.shape[:-1])
        return self.side.from_groups(decode(codes, self.scale, self.zero)).to(dtype)

    def followed_by(self, others: "PackedGroups") -> "PackedGroups":
        """Both, one after the other along the tokens."""
        return self._make(*(torch.cat(pair, 2) for pair in zip(self.parts, others.parts, strict=True)))

    def without_first(self, units: int) -> "PackedGroups":
        """All but the first units, the rest copied, so that their memory is free."""
        return self._make(*(part[:, :, units:].clone() for part in self.parts))

    def of_samples(self, choose: Callable[[Tensor], Tensor]) -> "PackedGroups":
        """Of other samples: `choose` takes them from a tensor's first axis."""
        return self._make(*(choose(part) for part in self.parts))

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.words, self.scale, self.zero

    def _make(self, words: Tensor, scale: Tensor, zero: Tensor) -> "PackedGroups":
        return PackedGroups(self.side, words, scale, zero)


def fit(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of x [..., group] float32, and scale and zero [..., 1] as float16 holds them; raises QtoolError where it cannot."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # [..., 1]
    zero, scale = low.to(torch.float16).float(), ((high - low) / ((1 << bits) - 1)).to(torch.float16).float()
    if not bool(torch.isfinite(zero).all() & torch.isfinite(scale).all()):
        raise QtoolError(
            "keys or values hold NaN, infinity or numbers that float16 cannot hold; check the model's weights and load it with "
            "dtype: float32, or quantize the cache by quantize/kv_cache"
        )
    scale = torch.where(scale > 0, scale, SMALLEST)  # a group of one number, or of numbers nearer to each other than that
    return ((x - zero) / scale).round().clamp(0, (1 << bits) - 1), scale, zero


def decode(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """x^ [..., group] float32 of codes q [..., group], scale and zero [..., 1]."""
    return q.float() * scale.float() + zero.float()
