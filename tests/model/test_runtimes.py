"""Runtimes: the table agrees with the exports, and each of its rules refuses what it says and serves the rest."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qtool import registry
from qtool.formats.scheme import Scheme, input_fields
from qtool.model.checkpoint import EXPERT
from qtool.model.handle import ModelHandle
from qtool.model.kernel_limits import head_name
from qtool.model.runtimes import ServedSchemes, Serving, load_table, refusal, servings
from qtool.options import ModelOptions

TinyModel = Callable[..., Path]
TABLE = load_table()
EXPORTS = sorted({entry.export for entry in TABLE})
ATTENTION = "model.layers.0.self_attn"


def handle(folder: Path) -> ModelHandle:
    return ModelHandle(ModelOptions(path=str(folder)))


@pytest.fixture
def llama(tiny_model: TinyModel) -> ModelHandle:
    """Linears of 64 inputs, those of down_proj 128; outputs: q 64, k and v 32 each, gate and up 128."""
    return handle(tiny_model("llama", dtype="bfloat16"))


def schemes_of(model: ModelHandle, **schemes: str | None) -> dict[str, Scheme]:
    """A scheme for every linear of the blocks, `others`, and those of a last name; None: dense."""
    found = {}
    for name in model.linear_names():
        last = name.rsplit(".", 1)[-1]
        word = schemes.get(last, None if name == head_name(model) else schemes.get("others"))
        if word is not None:
            found[name] = Scheme.model_validate(word)
    return found


def serving(**fields: object) -> Serving:
    """An entry that serves w4 in groups of 32 or 64, but for its fields."""
    rows = {"schemes": ({"format": "int", "bits": (4,), "groups": (32, 64)},)}
    known = {"runtime": "it", "version": "1", "export": "gptq", "evidence": "documented", "source": "https://it"}
    return Serving.model_validate(known | rows | fields)


def test_the_table_loads_and_says_where_each_fact_is_from() -> None:
    assert len(TABLE) >= 25
    others = [entry for entry in TABLE if entry.runtime != "qtool"]
    assert [entry for entry in others if not entry.source.startswith("https://")] == []
    asked = [(entry.runtime, entry.version, entry.export) for entry in TABLE]
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("export", EXPORTS)
def test_every_export_of_the_table_exists(export: str) -> None:
    assert f"export/{export}" in registry.list_methods()


def test_every_export_has_a_runtime_that_serves_it() -> None:
    written = {key.removeprefix("export/") for key in registry.list_methods() if key.startswith("export/")}
    assert written - {entry.export for entry in TABLE if not entry.reason} == set()


@pytest.mark.parametrize("export", sorted({entry.export for entry in TABLE if entry.evidence == "run"}))
def test_what_is_said_to_run_is_among_the_checks_of_the_exports(export: str) -> None:
    checks = Path(__file__).resolve().parents[2] / "scripts" / "check_exports"
    assert f'"{export}"' in checks.read_text(encoding="utf-8")


def inputs_of(word: str) -> dict[str, object] | None:
    """The activation scheme that the table calls so."""
    return None if word == "none" else input_fields(f"a{word}")


def spelled_out(served: ServedSchemes) -> Iterator[Scheme]:
    """Every scheme of a row; of those that name no groups, some."""
    multiple = served.group_multiple
    groups = served.groups or (0, max(16 // multiple, 1) * multiple, max(64 // multiple, 1) * multiple)
    zeros = [(True, "int")] * (True in served.symmetric)
    zeros += [(False, dtype) for dtype in served.zero_dtypes] * (False in served.symmetric)
    inputs = [inputs_of(word) for word in served.activations]
    fields = itertools.product(served.bits, groups, zeros, served.scale_dtypes, served.double_quant, inputs)
    for bits, group, (symmetric, zero_dtype), scale_dtype, double_quant, activations in fields:
        if double_quant and scale_dtype != "float32":
            continue  # no scheme is so
        weights = {
            "format": served.format,
            "bits": bits,
            "group": group or None,
            "symmetric": symmetric,
            "zero_dtype": zero_dtype,
            "scale_dtype": scale_dtype,
            "double_quant": double_quant,
        }
        yield Scheme.model_validate({"weights": weights, "activations": activations})


@pytest.mark.parametrize("export", [name for name in EXPORTS if any(e.schemes or e.but for e in TABLE if e.export == name)])
def test_an_export_takes_every_scheme_that_a_runtime_is_said_to_serve(export: str, tiny_model: TinyModel) -> None:
    method = registry.load(f"export/{export}")
    assert method.holds is not None
    models = {"llama": handle(tiny_model("llama", dtype="bfloat16"))}
    entries = [entry for entry in TABLE if entry.export == export]
    if any(served.experts for entry in entries for served in entry.schemes):
        models["mixtral"] = handle(tiny_model("mixtral", dtype="bfloat16"))
    n_tried = 0
    for entry in entries:
        for served in (*entry.schemes, *entry.but):
            for scheme in spelled_out(served):
                n_tried += 1
                model = models["llama"]
                names = [name for name in model.linear_names() if entry.head or name != head_name(model)]
                method.holds(model, dict.fromkeys(names, scheme), method.options())
                if served.experts and scheme.activations is None:
                    names = [name for name in models["mixtral"].linear_names() if EXPERT.fullmatch(name)]
                    method.holds(models["mixtral"], dict.fromkeys(names, scheme), method.options())
    assert n_tried > 0


def test_a_runtime_that_serves_nothing_says_why(llama: ModelHandle) -> None:
    entry = serving(schemes=(), reason="it has no loader; use export/awq")
    assert refusal(entry, llama, schemes_of(llama, others="w4a16g32")) == "it has no loader; use export/awq"
    refused = {str(e): why for e, why in servings("torchao", llama, schemes_of(llama, others="w8a16"))}
    assert refused.pop("sglang 0.5.23") == (
        "it has no loader for torchao's checkpoints; use export/compressed_tensors"
    )
    assert refused == {"transformers 5.23.0 with torchao 0.18.0": None, "vllm 0.33.0 with torchao 0.18.0": None}


def test_other_architectures_are_refused(llama: ModelHandle) -> None:
    schemes = schemes_of(llama, others="w4a16g32")
    assert refusal(serving(architectures=("llama", "qwen2")), llama, schemes) is None
    assert refusal(serving(architectures=("qwen2",)), llama, schemes) == (
        "llama models are not served; use another export, or another runtime"
    )


@pytest.mark.parametrize(
    ("scheme", "served", "words"),
    [
        ("w3a16g32", {}, "its weights have 3 bits, must have 4"),
        ("w4a16g128", {}, "its groups are of 128, must be of 32 or 64"),
        ("w4a16", {}, "its groups are of a whole row, must be of 32 or 64"),
        ("w4a16g32", {"groups": (0, 64)}, "its groups are of 32, must be of a whole row or 64"),
        ("w4a16g16", {"groups": None, "group_multiple": 32}, "must be of a multiple of 32, or a whole row"),
        ("nf4g32", {}, "its format is nf4, must be int"),
        ("mxint8", {"bits": (8,)}, "its scales are float8_e8m0fnu, must be bfloat16, float16 or float32"),
        ("w4a16g32-asym", {}, "of zero points it has zero points, stored as int, must have none"),
        ("w4a16g32-asymf16", {"symmetric": (True, False)}, "float16, must have none or zero points, stored as int"),
        ("w4a16g32", {"symmetric": (False,)}, "of zero points it has none, must have zero points, stored as int"),
        ("w4a16g32-dq", {}, "its scales are quantized themselves (-dq), must be plain"),
        ("w4a16g32", {"double_quant": (True,)}, "its scales are plain, must be quantized themselves (-dq)"),
        ("w4a16g32-ic", {}, "its groups lie along `out` (-ic), must lie along `in`"),
        ("w4a8g32", {}, "of rounded inputs it has int8, must have none"),
        ("w4a16g32", {"activations": ("int4", "int8")}, "of rounded inputs it has none, must have int4 or int8"),
        ("w4a16kv8g32", {}, "its cache is quantized"),
        ("w4a16g32", {"dtypes": ("float16",)}, "the model is in bfloat16, must be in float16"),
    ],
)
def test_a_scheme_is_held_against_what_is_served(
    scheme: str, served: dict[str, object], words: str, llama: ModelHandle
) -> None:
    entry = serving(schemes=({"format": "int", "bits": (4,), "groups": (32, 64)} | served,))
    why = refusal(entry, llama, schemes_of(llama, others=scheme))
    assert why is not None
    where = f"{ATTENTION}.q_proj: {Scheme.model_validate(scheme)}: "
    assert why.startswith(where) and words in why and why.endswith("; quantize so, or use another export")


def test_asymmetric_inputs_are_served_where_the_table_says_so(llama: ModelHandle) -> None:
    scheme = Scheme.model_validate({"weights": {"bits": 8}, "activations": {"bits": 8, "symmetric": False}})
    schemes = dict.fromkeys(schemes_of(llama, others="w8a8"), scheme)
    refused = {entry.runtime: why for entry, why in servings("compressed_tensors", llama, schemes)}
    assert refused["vllm"] is None
    assert "of rounded inputs it has int8asym, must have int8" in str(refused["sglang"])


def test_the_nearest_row_of_the_same_format_gives_the_reason(llama: ModelHandle) -> None:
    rows = ({"format": "int", "bits": (4, 8), "groups": (32, 64)}, {"format": "e4m3", "bits": (8,), "groups": (0,)})
    assert refusal(serving(schemes=rows), llama, schemes_of(llama, others="w4a16g32", down_proj="e4m3")) is None
    why = refusal(serving(schemes=rows), llama, schemes_of(llama, others="w4a16g32", down_proj="e4m3g64"))
    assert why is not None and "layers.0.mlp.down_proj: e4m3g64: its groups are of 64, must be of a whole row" in why


def test_inputs_and_outputs_are_counted(llama: ModelHandle) -> None:
    schemes = schemes_of(llama, others="w4a16g32")
    row = {"format": "int", "bits": (4,), "groups": (32,)}
    assert refusal(serving(schemes=(row | {"in_multiple": 64, "out_multiple": 32},)), llama, schemes) is None
    why = refusal(serving(schemes=(row | {"in_multiple": 128},)), llama, schemes)
    assert why is not None and "q_proj: w4a16g32: it has 64 inputs, must have a multiple of 128" in why
    why = refusal(serving(schemes=(row | {"out_multiple": 64},)), llama, schemes)
    assert why is not None and "k_proj: w4a16g32: it has 32 outputs, must have a multiple of 64" in why


def test_joined_linears_count_their_outputs_together(llama: ModelHandle) -> None:
    row = {"format": "int", "bits": (4,), "groups": (32,), "out_multiple": 64}  # q, k and v: 64 + 32 + 32
    assert refusal(serving(schemes=(row,), fused_alike=True), llama, schemes_of(llama, others="w4a16g32")) is None


def test_a_quantized_head_is_refused_where_it_must_be_dense(llama: ModelHandle) -> None:
    schemes = schemes_of(llama, others="w4a16g32", lm_head="w4a16g32")
    assert refusal(serving(head=True), llama, schemes) is None
    assert refusal(serving(), llama, schemes) == (
        "lm_head: w4a16g32: the head must be dense; add it to ignore, or use another export"
    )


def test_experts_are_served_where_entry_and_row_say_so(tiny_model: TinyModel) -> None:
    model = handle(tiny_model("mixtral"))
    row = {"format": "int", "bits": (4,), "groups": (32,)}
    schemes = schemes_of(model, others="w4a16g32")
    assert refusal(serving(experts=True, schemes=(row | {"experts": True},)), model, schemes) is None
    why = refusal(serving(schemes=(row | {"experts": True},)), model, schemes)
    assert why is not None and "experts.gate_up.0: w4a16g32: experts must be dense; add *.experts.* to ignore" in why
    why = refusal(serving(experts=True, schemes=(row,)), model, schemes)
    assert why is not None and "experts.gate_up.0: w4a16g32: it belongs to an expert" in why
    dense = {name: scheme for name, scheme in schemes.items() if EXPERT.fullmatch(name) is None}
    assert refusal(serving(schemes=(row,)), model, dense) is None


def test_joined_linears_have_one_scheme(llama: ModelHandle) -> None:
    schemes = schemes_of(llama, others="w4a16g32", k_proj="w4a16g64")
    assert refusal(serving(), llama, schemes) is None
    assert refusal(serving(fused_alike=True), llama, schemes) == (
        f"{ATTENTION}: q_proj w4a16g32, k_proj w4a16g64, v_proj w4a16g32; it joins them as qkv_proj, which "
        "has one scheme: give them one"
    )
    others = schemes_of(llama, others="w4a16g32", down_proj="w4a16g64", o_proj="w4a16g64")
    assert refusal(serving(fused_alike=True), llama, others) is None


def test_joined_linears_are_dense_together_or_not_at_all(llama: ModelHandle) -> None:
    one = schemes_of(llama, others="w4a16g32", up_proj=None)
    both = schemes_of(llama, others="w4a16g32", up_proj=None, gate_proj=None)
    assert refusal(serving(fused_alike=True), llama, one) is None
    why = refusal(serving(fused_dense="whole"), llama, one)
    assert why is not None and "mlp: gate_proj w4a16g32, up_proj dense; it joins them as gate_up_proj" in why
    assert refusal(serving(fused_dense="whole"), llama, both) is None
    why = refusal(serving(fused_dense="never"), llama, both)
    assert why is not None and "gate_proj dense, up_proj dense; it joins them as gate_up_proj, which must be" in why
    assert refusal(serving(fused_dense="never"), llama, {}) is None


def test_a_scheme_that_must_stand_alone_is_refused_among_others(llama: ModelHandle) -> None:
    rows = (
        {"format": "int", "bits": (4,), "groups": (32,)},
        {"format": "int", "bits": (4,), "groups": (32,), "symmetric": (False,), "alone": True},
    )
    assert refusal(serving(schemes=rows), llama, schemes_of(llama, others="w4a16g32-asym")) is None
    why = refusal(serving(schemes=rows), llama, schemes_of(llama, others="w4a16g32", down_proj="w4a16g32-asym"))
    assert why is not None and why.endswith(
        "down_proj: w4a16g32-asym: all quantized linears must have this scheme, or none; give them one"
    )


def test_all_schemes_are_served_but_those_named(llama: ModelHandle) -> None:
    row = {"format": "e2m1", "bits": (4,), "groups": (32,), "scale_dtypes": ("float8_e8m0fnu",)}
    entry = serving(schemes=(), all_schemes=True, but=(row,))
    assert refusal(entry, llama, schemes_of(llama, others="w3a16g32-dq")) is None
    why = refusal(entry, llama, schemes_of(llama, others="w4a16g32", o_proj="mxfp4"))
    assert why is not None and "o_proj: mxfp4: it serves other schemes, not this one" in why


@pytest.mark.parametrize(
    ("export", "schemes", "runtimes"),
    [
        ("gptq", {"others": "w4a16g32"}, {"gptqmodel", "vllm"}),  # sglang: 64 inputs
        ("gptq", {"others": "w3a16g32"}, {"gptqmodel"}),
        ("gptq", {"others": "w4a16g32-asym"}, {"gptqmodel"}),
        ("awq", {"others": "w4a16g32-asym"}, {"gptqmodel", "mlx-lm", "transformers", "vllm"}),
        ("awq", {"others": "w4a16g16"}, {"gptqmodel", "transformers"}),
        ("compressed_tensors", {"others": "w4a16g32", "o_proj": "w4a16g32-asym"}, {"vllm"}),
        ("compressed_tensors", {"others": "w4a16g32", "k_proj": "w8a16g32"}, {"transformers"}),
        ("compressed_tensors", {"others": "nvfp4"}, {"sglang", "transformers", "vllm"}),
        ("compressed_tensors", {"others": "e4m3g32"}, {"transformers"}),
        ("bitsandbytes", {"others": "nf4g64-dq"}, {"transformers", "vllm"}),
        ("bitsandbytes", {"others": "nf4g64", "gate_proj": None, "up_proj": None}, {"transformers"}),
        ("gguf", {"others": "w4a16g32"}, {"llama.cpp"}),
        ("safetensors", {"others": "w3a16g32"}, {"sglang", "tensorrt-llm", "transformers", "vllm"}),
    ],
)
def test_what_the_table_says_of_a_small_llama(
    export: str, schemes: dict[str, str | None], runtimes: set[str], llama: ModelHandle
) -> None:
    found = servings(export, llama, schemes_of(llama, **schemes))
    assert {entry.runtime for entry, why in found if why is None} == runtimes
