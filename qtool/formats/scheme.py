"""Schemes: how many bits weights, activations and the key/value cache get, short and long form.

    w4a16g128          4-bit weights in groups of 128 along `in`, activations as they are
    w4a16g128-asym     the same with zero points, which are codes; -asymf16: with zero points in float16
    w8a8               8-bit weights, one scale per output channel; 8-bit activations, one scale per token
    w4a4kv4            and a 4-bit key/value cache, which in a recipe is a step of its own, quantize/kivi or quantize/kv_cache
    nf4g64, e2m1g128   a format of a table (see codebook.py) in groups of 64 or 128; -asymf16 as above
    power4g128         4-bit weights on a power grid
    e8pg64             eight weights in a code of 16 bits, a point of a lattice (see lattice.py)
    mxfp4, nvfp4, ...  microscaling formats, whose groups and scales are part of the name
    -ae4m3, -aint4g32  how inputs are rounded: see INPUT_SHORTHAND and ACTIVATION_PRESETS; static at the end: by scales that
                       quantize/inputs found
    -dq, -ic           at the end: scales quantized themselves; groups along `out`, one input channel (column) each
The long form spells the same out: {weights: {bits: 4, group: 128, symmetric: true}, activations: {bits: 8}}.
"""

import re
from typing import Annotated, Literal

from pydantic import Field, WrapValidator, model_validator

from qtool.formats.codebook import LEVELS, CodebookGrid, PowerGrid
from qtool.formats.integer import IntegerGrid
from qtool.formats.lattice import LATTICES, LatticeGrid
from qtool.options import Options, Selection, Shorthand, matches

SHORTHAND = re.compile(r"w(?P<w>\d+)(?:a(?P<a>\d+))?(?:kv(?P<kv>\d+))?(?:g(?P<g>\d+))?")
TABLE_SHORTHAND = re.compile(r"(?P<format>\w+?)(?:g(?P<g>\d+))?")
POWER_SHORTHAND = re.compile(r"power(?P<bits>\d)(?:g(?P<g>\d+))?")
ENDINGS: dict[str, dict[str, object]] = {
    "asym": {"symmetric": False},
    "asymf16": {"symmetric": False, "zero_dtype": "float16"},
    "dq": {"double_quant": True, "scale_dtype": "float32"},
    "ic": {"group_along": "in_channel"},
}


Format = Literal[
    "int",
    "power",
    "nf4",
    "fp4_bnb",
    "e2m1",
    "e3m0",
    "e1m2",
    "e2m3",
    "e3m2",
    "e4m3",
    "e5m2",
    "binary",
    "ternary",
    "w2star",
    "rf8",
    "iq4_nl",
    "e8p",
]
ScaleDtype = Literal["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e8m0fnu"]
ZeroDtype = Literal["int", "float16"]
Grid = IntegerGrid | CodebookGrid | LatticeGrid

PRESETS: dict[str, dict[str, object]] = {
    "mxfp4": {"format": "e2m1", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp6_e2m3": {"format": "e2m3", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp6_e3m2": {"format": "e3m2", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp8_e4m3": {"format": "e4m3", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxfp8_e5m2": {"format": "e5m2", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "mxint8": {"bits": 8, "group": 32, "scale_dtype": "float8_e8m0fnu"},
    "nvfp4": {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"},
}


# What may follow -a in a scheme's shorthand: how a linear's input is rounded; or a word of INPUT_SHORTHAND.
ACTIVATION_PRESETS: dict[str, dict[str, object]] = {
    **{f"int{bits}": {"bits": bits} for bits in range(2, 9)},
    **{name: {"format": name} for name in ("e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2")},
    **{name: fields for name, fields in PRESETS.items() if name.startswith(("mx", "nv"))},
}
INPUT_SHORTHAND = re.compile(
    r"(?:int(?P<bits>\d)(?P<asym>asym)?|(?P<format>e4m3|e5m2))(?:g(?P<g>\d+))?(?:t(?P<t>\d+(?:\.\d+)?))?"
)
STATIC = "static"  # after either: the scales are static


class WeightScheme(Options):
    """Weights in groups along `in`, whole numbers or levels of a table."""

    format: Format = Field(
        "int",
        description="int; power, levels on a power function; or a table: nf4, bitsandbytes' FP4, floats by exponent and "
        "mantissa bits, binary, ternary, w2star (five levels), rf8 (two binary digits), llama.cpp's iq4_nl; e8p, eight weights "
        "a code",
    )
    bits: int = Field(ge=1, le=8, description="bits per weight; a table's own where the format is one")
    group: int | None = Field(None, ge=8, description="weights that share a scale; null: a whole row")
    group_along: Literal["out_channel", "in_channel"] = Field(
        "out_channel",
        description="which channel a group's weights belong to: out_channel, neighbours along `in`, as usual; in_channel, "
        "neighbours along `out`, so that an input with outliers has scales of its own",
    )
    symmetric: bool = Field(True, description="no zero points")
    scale_dtype: ScaleDtype = Field(
        "bfloat16",
        description="dtype scales are stored in; float8_e4m3fn goes with one float32 scale per tensor, float8_e8m0fnu holds "
        "powers of two",
    )
    double_quant: bool = Field(
        False, description="scales in 8 bits, with a float32 step for every 256 and one mean; scale_dtype float32 alone"
    )
    zero_dtype: ZeroDtype = Field(
        "int",
        description="dtype zero points are stored in; int, as codes, keeps a weight of 0 at 0; float16 does not, so that "
        "pruned weights come back",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_bits(cls, value: object) -> object:
        return with_own_bits(value)

    @model_validator(mode="after")
    def _agree(self) -> "WeightScheme":
        if (bits := bits_of(self.format)) not in (None, self.bits):
            raise ValueError(f"{self.format} has {bits} bits, not {self.bits}; leave bits away")
        if self.format in LATTICES and not (self.symmetric and self.group_along == "out_channel"):
            raise ValueError(f"{self.format} has no zero points, and groups along `in` alone; leave -asym and -ic away")
        if self.format in LATTICES and (self.group or 0) % self.grid.width:
            raise ValueError(f"a code of {self.format} holds {self.grid.width} weights; group must be a multiple of that")
        if self.format == "power" and not (self.symmetric and self.bits > 1):
            raise ValueError("power grids have two bits or more and no zero points; leave symmetric away")
        if self.format in LEVELS and not self.symmetric and self.zero_dtype == "int":
            raise ValueError(f"zero points of {self.format} are no codes; add zero_dtype: float16 (-asymf16)")
        if self.format == "int" and self.bits == 1 and self.symmetric:
            raise ValueError("int of one bit has no level above 0; use the format binary, or symmetric: false")
        if self.double_quant and self.scale_dtype != "float32":
            raise ValueError("double_quant quantizes float32 scales; set scale_dtype: float32")
        if self.symmetric and self.zero_dtype != "int":
            raise ValueError(f"{self.zero_dtype} zero points need symmetric: false; leave zero_dtype away, or say so")
        if not self.symmetric and self.scale_dtype.startswith("float8"):
            raise ValueError(f"zero points do not go with {self.scale_dtype} scales; use bfloat16, float16 or float32")
        return self

    @property
    def grid(self) -> Grid:
        if self.format == "int":
            # Powers of two have no sign, and scales that are quantized themselves are all alike only if they have one sign.
            signed = self.symmetric and self.scale_dtype != "float8_e8m0fnu" and not self.double_quant
            return IntegerGrid(self.bits, self.symmetric, self.scale_dtype, zero_dtype=self.zero_dtype, signed_scale=signed)
        if self.format == "power":
            return PowerGrid(self.format, self.scale_dtype, bits=self.bits)
        if self.format in LATTICES:
            return LatticeGrid(self.format, self.scale_dtype)
        return CodebookGrid(self.format, self.scale_dtype, zero_dtype=None if self.symmetric else self.zero_dtype)

    @property
    def is_rowwise(self) -> bool:
        """Whether each output channel's codes and scales are its own."""
        return self.group_along == "out_channel" and not self.double_quant and self.format != "power"

    @property
    def ending(self) -> str:
        """What the shorthand ends in: zero points, double quantization, groups along `out`."""
        zeros = "" if self.symmetric else "-asym" if self.zero_dtype == "int" else "-asymf16"
        return zeros + "-dq" * self.double_quant + "-ic" * (self.group_along == "in_channel")

    def __str__(self) -> str:
        for name, fields in PRESETS.items():
            if self == WeightScheme.model_validate(fields):
                return name
        group = "" if self.group is None else f"g{self.group}"
        kind = {"int": f"w{self.bits}", "power": f"power{self.bits}"}.get(self.format, self.format)
        return f"{kind}{group}{self.ending}"


ActivationFormat = Literal["int", "e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"]


class ActivationScheme(Options):
    """Inputs of linears, rounded at run time, each token, or each group of a token's channels, by its own range."""

    format: ActivationFormat = Field("int", description="int, or floats by exponent and mantissa bits")
    bits: int = Field(ge=2, le=8, description="bits per activation; a float's own where the format is one")
    group: int | None = Field(None, ge=8, description="neighbouring channels that share a scale; null: all of a token")
    symmetric: bool = Field(True, description="no zero points")
    scale_dtype: Literal["float32", "float8_e4m3fn", "float8_e8m0fnu"] = Field(
        "float32",
        description="dtype of the scales; float8_e4m3fn goes with one float32 scale for all of a token; float8_e8m0fnu holds "
        "powers of two, as the microscaling formats have them",
    )
    static: bool = Field(
        False,
        description="one scale for all tokens, found before on text, as quantize/inputs does; of nvfp4, one float32 scale",
    )

    threshold: float | None = Field(
        None,
        ge=0,
        description="channels that reach this magnitude in any token of a call stay as they are (LLM.int8); null: none do",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_bits(cls, value: object) -> object:
        return with_own_bits(value)

    @model_validator(mode="after")
    def _agree(self) -> "ActivationScheme":
        if (bits := bits_of(self.format)) not in (None, self.bits):
            raise ValueError(f"{self.format} has {bits} bits, not {self.bits}; leave bits away")
        if not self.symmetric and (self.format != "int" or self.scale_dtype != "float32"):
            raise ValueError("zero points go with whole numbers and float32 scales alone; leave symmetric away")
        if self.scale_dtype == "float8_e4m3fn" and (self.format, self.group) != ("e2m1", 16):
            raise ValueError("float8_e4m3fn scales of inputs go with e2m1 in groups of 16 (nvfp4); use float32 ones")
        if self.static and self.group is not None and self.scale_dtype != "float8_e4m3fn":
            raise ValueError("static scales serve whole tokens, or nvfp4; leave group away")
        is_whole = self.format == "int" and self.symmetric and self.group is None and not self.static
        if self.threshold is not None and not (is_whole and self.scale_dtype == "float32"):
            raise ValueError("threshold goes with whole numbers that are symmetric and scaled per token, such as int8t6")
        return self

    @property
    def grid(self) -> IntegerGrid | CodebookGrid:
        if self.format == "int":
            return IntegerGrid(self.bits, self.symmetric, self.scale_dtype)
        return CodebookGrid(self.format, self.scale_dtype)

    def __str__(self) -> str:
        """int8, int4asymg64, e4m3, mxfp4, int8static, ..."""
        if self.static:
            return f"{self.model_copy(update={'static': False})}{STATIC}"
        for word, fields in ACTIVATION_PRESETS.items():
            if self == ActivationScheme.model_validate(fields):
                return word
        group = "" if self.group is None else f"g{self.group}"
        kind = f"int{self.bits}{'' if self.symmetric else 'asym'}" if self.format == "int" else self.format
        outliers = "" if self.threshold is None else f"t{self.threshold:.6f}".rstrip("0").rstrip(".")
        return f"{kind}{group}{outliers}{'' if self.scale_dtype == 'float32' else '-e8m0'}"


class KvScheme(Options):
    """Key/value cache."""

    bits: int = Field(ge=2, le=8, description="bits per cached key or value")
    format: Literal["int", "e4m3"] = Field("int", description="whole numbers, or floats of 8 bits")

    @property
    def grid(self) -> IntegerGrid | CodebookGrid:
        return IntegerGrid(self.bits, True, "float32") if self.format == "int" else CodebookGrid(self.format, "float32")

    def __str__(self) -> str:
        return f"{self.format}{self.bits if self.format == 'int' else ''}"


class CacheSelection(Options):
    """Options of a method that quantizes the key/value cache of all blocks."""

    format: Literal["e4m3", "int8"] = Field("e4m3", description="what keys and values are rounded to")

    @property
    def scheme(self) -> KvScheme:
        """The same as a scheme."""
        return KvScheme(bits=8, format="e4m3" if self.format == "e4m3" else "int")


class Scheme(Shorthand):
    """What one linear's weights, its input and the cache are stored in; null parts stay as they are."""

    weights: WeightScheme
    activations: ActivationScheme | None = None
    kv: KvScheme | None = None

    @classmethod
    def expand(cls, word: str) -> dict[str, object]:
        return parse_shorthand(word)

    def __str__(self) -> str:
        is_plain = self.activations is None or self.activations == ActivationScheme(bits=self.activations.bits)
        if self.weights.format != "int" or self.weights.scale_dtype.startswith("float8") or not is_plain:
            cache = "" if self.kv is None else f"-kv{self.kv.bits}"
            return f"{self.weights}{'' if self.activations is None else f'-a{self.activations}'}{cache}"
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


class InputSelection(Selection):
    """Options of a method that finds static scales for the rounded inputs of linears."""

    def after(self, name: str, scheme: Scheme) -> Scheme:
        """The scheme that the quantized linear `name` has afterwards."""
        if scheme.activations is None or self.is_ignored(name):
            return scheme
        return scheme.model_copy(update={"activations": scheme.activations.model_copy(update={"static": True})})


def parse_shorthand(text: str) -> dict[str, object]:
    """The long form of a shorthand; raises ValueError that shows the form."""
    head, *endings = text.split("-")
    inputs = [fields for word in endings if (fields := input_fields(word)) is not None]
    endings = [word for word in endings if input_fields(word) is None]
    bits: dict[str, int] = {}
    weights: dict[str, object] = {}
    if head in PRESETS and not endings:
        weights = dict(PRESETS[head])
    elif match := POWER_SHORTHAND.fullmatch(head):
        weights = {"format": "power", "bits": int(match["bits"]), "group": _int_or_none(match["g"])}
    elif (match := TABLE_SHORTHAND.fullmatch(head)) and bits_of(match["format"]) is not None:
        weights = {"format": match["format"], "group": _int_or_none(match["g"])}
    elif match := SHORTHAND.fullmatch(head):
        bits = {name: int(value) for name, value in match.groupdict().items() if value}
        weights = {"bits": bits["w"], "group": bits.get("g")}
    if not weights or not set(endings) <= set(ENDINGS) or len(inputs) + (bits.get("a", 16) < 16) > 1:
        raise ValueError(
            f'"{text}" is no scheme; write w<bits>a<bits>[kv<bits>][g<group>][-asym[f16]][-dq][-ic], such as w4a16g128, a '
            f"table with its group, such as nf4g64 ({', '.join((*LEVELS, *LATTICES))}), power<bits>[g<group>], or one of "
            f"{', '.join(PRESETS)}; then -a and how inputs are rounded: {', '.join(ACTIVATION_PRESETS)}, or with zero points "
            "and groups, such as int8asym, int4g32 and int4asymg64, or with outliers kept (int8t6)"
        )
    for ending in endings:
        weights |= ENDINGS[ending]
    long: dict[str, object] = {"weights": weights}
    if bits.get("a", 16) < 16:
        long["activations"] = {"bits": bits["a"]}
    for fields in inputs:
        long["activations"] = fields
    if bits.get("kv", 16) < 16:
        long["kv"] = {"bits": bits["kv"]}
    return long


def input_fields(ending: str) -> dict[str, object] | None:
    """The long form of how inputs are rounded, such as of aint4g32 and ae4m3; None of another ending."""
    word = ending[1:].removesuffix(STATIC)
    if ending[:1] != "a":
        return None
    if f"a{word}" != ending:
        plain = input_fields(f"a{word}")
        return None if plain is None else {**plain, "static": True}
    if word in ACTIVATION_PRESETS:
        return ACTIVATION_PRESETS[word]
    if (match := INPUT_SHORTHAND.fullmatch(word)) is None:
        return None
    rest: dict[str, object] = {} if match["g"] is None else {"group": int(match["g"])}
    rest |= {} if match["t"] is None else {"threshold": float(match["t"])}
    if match["format"] is not None:
        return {"format": match["format"], **rest}
    return {"bits": int(match["bits"]), "symmetric": match["asym"] is None, **rest}


def with_own_bits(value: object) -> object:
    """A scheme's fields with the bits that its format has by itself, where it states none."""
    if isinstance(value, dict) and (bits := bits_of(value.get("format"))) is not None:
        return {"bits": bits, **value}
    return value


def bits_of(format: object) -> int | None:
    """Bits per weight of a format that states them; None of whole numbers, power grids and what is no format."""
    if not isinstance(format, str) or format in LATTICES:
        return LATTICES.get(str(format))
    return (len(LEVELS[format]) - 1).bit_length() if format in LEVELS else None


def _int_or_none(digits: str | None) -> int | None:
    return None if digits is None else int(digits)
