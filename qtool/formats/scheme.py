"""Schemes: how many bits weights, activations and the key/value cache get, short and long form.

    w4a16g128          4-bit weights in groups of 128 along `in`, activations as they are
    w4a16g128-asym     the same with zero points, which are codes; -asymf16: with zero points in float16
    w8a8               8-bit weights, one scale per output channel; 8-bit activations, one scale per token
    w4a4kv4            and a 4-bit key/value cache
    nf4g64, e2m1g128   a format of a table (see codebook.py) in groups of 64 or 128
    mxfp4, nvfp4, ...  microscaling formats, whose groups and scales are part of the name
The long form spells the same out: {weights: {bits: 4, group: 128, symmetric: true}, activations: {bits: 8}}.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, WrapValidator, model_validator

from qtool.formats.codebook import LEVELS, CodebookGrid
from qtool.formats.integer import IntegerGrid
from qtool.options import Options, Selection, Shorthand, matches

SHORTHAND = re.compile(r"w(?P<w>\d+)(?:a(?P<a>\d+))?(?:kv(?P<kv>\d+))?(?:g(?P<g>\d+))?(?P<asym>-asym(?:f16)?)?")
TABLE_SHORTHAND = re.compile(r"(?P<format>\w+?)(?:g(?P<g>\d+))?")


Format = Literal["int", "nf4", "fp4_bnb", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"]
ScaleDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e8m0fnu"]
ZeroDtype = Literal["int", "float16"]
Grid = IntegerGrid | CodebookGrid

PRESETS: dict[str, dict[str, object]] = {
    "mxfp4": {"format": "e2m1", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp6_e2m3": {"format": "e2m3", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp6_e3m2": {"format": "e3m2", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp8_e4m3": {"format": "e4m3", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp8_e5m2": {"format": "e5m2", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxint8": {"bits": 8, "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "nvfp4": {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"},
}


class WeightScheme(Options):
    """Weights in groups along `in`, whole numbers or levels of a table."""

    format: Format = Field("int", description="int, or a table: nf4, bitsandbytes' FP4, floats by exponent and mantissa bits")
    bits: int = Field(ge=2, le=8, description="bits per weight; a table's own where the format is one")
    group: int | None = Field(None, ge=8, description="weights along `in` that share a scale; null: a whole row")
    symmetric: bool = Field(True, description="no zero points; tables have none")
    scale_dtype: ScaleDtype = Field(
        "bfloat16",
        description="dtype scales are stored in; float8_e4m3fn goes with one float32 scale per tensor, float8_e8m0fnu holds "
        "powers of two",
    )
    zero_dtype: ZeroDtype = Field(
        "int",
        description="dtype zero points are stored in; int, as codes, keeps a weight of 0 at 0; float16 does not, so that "
        "pruned weights come back",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_bits(cls, value: object) -> object:
        if isinstance(value, dict) and value.get("format") in LEVELS:
            return {"bits": (len(LEVELS[value["format"]]) - 1).bit_length(), **value}
        return value

    @model_validator(mode="after")
    def _agree(self) -> "WeightScheme":
        if self.format != "int":
            bits = (len(LEVELS[self.format]) - 1).bit_length()
            if self.bits != bits:
                raise ValueError(f"{self.format} has {bits} bits, not {self.bits}; leave bits away")
            if not self.symmetric:
                raise ValueError(f"{self.format} has no zero points; leave symmetric away")
        if self.symmetric and self.zero_dtype != "int":
            raise ValueError(f"{self.zero_dtype} zero points need symmetric: false; leave zero_dtype away, or say so")
        if not self.symmetric and self.scale_dtype.startswith("float8"):
            raise ValueError(f"zero points do not go with {self.scale_dtype} scales; use bfloat16, float16 or float32")
        return self

    @property
    def grid(self) -> Grid:
        if self.format == "int":
            return IntegerGrid(self.bits, self.symmetric, self.scale_dtype, zero_dtype=self.zero_dtype)
        return CodebookGrid(self.format, self.scale_dtype)

    @property
    def ending(self) -> str:
        """What the shorthand ends in: how zero points are stored."""
        return "" if self.symmetric else "-asym" if self.zero_dtype == "int" else "-asymf16"

    def __str__(self) -> str:
        for name, fields in PRESETS.items():
            if self == WeightScheme.model_validate(fields):
                return name
        group = "" if self.group is None else f"g{self.group}"
        return f"{self.format}{group}" if self.format != "int" else f"w{self.bits}{group}{self.ending}"


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
        if self.weights.format != "int" or self.weights.scale_dtype.startswith("float8"):
            rest = "".join(f"-{kind}{part.bits}" for kind, part in (("a", self.activations), ("kv", self.kv)) if part)
            return f"{self.weights}{rest}"
        activations = 16 if self.activations is None else self.activations.bits
        kv = "" if self.kv is None else f"kv{self.kv.bits}"
        group = "" if self.weights.group is None else f"g{self.weights.group}"
        return f"w{self.weights.bits}a{activations}{kv}{group}{self.weights.ending}"


def _read_chosen(value: object, _: object) -> Scheme | Literal["search"]:
    return "search" if value == "search" else Scheme.model_validate(value)  # a union would tell a fault once for each part


class SchemeSelection(Selection):
    """Options of a method that quantizes linears: the first pattern in `modules` that fits wins, else `scheme`.

    Where `scheme` is the word search, the run puts what a search step found into `modules`, a name for each linear.
    """

    scheme: Annotated[Scheme | Literal["search"], WrapValidator(_read_chosen)] = Field(
        description="shorthand such as w4a16g128, or the long form; search: what a search step before found for each linear"
    )
    modules: dict[str, Scheme] = Field({}, description="name pattern: scheme of its own; the first match wins")

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of one linear; None where it is ignored."""
        if self.is_ignored(name):
            return None
        found = next((scheme for pattern, scheme in self.modules.items() if matches(name, pattern)), self.scheme)
        assert isinstance(found, Scheme), f"{name}: no search found a scheme for it"
        return found

    def patterns(self) -> tuple[str, ...]:
        return (*super().patterns(), *self.modules)


def parse_shorthand(text: str) -> dict[str, object]:
    """The long form of a shorthand; raises ValueError that shows the form."""
    if text in PRESETS:
        return {"weights": PRESETS[text]}
    table = TABLE_SHORTHAND.fullmatch(text)
    if table is not None and table["format"] in LEVELS:
        return {"weights": {"format": table["format"], "group": int(table["g"]) if table["g"] else None}}
    match = SHORTHAND.fullmatch(text)
    if match is None:
        raise ValueError(
            f'"{text}" is no scheme; write w<bits>a<bits>[kv<bits>][g<group>][-asym[f16]], such as w4a16g128, a table with its '
            f"group, such as nf4g64 ({', '.join(LEVELS)}), or one of {', '.join(PRESETS)}"
        )
    bits = {name: int(value) for name, value in match.groupdict().items() if value and name != "asym"}
    zero_dtype = "float16" if match["asym"] == "-asymf16" else "int"
    weights = {"bits": bits["w"], "group": bits.get("g"), "symmetric": not match["asym"], "zero_dtype": zero_dtype}
    long: dict[str, object] = {"weights": weights}
    if bits.get("a", 16) < 16:
        long["activations"] = {"bits": bits["a"]}
    if bits.get("kv", 16) < 16:
        long["kv"] = {"bits": bits["kv"]}
    return long
