"""distributions.json: it counts what a plain loop over the matrices counts; going on and repeating give the same bits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.layers.quant_linear import QuantLinear
from qtool.linalg.histogram import BINS, level_edges
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions
from qtool.pipeline import distributions
from qtool.pipeline.distributions import measure_distributions
from qtool.pipeline.run import run_recipe
from qtool.progress import Progress, Silent
from qtool.recipe import parse

TEXT = "{source: demo:calibration, samples: 4, length: 32}"


def run(model: Path, out: Path, *steps: str, progress: Progress | None = None) -> list[dict[str, Any]]:
    """The entries of distributions.json of a run of these steps."""
    pipeline = "".join(f"  - {step}\n" for step in steps)
    run_recipe(parse(f"model: {model}\npipeline:\n{pipeline}", "test"), out, progress or Silent())
    found: list[dict[str, Any]] = json.loads((out / "distributions.json").read_text())["linears"]
    return found


def only(rows: list[dict[str, Any]], block: int, kind: str) -> dict[str, Any]:
    (row,) = [row for row in rows if (row["block"], row["kind"]) == (block, kind)]
    return row


def test_transforms_show_in_weights_and_inputs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    steps = (f"calibrate/text: {TEXT}", "transform/smoothquant: {alpha: 0.5}", "quantize/rtn: {scheme: w4a16g32}")
    rows = run(folder, tmp_path / "run", *steps)
    assert len(rows) == 14
    row = only(rows, 1, "self_attn.q_proj")
    assert row["weights"].keys() == row["inputs"].keys() == {"original", "transformed"}
    assert row["weights"]["original"] != row["weights"]["transformed"]
    assert row["inputs"]["transformed"]["channel_ratio"] < row["inputs"]["original"]["channel_ratio"]

    model = ModelHandle(ModelOptions(path=str(folder)))
    options = TextOptions(source="demo:calibration", samples=4, length=32)
    hidden, seen = model.embed(read_tokens(options, model.tokenizer, 0)), list[torch.Tensor]()
    with model.materialized() as module:
        norm = module.get_submodule("model.layers.1.input_layernorm")
        norm.register_forward_hook(lambda module, args, out: seen.append(out.flatten(0, 1)))
        module(read_tokens(options, model.tokenizer, 0))
    amax = torch.cat(seen).abs().amax(0).sort().values  # [hidden]
    assert hidden.shape == (4, 32, 64) and sum(row["inputs"]["original"]["counts"]) == 4 * 32 * 64
    # Summed in batches and all at once, float32 sums differ in their last digits; the fourth is shown.
    assert row["inputs"]["original"]["channels"] == pytest.approx(amax.tolist(), rel=1e-3)


def test_weights_are_counted_in_units_of_the_grid_that_they_are_rounded_to(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    rows = run(folder, tmp_path / "run", "quantize/rtn: {scheme: w4a16g32-asym}")
    row = only(rows, 0, "mlp.up_proj")
    assert row["inputs"] == {} and row["weights"].keys() == {"original"}
    grid = row["grid"]
    assert (grid["scheme"], grid["range"], grid["levels"]) == ("w4a16g32-asym", [-1.875, 16.875], [float(n) for n in range(16)])

    model = ModelHandle(ModelOptions(path=str(folder)))
    block = model.block(0)
    W = weight_of(block.get("model.layers.0.mlp.up_proj"))
    changed = ModelHandle(model.options, (next((tmp_path / "run" / "state").glob("*rtn")),))
    tensor = changed.unit_changes("block_000")["model.layers.0.mlp.up_proj.weight"][0]  # type: ignore[index]
    counts, used = [0] * BINS, [0] * 16
    edges = level_edges(-1.875, 16.875)
    for i in range(W.shape[0]):
        for j in range(W.shape[1]):
            u = float(W[i, j] / tensor.scale[i, j // 32].float() + tensor.zero[i, j // 32].float())
            counts[sum(edge <= u for edge in edges[1:-1])] += 1
            used[int(tensor.codes[i, j])] += 1
    assert grid["used"] == used
    # A value on a border may fall to either side of it: u is one float32 division, the border one of float64.
    assert sum(abs(a - b) for a, b in zip(grid["counts"], counts, strict=True)) <= 4


@pytest.mark.parametrize("scheme", ["w4a4", "w8a8static"])
def test_inputs_are_counted_in_units_of_the_grid_that_they_are_rounded_to(
    scheme: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    steps = [f"calibrate/text: {TEXT}", f"quantize/rtn: {{scheme: {scheme.removesuffix('static')}}}"]
    rows = run(folder, tmp_path / "run", *steps, *(["quantize/inputs: {}"] if "static" in scheme else []))
    grid = only(rows, 1, "mlp.down_proj")["input_grid"]
    low, high = grid["range"]
    model = ModelHandle(ModelOptions(path=str(folder)))
    name, seen = "model.layers.1.mlp.down_proj", list[torch.Tensor]()
    with model.materialized() as module, torch.no_grad():
        module.get_submodule(name).register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
        module(read_tokens(TextOptions(source="demo:calibration", samples=4, length=32), model.tokenizer, 0))
    (x,) = seen  # [tokens, in]
    changed = ModelHandle(model.options, tuple(sorted((tmp_path / "run" / "state").glob("*quantize*"))))
    layer = changed.block(1).get(name)
    assert isinstance(layer, QuantLinear) and layer.activations is not None and grid["scheme"] == str(layer.activations)
    counts, edges = [0] * BINS, level_edges(low, high)
    for token in x.float():
        s = float(layer.activations.grid.fit(token).scale) if layer.inputs is None else float(layer.inputs.scale.float())
        for value in token.tolist():
            counts[sum(edge <= value / s for edge in edges[1:-1])] += 1
    # A value on a border may fall to either side of it: of these 16 thousand a handful lies that near to one.
    assert sum(grid["counts"]) == sum(counts) == x.numel()
    assert sum(abs(a - b) for a, b in zip(grid["counts"], counts, strict=True)) <= 16
    assert (grid["levels"] == []) is ("8" in scheme)


def test_weights_alone_have_no_grid_of_inputs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    rows = run(tiny_model("llama"), tmp_path / "run", f"calibrate/text: {TEXT}", "quantize/rtn: {scheme: w4a16g32}")
    assert not any("input_grid" in row for row in rows)


@pytest.mark.parametrize("family", ["gpt2", "opt", "mixtral", "gemma3"])
def test_every_family_is_measured_and_experts_count_together(
    family: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    steps = (f"calibrate/text: {TEXT}", "quantize/rtn: {scheme: nf4g32}")
    rows = run(tiny_model(family), tmp_path / "run", *steps)
    assert {row["block"] for row in rows} == {0, 1} and all(row["inputs"] and row["grid"]["used"] for row in rows)
    if family == "mixtral":
        (row,) = (row for row in rows if row["block"] == 0 and re.search(r"experts\..*down", row["kind"]))
        assert sum(row["grid"]["used"]) == sum(row["weights"]["original"]["counts"]) == 4 * 64 * 128


def test_everything_that_may_stand_beside_codes_is_measured(featured: ModelHandle) -> None:
    original = ModelHandle(featured.options)
    rows = measure_distributions(original, original, featured, None, Silent())
    schemes = {f"{row['block']}.{row['kind']}": row["grid"]["scheme"] for row in rows if "grid" in row}
    assert len(schemes) == 13 and schemes["0.mlp.gate_proj"] == "nvfp4"
    for row in rows:
        if "grid" not in row:
            assert (row["block"], row["kind"]) == (1, "mlp.down_proj")
            continue
        grid, shown = row["grid"], sum(row["weights"]["original"]["counts"])
        left_out = 4 * 128 if (row["block"], row["kind"]) == (1, "mlp.gate_proj") else 0  # its salient columns
        assert sum(grid["counts"]) in (shown, shown - left_out)
        assert not grid["levels"] or sum(grid["used"]) in (shown, shown - left_out)
        outside = (grid["counts"][0] + grid["counts"][-1]) / sum(grid["counts"])
        most = 0.15 if grid["scheme"][:2] in ("bi", "te") else 0.05  # a scale by the mean magnitude leaves an eighth outside
        assert outside < most, row  # it is the grid that the weights were fitted to


def test_a_large_matrix_is_counted_by_rows_at_even_distances(
    tiny_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributions, "N_WEIGHTS", 1024)
    row = only(run(tiny_model("llama"), tmp_path / "run", "quantize/rtn: {scheme: w4a16g32}"), 0, "mlp.up_proj")
    counted = [sum(row["weights"]["original"]["counts"]), sum(row["grid"]["counts"]), sum(row["grid"]["used"])]
    assert counted == [1024, 1024, 1024]  # 16 of 128 rows of 64


def test_a_run_that_was_interrupted_while_it_measured_ends_with_the_same_bits(
    tiny_model: Callable[..., Path], tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    folder = tiny_model("llama")
    steps = (f"calibrate/text: {TEXT}", "transform/smoothquant: {}", "quantize/rtn: {scheme: w4a16g32}")
    run(folder, tmp_path / "whole", *steps)
    with pytest.raises(KeyboardInterrupt):
        run(folder, tmp_path / "parts", *steps, progress=interrupted(1 + 2 + 2 + 3))  # the third block of four
    assert not (tmp_path / "parts" / "distributions.json").exists()
    run(folder, tmp_path / "parts", *steps)
    run(folder, tmp_path / "parts", *steps)  # and once more, all being there
    whole, parts = ((tmp_path / name / "distributions.json").read_bytes() for name in ("whole", "parts"))
    assert whole == parts


def test_a_run_that_changes_nothing_has_no_distributions(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    recipe = (
        f"model: {tiny_model('llama')}\npipeline:\n  - evaluate/perplexity: {{source: demo:test, samples: 2, length: 16}}\n"
    )
    results = run_recipe(parse(recipe, "test"), tmp_path / "run", Silent())
    assert not (tmp_path / "run" / "distributions.json").exists()
    assert [stage["name"] for stage in results["stages"]] == ["evaluate/perplexity"]
