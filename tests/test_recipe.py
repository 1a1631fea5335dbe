"""Recipes: the form, every problem with its line, extends, overrides, the digest, the schema."""

from pathlib import Path

import pytest
import yaml

from qtool import recipe, registry
from qtool.errors import RecipeError
from qtool.formats.scheme import SchemeSelection
from qtool.recipe import load, parse

RECIPES = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.yaml"))
EVALUATION = "  - evaluate/perplexity: {source: demo:test, samples: 4, length: 64}\n"
GOOD = f"""\
model: demo
seed: 3
pipeline:
  - calibrate/text: {{source: demo:calibration, samples: 8, length: 64}}
  - transform/smoothquant: {{alpha: 0.5}}
  - quantize/gptq: {{scheme: w4a16g128, ignore: [lm_head]}}
{EVALUATION}gates:
  perplexity: {{max_increase: 5%, max: 100}}
"""


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


def problems(text: str, overrides: list[str] | None = None) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        parse(text, "r.yaml", overrides or [])
    return caught.value.problems


def test_a_recipe_becomes_steps_with_their_methods_options_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    loaded = load(path)
    assert (loaded.model.path, loaded.seed, loaded.source) == ("demo", 3, path)
    assert [step.key for step in loaded.steps] == [
        "calibrate/text",
        "transform/smoothquant",
        "quantize/gptq",
        "evaluate/perplexity",
    ]
    assert [step.where for step in loaded.steps] == [f"{path}:{line}" for line in (4, 5, 6, 7)]
    assert all(isinstance(step.options, step.method.options) for step in loaded.steps)
    (gate,) = loaded.gates
    assert (gate.metric, gate.limits) == ("perplexity", {"max": 100.0, "max_increase": "5%"})


def test_six_mistakes_come_as_six_lines_in_one_error(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
model: demo
sed: 3
pipeline:
  - calibrate/text: {source: demo:calibration, lenght: 64}
  - transform/smoothquant: {alpha: 1.5}
  - quantize/gptq:
      scheme: w4a16g128
      act_order: dynamic
  - quantize/gtpq: {scheme: w4a16g128}
  - evaluate/perplexity: {source: demo:test}
gates:
  perplexity: {max_increas: 5%}
""",
    )
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert caught.value.problems == [
        f'{path}:2: there is no "sed"; did you mean "seed"?',
        f'{path}:4: calibrate/text: there is no "lenght"; did you mean "length"?',
        f"{path}:5: transform/smoothquant: alpha is 1.5; valid: number >= 0 and <= 1 or search",
        f'{path}:8: quantize/gptq: act_order is "dynamic"; valid: none, static, group',
        f'{path}:9: there is no method "quantize/gtpq"; did you mean "quantize/gptq"?',
        f'{path}:12: gates.perplexity: there is no "max_increas"; did you mean "max_increase"?',
    ]


@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("model: demo", "model: {path: demo, devise: cpu}", 1, 'there is no "devise"; did you mean "device"'),
        ("model: demo", "# no model", 2, "model is missing"),
        ("seed: 3", "seed: -1", 2, "seed is -1; valid: integer >= 0"),
        ("seed: 3", "seed: 3\nseed: 4", 3, '"seed" is written twice, first in line 2'),
        ("{alpha: 0.5}", "{alpha: 0.5, alpha: 0.6}", 5, '"alpha" is written twice, first in line 5'),
        ("{alpha: 0.5}", "{alpha: 0.5", 6, "(while parsing a flow mapping, begun in line 5)"),
        ("{alpha: 0.5}", "!!python/object:os.system {}", 5, "a tag (!) is not read"),
        ("{alpha: 0.5}", "!mine {alpha: 0.5}", 5, "a tag (!) is not read"),
        ("{alpha: 0.5}", "{alpha: !!python/name:os.system x}", 5, "a tag (!) is not read"),
        ("{alpha: 0.5}", "half", 5, 'transform/smoothquant: is "half"; must be a mapping of alpha'),
        ("{alpha: 0.5}", "{alpha: \x01}", 5, "the control character 0x1"),
        ("ignore: [lm_head]", "ignore: [*.down_proj]", 6, "put a name pattern in quotes"),
        ("ignore: [lm_head]", "ignore: [*down_proj]", 6, "put a name pattern in quotes"),
        ("ignore: [lm_head]", "ignore: lm_head", 6, 'ignore is "lm_head"; valid: a list of text'),
        ("w4a16g128", "w4g", 6, "write w<bits>a<bits>"),
        ("w4a16g128", "w9a16", 6, "scheme.weights.bits is 9; valid: integer >= 1 and <= 8"),
        ("w4a16g128", "{weights: {bits: 4, grup: 128}}", 6, 'scheme.weights: there is no "grup"; did you mean "group"'),
        ("w4a16g128", "w4a4kv4", 6, "step of its own, quantize/kivi: {key_bits: 4, value_bits: 4}; leave kv4 away"),
        ("scheme: w4a16g128, ", "", 6, "scheme is missing: shorthand such as w4a16g128"),
        ("source: demo:test, ", "", 7, "evaluate/perplexity: source is missing"),
        ("  - evaluate/perplexity: {", "  - evaluate/perplexity\n  - evaluate/perplexity: {", 7, "step 4 must be"),
        ("  - transform/smoothquant: {alpha: 0.5}", "  - {a/b: {}, c/d: {}}", 5, "step 2 must be one kind/method"),
        ("5%", "five", 9, "max_increase: must be a number, or a percentage"),
        ("5%", "-5%", 9, "max_increase: must be a number, or a percentage"),
        ("max: 100", "max: 5%", 9, 'max is "5%"; valid: number'),
        ("{max_increase: 5%, max: 100}", "{}", 9, "gates.perplexity: states no limit"),
        ("{max_increase: 5%, max: 100}", "5%", 9, "valid: a mapping of"),
        ("perplexity: {max_increase", "? [a]\n  : {max_increase", 9, "a key must be one word"),
        (EVALUATION, "", 7, "gates need an evaluate step"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_what_is_valid(old: str, new: str, line: int, says: str) -> None:
    assert old in GOOD
    found = problems(GOOD.replace(old, new, 1))
    assert any(text.startswith(f"r.yaml:{line}: ") and says in text for text in found), found


@pytest.mark.parametrize("text", ["", "- calibrate/text: {}\n", "just words\n"])
def test_what_is_no_mapping_is_no_recipe(text: str) -> None:
    assert "a recipe is a mapping with model and pipeline" in problems(text)[0]


def test_an_empty_pipeline_is_a_problem() -> None:
    assert any("pipeline is []" in text for text in problems("model: demo\npipeline: []\n"))


def test_a_file_that_is_missing_or_no_text_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: the file does not exist"):
        load(tmp_path / "nowhere.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read as UTF-8 text"):
        load(tmp_path / "bytes.yaml")


# ---- order ----


@pytest.mark.parametrize("key", ["transform/smoothquant", "quantize/gptq", "transform/fold_norms", "distill/logits"])
def test_a_step_that_needs_text_is_refused_before_calibration(key: str) -> None:
    scheme = "{scheme: w4a16g128}" if key.startswith("quantize") else "{}"
    text = f"model: demo\npipeline:\n  - {key}: {scheme}\n  - calibrate/text: {{source: demo:calibration}}\n"
    assert problems(text) == [f"r.yaml:3: {key} needs calibration text; put calibrate/text before it"]


def test_a_transform_of_single_linears_needs_no_text() -> None:
    text = "model: demo\npipeline:\n  - transform/deep_shape: {factor: 0.8}\n"
    assert [step.key for step in parse(text, "r.yaml").steps] == ["transform/deep_shape"]


def test_rounding_needs_text_only_where_its_range_does() -> None:
    text = "model: demo\npipeline:\n  - quantize/rtn: {scheme: w4a16g128, range: minmax}\n"
    assert [step.key for step in parse(text, "r.yaml").steps] == ["quantize/rtn"]
    assert "needs calibration text" in problems(text.replace("minmax", "output"))[0]


def test_a_second_calibration_is_a_problem_that_names_the_first() -> None:
    second = "  - calibrate/text: {source: demo:validation}\n  - quantize"
    assert problems(GOOD.replace("  - quantize", second, 1)) == [
        "r.yaml:6: calibrate/text: r.yaml:4 calibrates already; one step serves all"
    ]


def test_an_export_named_twice_is_a_problem() -> None:
    twice = "  - export/safetensors: {}\n  - export/safetensors: {}\ngates:"
    assert problems(GOOD.replace("gates:", twice)) == [
        f"r.yaml:{GOOD.count(chr(10), 0, GOOD.index('gates:')) + 2}: export/safetensors stands here a second time; "
        "both would write one folder"
    ]


TRAINED = "  - quantize/rtn: {scheme: w4a16}\n  - distill/logits: {}\n"


@pytest.mark.parametrize("before", ["", "  - prune/wanda: {}\n", TRAINED, TRAINED + "  - quantize/kivi: {}\n"])
def test_factorize_is_refused_where_nothing_was_quantized_right_before(before: str) -> None:
    text = "model: demo\npipeline:\n  - calibrate/text: {source: demo:calibration}\n" + before + "  - factorize/lorc: {}\n"
    message = "factorize/lorc makes up for what quantization took; put it right after a quantize step"
    assert problems(text) == [f"r.yaml:{text.count(chr(10))}: {message}"]


def test_a_rotation_after_pruning_is_refused() -> None:
    text = "model: demo\npipeline:\n  - prune/magnitude: {sparsity: 0.5}\n  - transform/hadamard: {}\n"
    assert problems(text) == [
        "r.yaml:4: transform/hadamard mixes weights, so that no zero of a pruned one (r.yaml:3) would stay; put it first"
    ]


@pytest.mark.parametrize("step", ["quantize/rtn: {scheme: w8a8}", "quantize/kv_cache: {}"])
def test_a_transform_of_blocks_comes_before_whatever_rounds(step: str) -> None:
    steps = f"  - calibrate/text: {{source: demo:calibration}}\n  - {step}\n  - transform/smoothquant: {{}}\n"
    text = "model: demo\npipeline:\n" + steps
    assert problems(text) == [
        "r.yaml:5: transform/smoothquant must leave what blocks compute as it is, which rounding (r.yaml:4) hides; "
        "put it before"
    ]


@pytest.mark.parametrize("step", ["quantize/gptq: {scheme: w4}", "quantize/gptk: {}"])
def test_a_broken_quantize_step_is_one_problem_not_one_more_for_factorize(step: str) -> None:
    text = f"model: demo\npipeline:\n  - calibrate/text: {{source: demo:calibration}}\n  - {step}\n  - factorize/lorc: {{}}\n"
    assert [problem[:8] for problem in problems(text.replace("w4}", "w99}"))] == ["r.yaml:4"]


def test_factorize_may_follow_several_quantize_steps_and_measurements() -> None:
    quantize = "  - quantize/rtn: {scheme: w8a16, ignore: [mlp.*]}\n  - quantize/rtn: {scheme: w4a16, ignore: [attn.*]}\n"
    rest = EVALUATION + "  - factorize/lorc: {weighting: plain}\n  - export/safetensors: {}\n"
    assert len(parse("model: demo\npipeline:\n" + quantize + rest, "r.yaml").steps) == 5


def test_an_export_that_cannot_hold_low_rank_factors_is_refused_after_factorize() -> None:
    steps = "  - quantize/rtn: {scheme: w8a16}\n{}  - factorize/lorc: {weighting: plain}\n{}"
    export = "  - export/compressed_tensors: {}\n"
    after = problems("model: demo\npipeline:\n" + steps.replace("{}", "", 1).replace("{}", export))
    assert after == [
        "r.yaml:5: export/compressed_tensors cannot hold the low-rank factors of factorize/lorc; use export/qtool or "
        "export/safetensors"
    ]
    assert parse("model: demo\npipeline:\n" + steps.replace("{}", export, 1).replace("{}", ""), "r.yaml").steps


# ---- values ----


SEARCH = "  - search/mixed_precision: {budget: 4.5, candidates: [w3a16g128, w8a16g128]}\n"
SEARCHED = GOOD.replace("  - quantize", SEARCH + "  - quantize").replace("scheme: w4a16g128", "scheme: search")


def test_schemes_of_a_search_are_asked_for_after_it() -> None:
    steps = parse(SEARCHED, "r.yaml").steps
    options = steps[3].options
    assert isinstance(options, SchemeSelection) and options.scheme == "search"
    assert parse(parse(SEARCHED, "r.yaml").to_yaml(), "again.yaml").digest == parse(SEARCHED, "r.yaml").digest


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (SEARCH, "", "r.yaml:6: quantize/gptq: scheme is search, but no search step stands before it"),
        ("  - calibrate", "  # - calibrate", "r.yaml:6: search/mixed_precision needs calibration text; put calibrate/text"),
        (SEARCH, f"  - quantize/rtn: {{scheme: w4a16}}\n{SEARCH}", "r.yaml:7: search/mixed_precision chooses schemes of dense"),
        ("w3a16g128, ", "w3a16kv8, ", "r.yaml:6: search/mixed_precision: candidates: w3a16kv8: the cache is a step of its own"),
        ("w3a16g128, ", "", "r.yaml:6: search/mixed_precision: candidates: there is nothing to choose from"),
        ("w3a16g128, ", "search, ", 'r.yaml:6: search/mixed_precision: candidates.0: "search" is no scheme'),
        ("search/mixed_precision", "search/mixed", 'r.yaml:6: there is no method "search/mixed"; did you mean "search/'),
    ],
)
def test_a_search_that_cannot_be_says_why(old: str, new: str, expected: str) -> None:
    assert old in SEARCHED
    found = problems(SEARCHED.replace(old, new, 1))
    assert found[0 if old != "  - calibrate" else 1].startswith(expected), found


def test_shorthand_and_long_form_of_a_scheme_are_the_same_recipe() -> None:
    long = "{weights: {bits: 4, group: 128, symmetric: true}}"
    assert parse(GOOD, "a").digest == parse(GOOD.replace("w4a16g128", long), "b").digest


def test_a_model_as_a_word_is_its_path() -> None:
    assert parse(GOOD, "a").digest == parse(GOOD.replace("model: demo", "model: {path: demo}"), "b").digest


def test_a_step_without_options_may_be_null_or_empty() -> None:
    for options in ("", " {}", " null"):
        text = GOOD.replace("gates:", f"  - export/safetensors:{options}\ngates:")
        assert parse(text, "r.yaml").steps[-1].key == "export/safetensors"


def test_numbers_with_an_exponent_and_words_with_colons_mean_what_they_look_like() -> None:
    text = GOOD.replace("{alpha: 0.5}", "{alpha: 1e-1}")
    loaded = parse(text, "r.yaml", ["model.revision=2024-01-01"])
    assert loaded.steps[1].options.model_dump() == {"alpha": 0.1, "scheme": None}
    assert loaded.model.revision == "2024-01-01"
    assert parse(text, "r.yaml", ["model.revision=2:4"]).model.revision == "2:4"


def test_module_patterns_keep_their_order_and_the_first_match_wins() -> None:
    modules = 'modules: {"*.down_proj": w8a16, "*": w3a16}'
    loaded = parse(GOOD.replace("ignore: [lm_head]", modules), "r.yaml")
    options = loaded.steps[2].options
    assert isinstance(options, SchemeSelection)
    assert str(options.scheme_of("model.layers.0.mlp.down_proj")) == "w8a16"
    assert str(options.scheme_of("model.layers.0.mlp.up_proj")) == "w3a16"
    turned = parse(GOOD.replace("ignore: [lm_head]", 'modules: {"*": w3a16, "*.down_proj": w8a16}'), "r.yaml")
    assert turned.digest != loaded.digest


# ---- digest and resolved form ----


def test_the_resolved_recipe_spells_out_defaults_and_loads_to_the_same_digest() -> None:
    loaded = parse(GOOD, "r.yaml")
    again = parse(loaded.to_yaml(), "resolved.yaml")
    assert again.digest == loaded.digest
    assert yaml.safe_load(loaded.to_yaml())["pipeline"][2]["quantize/gptq"]["damp"] == 0.01


def test_comments_and_spelled_out_defaults_do_not_change_the_digest_but_values_do() -> None:
    digest = parse(GOOD, "r.yaml").digest
    assert parse("# a comment\n" + GOOD, "other").digest == digest
    assert parse(GOOD, "r.yaml", ["pipeline.quantize/gptq.damp=0.01"]).digest == digest
    assert parse(GOOD, "r.yaml", ["pipeline.quantize/gptq.damp=0.02"]).digest != digest
    assert parse(GOOD, "r.yaml", ["seed=4"]).digest != digest
    assert parse(GOOD, "r.yaml", ["gates.perplexity={max: 7}"]).digest != digest


def test_a_default_pattern_need_not_match_even_when_the_resolved_recipe_spells_it_out() -> None:
    selection = parse(GOOD, "r.yaml").steps[2].options
    assert isinstance(selection, SchemeSelection)
    assert selection.patterns() == ()
    written = SchemeSelection.model_validate({"scheme": "w4a16", "ignore": ["lm_head", "*.nothing"]})
    assert written.patterns() == ("*.nothing",)


# ---- overrides ----


def test_an_override_names_a_step_by_kind_and_method_or_by_its_number_from_1() -> None:
    for path in ("pipeline.transform/smoothquant.alpha", "pipeline.2.alpha"):
        assert parse(GOOD, "r.yaml", [f"{path}=0.7"]).steps[1].options.model_dump() == {"alpha": 0.7, "scheme": None}


def test_overrides_reach_model_seed_gates_and_options_that_the_file_leaves_out() -> None:
    loaded = parse(
        GOOD,
        "r.yaml",
        [
            "model=/models/mine",
            "model.device=cpu",
            "seed=9",
            "gates.bits_per_byte.min=0.9",
            "pipeline.calibrate/text.source=FILE.jsonl",
            "pipeline.quantize/gptq.ignore=[lm_head, '*.down_proj']",
            "pipeline.4={source: demo:validation}",
        ],
    )
    assert (loaded.model.path, loaded.model.device, loaded.seed) == ("/models/mine", "cpu", 9)
    assert [gate.metric for gate in loaded.gates] == ["perplexity", "bits_per_byte"]
    resolved = loaded.resolved()["pipeline"]
    assert resolved[0]["calibrate/text"]["source"] == "FILE.jsonl" and resolved[0]["calibrate/text"]["samples"] == 8
    assert resolved[2]["quantize/gptq"]["ignore"] == ["lm_head", "*.down_proj"]
    assert resolved[3]["evaluate/perplexity"]["source"] == "demo:validation"
    assert resolved[3]["evaluate/perplexity"]["samples"] is None


def test_an_empty_override_is_null() -> None:
    loaded = parse(GOOD, "r.yaml", ["pipeline.evaluate/perplexity.samples="])
    assert loaded.steps[3].options.model_dump()["samples"] is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("seed", "must be path=value"),
        ("=3", "must be path=value"),
        ("seed=x", 'seed is "x"; valid: integer'),
        ("seed=[1", "no valid YAML"),
        ("sede=3", 'there is no "sede"; did you mean "seed"'),
        ("model.devise=cpu", 'there is no "devise"; did you mean "device"'),
        ("pipeline.transform/smothquant.alpha=1", 'no step transform/smothquant; did you mean "transform/smoothquant"'),
        ("pipeline.9.alpha=1", "the pipeline has no step 9; it has 1. calibrate/text, 2. transform/smoothquant"),
        ("pipeline.0.alpha=1", "the pipeline has no step 0"),
        ("pipeline.2.alhpa=1", 'transform/smoothquant: there is no "alhpa"; did you mean "alpha"'),
        ("pipeline.2.alpha=7", "alpha is 7; valid: number >= 0 and <= 1"),
        ("seed.deep=1", "seed is no mapping that could hold deep"),
    ],
)
def test_a_wrong_override_is_a_problem_with_the_override_as_its_place(override: str, says: str) -> None:
    found = problems(GOOD, [override])
    assert len(found) == 1 and found[0].startswith(f"--set {override}: ") and says in found[0], found


def test_an_override_of_a_step_that_stands_twice_asks_for_its_number() -> None:
    text = GOOD.replace(EVALUATION, EVALUATION * 2)
    found = problems(text, ["pipeline.evaluate/perplexity.length=32"])
    assert "2 times; name it by its number" in found[0]
    steps = parse(text, "r.yaml", ["pipeline.5.length=32"]).steps
    assert [step.options.model_dump().get("length") for step in steps] == [64, None, None, 64, 32]


# ---- extends ----


def test_a_child_changes_options_adds_steps_where_they_stand_and_keeps_the_rest(tmp_path: Path) -> None:
    write(tmp_path, GOOD, "parent.yaml")
    child = write(
        tmp_path,
        """\
extends: parent.yaml
model: {path: demo, dtype: float32}
pipeline:
  - calibrate/text: {samples: 16}
  - transform/fold_norms: {}
  - quantize/gptq: {damp: 0.05}
gates:
  bits_per_byte: {min: 0.5}
""",
        "child.yaml",
    )
    loaded = load(child)
    assert [step.key for step in loaded.steps] == [
        "calibrate/text",
        "transform/fold_norms",
        "transform/smoothquant",
        "quantize/gptq",
        "evaluate/perplexity",
    ]
    resolved = loaded.resolved()["pipeline"]
    assert (resolved[0]["calibrate/text"]["samples"], resolved[0]["calibrate/text"]["length"]) == (16, 64)
    assert resolved[3]["quantize/gptq"]["damp"] == 0.05
    assert (loaded.seed, loaded.model.dtype) == (3, "float32")
    assert [gate.metric for gate in loaded.gates] == ["perplexity", "bits_per_byte"]


def test_a_new_step_at_the_head_of_a_child_comes_last_and_a_model_as_a_word_replaces_all(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace("model: demo", "model: {path: demo, dtype: float32}"), "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\nmodel: other\npipeline:\n  - export/safetensors:\n", "child.yaml")
    loaded = load(child)
    assert loaded.steps[-1].key == "export/safetensors"
    assert (loaded.model.path, loaded.model.dtype) == ("other", "auto")


def test_problems_in_a_parent_bear_the_parents_lines_and_those_of_the_child_its_own(tmp_path: Path) -> None:
    parent = write(tmp_path, GOOD.replace("samples: 8", "samples: 0"), "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\npipeline:\n  - quantize/gptq: {damp: 7}\n", "child.yaml")
    with pytest.raises(RecipeError) as caught:
        load(child)
    places = [text.split(": ")[0] for text in caught.value.problems]
    assert places == [f"{child}:3", f"{parent}:4"]


def test_a_circle_a_missing_parent_and_a_list_of_parents_are_problems(tmp_path: Path) -> None:
    write(tmp_path, "extends: b.yaml\n" + GOOD, "a.yaml")
    write(tmp_path, "extends: a.yaml\n" + GOOD, "b.yaml")
    with pytest.raises(RecipeError, match=r"b\.yaml:1: extends a\.yaml, which extends this file: a circle"):
        load(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"c\.yaml:1: extends gone\.yaml, but the file"):
        load(write(tmp_path, "extends: gone.yaml\n" + GOOD, "c.yaml"))
    with pytest.raises(RecipeError, match="the name of one other recipe"):
        load(write(tmp_path, "extends: [a.yaml]\n" + GOOD, "d.yaml"))


def test_a_child_cannot_change_a_step_that_stands_twice(tmp_path: Path) -> None:
    write(tmp_path, GOOD.replace(EVALUATION, EVALUATION * 2), "parent.yaml")
    child = write(tmp_path, "extends: parent.yaml\npipeline:\n  - evaluate/perplexity: {length: 8}\n", "child.yaml")
    with pytest.raises(RecipeError, match=r"child\.yaml:3: evaluate/perplexity stands 2 times"):
        load(child)


# ---- what ships ----


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is_for_and_what_it_costs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"# {path.name}: ") and "\n# For: " in text and "\n# Costs: " in text
    loaded = load(path)
    assert parse(loaded.to_yaml(), "resolved").digest == loaded.digest


def test_at_least_ten_recipes_ship() -> None:
    assert len(RECIPES) >= 10


def test_the_schema_names_every_method_and_every_option_of_the_recipes_that_ship() -> None:
    schema = recipe.schema()
    steps = schema["properties"]["pipeline"]["items"]["properties"]
    assert steps.keys() == registry.list_methods().keys()
    assert set(schema["properties"]) == {"model", "seed", "pipeline", "gates", "extends"}
    for path in RECIPES:
        for entry in yaml.safe_load(path.read_text(encoding="utf-8")).get("pipeline", []):
            ((key, options),) = entry.items()
            definition = schema["$defs"][steps[key]["anyOf"][0]["$ref"].rsplit("/", 1)[-1]]
            assert definition["additionalProperties"] is False
            assert set(options or {}) <= set(definition["properties"])


def test_every_reference_in_the_schema_leads_somewhere() -> None:
    schema = recipe.schema()

    def references(value: object) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [found for part in value.values() for found in references(part)]
        return [found for part in value for found in references(part)] if isinstance(value, list) else []

    found = references(schema)
    assert found and {name.removeprefix("#/$defs/") for name in found} <= schema["$defs"].keys()


def test_the_schema_lets_a_word_stand_for_a_model_and_a_scheme() -> None:
    definitions = recipe.schema()["$defs"]
    for name in ("ModelOptions", "Scheme"):
        assert {"type": "string"} in definitions[name]["anyOf"]


@pytest.mark.parametrize(
    ("gate", "refused"),
    [
        ("perplexty: {max: 9}", 'gates: no evaluate step measures "perplexty"; did you mean "perplexity"?'),
        ("perplexity: {significance: 2}", "gates.perplexity: states no limit; valid: max, min, max_increase, max_drop, ba"),
        ("perplexity: {baseline: {results: a.json}}", "states no limit; valid: max_increase, max_drop"),
        ("perplexity: {max: 9, significance: -1}", "gates.perplexity.significance is -1; valid: number >= 0 or null"),
    ],
)
def test_a_gate_that_can_judge_nothing_is_refused_before_any_work(gate: str, refused: str) -> None:
    text = GOOD[: GOOD.index("gates:")] + f"gates:\n  {gate}\n"
    with pytest.raises(RecipeError) as raised:
        parse(text, "r.yaml")
    assert refused in str(raised.value)


def test_all_of_a_gate_is_in_the_resolved_recipe() -> None:
    stated = "{max: 9, significance: 2, dataset: 'demo:test', baseline: {results: a.json, max_increase: 1%}}"
    loaded = parse(GOOD[: GOOD.index("gates:")] + f"gates:\n  perplexity: {stated}\n", "r.yaml")
    assert parse(loaded.to_yaml(), "r.yaml").gates == loaded.gates
    assert loaded.gates[0].significance == 2 and loaded.gates[0].baseline is not None
