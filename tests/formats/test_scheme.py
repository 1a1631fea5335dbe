"""Schemes: the shorthand means what the long form means, and nothing else is taken."""

import pytest
from pydantic import ValidationError

from qtool.formats.codebook import CodebookGrid
from qtool.formats.integer import IntegerGrid
from qtool.formats.scheme import Scheme, SchemeSelection

SAME = {
    "w4a16g128": {"weights": {"bits": 4, "group": 128}},
    "w3a16g64-asym": {"weights": {"bits": 3, "group": 64, "symmetric": False}},
    "w4a16g64-asymf16": {"weights": {"bits": 4, "group": 64, "symmetric": False, "zero_dtype": "float16"}},
    "w8a16": {"weights": {"bits": 8}},
    "w8a8": {"weights": {"bits": 8}, "activations": {"bits": 8}},
    "w4a4kv4": {"weights": {"bits": 4}, "activations": {"bits": 4}, "kv": {"bits": 4}},
    "w4a8kv8g32-asym": {
        "weights": {"bits": 4, "group": 32, "symmetric": False},
        "activations": {"bits": 8},
        "kv": {"bits": 8},
    },
    "nf4g64-asymf16": {"weights": {"format": "nf4", "group": 64, "symmetric": False, "zero_dtype": "float16"}},
    "power3g32": {"weights": {"format": "power", "bits": 3, "group": 32}},
    "e8pg64": {"weights": {"format": "e8p", "group": 64}},
    "ternaryg64": {"weights": {"format": "ternary", "group": 64}},
    "w4a16g64-asym-dq": {
        "weights": {"bits": 4, "group": 64, "symmetric": False, "double_quant": True, "scale_dtype": "float32"}
    },
    "nf4g64-ic": {"weights": {"format": "nf4", "group": 64, "group_along": "in_channel"}},
    "nf4g64": {"weights": {"format": "nf4", "group": 64}},
    "e4m3": {"weights": {"format": "e4m3", "bits": 8}},
    "nvfp4": {"weights": {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"}},
    "mxfp6_e3m2": {"weights": {"format": "e3m2", "group": 32, "scale_dtype": "float8_e8m0fnu"}},
    "e4m3-ae4m3": {"weights": {"format": "e4m3"}, "activations": {"format": "e4m3"}},
    "e2m1-ae2m1": {"weights": {"format": "e2m1"}, "activations": {"format": "e2m1"}},
    "nf4g64-aint8": {"weights": {"format": "nf4", "group": 64}, "activations": {"bits": 8}},
    "w4g128-amxfp8_e4m3": {
        "weights": {"bits": 4, "group": 128},
        "activations": {"format": "e4m3", "group": 32, "scale_dtype": "float8_e8m0fnu"},
    },
    "nvfp4-anvfp4": {
        "weights": {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"},
        "activations": {"format": "e2m1", "group": 16, "scale_dtype": "float8_e4m3fn"},
    },
    "w2a8": {"weights": {"bits": 2}, "activations": {"bits": 8}},
    "w2a2g32": {"weights": {"bits": 2, "group": 32}, "activations": {"bits": 2}},
    "w8-aint8asym": {"weights": {"bits": 8}, "activations": {"bits": 8, "symmetric": False}},
    "w4g64-asym-aint4g32": {
        "weights": {"bits": 4, "group": 64, "symmetric": False},
        "activations": {"bits": 4, "group": 32},
    },
    "w4-aint4asymg64": {"weights": {"bits": 4}, "activations": {"bits": 4, "group": 64, "symmetric": False}},
    "e4m3g64-ae4m3g64": {"weights": {"format": "e4m3", "group": 64}, "activations": {"format": "e4m3", "group": 64}},
    "w8-aint8t6": {"weights": {"bits": 8}, "activations": {"bits": 8, "threshold": 6.0}},
    "w8-aint8t0.25": {"weights": {"bits": 8}, "activations": {"bits": 8, "threshold": 0.25}},
    "w8-aint8t0": {"weights": {"bits": 8}, "activations": {"bits": 8, "threshold": 0.0}},
    "mxint8": {"weights": {"bits": 8, "group": 32, "scale_dtype": "float8_e8m0fnu"}},
}


@pytest.mark.parametrize("short", SAME)
def test_the_shorthand_equals_the_long_form(short: str) -> None:
    assert Scheme.model_validate(short) == Scheme.model_validate(SAME[short])


@pytest.mark.parametrize("short", SAME)
def test_a_scheme_prints_as_its_shorthand(short: str) -> None:
    assert str(Scheme.model_validate(short)) == short


def test_sixteen_bits_may_be_left_unsaid() -> None:
    assert Scheme.model_validate("w4g128") == Scheme.model_validate("w4a16kv16g128")


NO_SCHEMES = ["", "4bit", "w4a16g128x", "w4g", "a8", "w4-asym-g128", "w4-f16", "W4A16", "w4a8-ae4m3", "mxfp4-anf4"]
NO_INPUTS = ["w8-aint8-aint8", "w8-ae4m3asym", "w4-aint4g64asym", "w4-aint16"]


@pytest.mark.parametrize("text", NO_SCHEMES + NO_INPUTS)
def test_a_text_that_is_no_scheme_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(ValidationError, match=r"write w<bits>a<bits>"):
        Scheme.model_validate(text)


@pytest.mark.parametrize("text", ["w0a16", "w9a16", "w4a16g4", "w4a1", "w4a16kv1", "w4-aint9", "w4-aint4g4"])
def test_a_number_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal|less than or equal"):
        Scheme.model_validate(text)


@pytest.mark.parametrize(
    ("weights", "fault"),
    [
        ({"format": "nf4", "bits": 3}, "nf4 has 4 bits, not 3"),
        ({"format": "nf4", "symmetric": False}, "zero points of nf4 are no codes"),
        ({"format": "power", "bits": 4, "symmetric": False, "zero_dtype": "float16"}, "power grids have .* no zero points"),
        ({"bits": 1}, "int of one bit has no level above 0"),
        ({"bits": 4, "double_quant": True}, "double_quant quantizes float32 scales"),
        ({"bits": 4, "symmetric": False, "scale_dtype": "float8_e8m0fnu"}, "zero points do not go with float8_e8m0fnu"),
        ({"bits": 4, "zero_dtype": "float16"}, "float16 zero points need symmetric: false"),
        ({"format": "nf4", "zero_dtype": "float16"}, "float16 zero points need symmetric: false"),
        ({"format": "nf5"}, "'int', 'power', 'nf4'"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(weights: dict[str, object], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Scheme.model_validate({"weights": weights})


@pytest.mark.parametrize(
    ("activations", "fault"),
    [
        ({"format": "e4m3", "symmetric": False}, "zero points go with whole numbers"),
        ({"format": "e2m1", "group": 32, "scale_dtype": "float8_e4m3fn"}, r"go with e2m1 in groups of 16 \(nvfp4\)"),
        ({"bits": 8, "scale_dtype": "float8_e4m3fn"}, r"go with e2m1 in groups of 16 \(nvfp4\)"),
        ({"format": "e4m3", "bits": 4}, "e4m3 has 8 bits, not 4"),
        (
            {"bits": 8, "group": 32, "threshold": 6.0},
            "threshold goes with whole numbers that are symmetric and scaled per token",
        ),
        ({"bits": 8, "static": True, "threshold": 6.0}, "threshold goes with whole numbers"),
        ({"format": "e4m3", "threshold": 6.0}, "threshold goes with whole numbers"),
        ({"bits": 8, "symmetric": False, "threshold": 6.0}, "threshold goes with whole numbers"),
    ],
)
def test_inputs_whose_parts_contradict_each_other_are_refused(activations: dict[str, object], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Scheme.model_validate({"weights": {"bits": 8}, "activations": activations})


@pytest.mark.parametrize("short", ["nf4", "mxfp4", "nvfp4", "e2m1g128"])
def test_a_table_gives_its_own_grid(short: str) -> None:
    weights = Scheme.model_validate(short).weights
    assert isinstance(weights.grid, CodebookGrid) and weights.bits == 4 and weights.grid.high == 15


def test_the_weights_part_gives_its_grid() -> None:
    weights = Scheme.model_validate({"weights": {"bits": 3, "symmetric": False, "scale_dtype": "float16"}}).weights
    assert weights.grid == IntegerGrid(3, False, "float16")


def test_the_first_pattern_that_fits_gives_the_scheme() -> None:
    modules = {"layers.0.*": "w8a16", "down_proj": "w3a16g32", "*.down_proj": "w2a16"}
    options = SchemeSelection.model_validate({"scheme": "w4a16", "modules": modules, "ignore": ["re:.*lm_head"]})
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj", "lm_head")
    assert [str(options.scheme_of(name)) for name in names] == ["w8a16", "w3a16g32", "w4a16", "None"]
    assert options.patterns() == ("re:.*lm_head", *modules)


def test_patterns_nobody_wrote_need_not_match() -> None:
    assert SchemeSelection.model_validate({"scheme": "w4a16"}).patterns() == ()
