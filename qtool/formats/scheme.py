"""Schemes: how many bits weights, activations and the key/value cache get, short and long form.

    w4a16g128          4-bit weights in groups of 128 along `in`, activations as they are
    w4a16g128-asym     the same with zero points
    w8a8               8-bit weights, one scale per output channel; 8-bit activations, one scale per token
    w4a4kv4            and a 4-bit key/value cache
The long form spells the same out: {weights: {bits: 4, group: 128, symmetric: true}, activations: {bits: 8}}.
"""

import re
from typing import Literal

from pydantic import Field

from qtool.formats.integer import IntegerGrid
from qtool.options import Options, Selection, Shorthand, matches

SHORTHAND = re.compile(r"w(?P<w>\d+)(?:a(?P<a>\d+))?(?:kv(?P<kv>\d+))?(?:g(?P<g>\d+))?(?P<asym>-asym)?")


class WeightScheme(Options):
    """Integer weights in groups along `in`."""

    bits: int = Field(ge=2, le=8, description="bits per weight")
    group: int | None = Field(None, ge=8, description="weights along `in` that share a scale; null: a whole row")
    symmetric: bool = Field(True, description="no zero points")
    scale_dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="dtype scales are stored in")

    @property
    def grid(self) -> IntegerGrid:
        return IntegerGrid(self.bits, self.symmetric, self.scale_dtype)


class ActivationScheme(Options):
    """Integer activations, scaled per token at run time."""

    bits: int = Field(ge=4, le=8, description="bits per activation")
    symmetric: bool = Field(True, description="no zero points")


class KvScheme(Options):
    """Integer key/value cache."""

    bits: int = Field(ge=2, le=8, description="bits per cached key or value")


class Scheme(Shorthand):
    """What one linear's weights, its input and the cache are stored in; null parts stay as they are."""

    weights: WeightScheme
    activations: ActivationScheme | None = None
    kv: KvScheme | None = None

    @classmethod
    def expand(cls, word: str) -> dict[str, object]:
        return parse_shorthand(word)

    def __str__(self) -> str:
        activations = 16 if self.activations is None else self.activations.bits
        kv = "" if self.kv is None else f"kv{self.kv.bits}"
        group = "" if self.weights.group is None else f"g{self.weights.group}"
        return f"w{self.weights.bits}a{activations}{kv}{group}{'' if self.weights.symmetric else '-asym'}"


class SchemeSelection(Selection):
    """Options of a method that quantizes linears: the first pattern in `modules` that fits wins, else `scheme`."""

    scheme: Scheme = Field(description="shorthand such as w4a16g128, or the long form")
    modules: dict[str, Scheme] = Field({}, description="name pattern: scheme of its own; the first match wins")

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of one linear; None where it is ignored."""
        if self.is_ignored(name):
            return None
        return next((scheme for pattern, scheme in self.modules.items() if matches(name, pattern)), self.scheme)

    def patterns(self) -> tuple[str, ...]:
        return (*super().patterns(), *self.modules)


def parse_shorthand(text: str) -> dict[str, object]:
    """The long form of a shorthand; raises ValueError that shows the form."""
    match = SHORTHAND.fullmatch(text)
    if match is None:
        raise ValueError(f'"{text}" is no scheme; write w<bits>a<bits>[kv<bits>][g<group>][-asym], such as w4a16g128')
    bits = {name: int(value) for name, value in match.groupdict().items() if value and name != "asym"}
    long: dict[str, object] = {"weights": {"bits": bits["w"], "group": bits.get("g"), "symmetric": not match["asym"]}}
    if bits.get("a", 16) < 16:
        long["activations"] = {"bits": bits["a"]}
    if bits.get("kv", 16) < 16:
        long["kv"] = {"bits": bits["kv"]}
    return long
