"""scripts/bench_inputs.py: every row of qtool's is a recipe, and what peers' runners believe is checked and measured right."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from qtool import registry
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.recipe import parse

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
TEXT = {"source": "demo:validation", "samples": 3, "length": 32}


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """The script, which brings peers/peer_job.py and bench_rows.py with it."""
    before = list(sys.path)
    sys.path.insert(0, str(SCRIPTS))
    import bench_inputs

    yield bench_inputs
    sys.path[:] = before


def job_of(bench: ModuleType, folder: Path, out: Path, **fields: object) -> object:
    plain = {"method": "rtn", "format": "int", "bits": 4, "group": None, "symmetric": True, "inputs": "int4", "options": {}}
    return bench.peer_job.parse_job({"model": str(folder), "tokens": "", "out": str(out), **plain, **fields})


def test_every_row_of_qtools_is_a_recipe(bench: ModuleType) -> None:
    n_rows = 0
    for scheme, methods in bench.STUDY.items():
        for method, tools in methods.items():
            if "qtool" not in tools.split() or (steps := bench.qtool_steps(scheme, method)) is None:
                continue
            n_rows += 1
            pipeline = [{"calibrate/text": TEXT}, *steps]
            recipe = parse(yaml.safe_dump({"model": "demo", "pipeline": pipeline}), f"{scheme} {method}")
            assert ("quantize/kivi" in [step.key for step in recipe.steps]) == ("kv" in scheme)
    assert n_rows >= 25


def test_windows_are_measured_as_qtool_measures_them(
    bench: ModuleType, tmp_path: Path, tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    folder = tiny_model("llama")
    original, model = ModelHandle(ModelOptions(path=str(folder))), quantized(folder, "w4a4")
    tokens = read_tokens(TextOptions.model_validate(TEXT | {"shuffle": False}), original.tokenizer, 0)
    found = {}
    for name in ("kl_divergence", "perplexity"):
        method = registry.load(f"evaluate/{name}")
        found[name] = method.run(model, original, method.options.model_validate(TEXT), 0)[0].value
    bench.peer_job.write_reference(ModelHandle(original.options).take(), tokens, tmp_path / "reference.safetensors")
    whole = ModelHandle(model.options, model.changes).take()
    losses, divergences = bench.peer_job.measure_windows(whole, tmp_path / "reference.safetensors")
    row = bench.Row("w4a4", "rtn", "qtool", "", losses=losses, divergences=divergences)
    assert row.kl == pytest.approx(found["kl_divergence"], rel=1e-4)  # float32 sums in another order
    assert row.perplexity == pytest.approx(found["perplexity"], rel=1e-5)


def test_inputs_that_are_not_rounded_are_found_out(
    bench: ModuleType, tmp_path: Path, tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    folder, sample = tiny_model("llama"), torch.arange(2, 34)
    schemes = {"int4": "w4a4", "int8": "w4a8", "e4m3": "w4-ae4m3", "nvfp4": "w4-anvfp4", "mxfp4": "w4-amxfp4", "": "w4a16"}
    for rounded, scheme in schemes.items():
        handle = quantized(folder, scheme)
        linears, model = list(handle.schemes()), handle.take()
        if rounded:
            bench.peer_job.check_products(job_of(bench, folder, tmp_path, inputs=rounded), model, linears, sample)
        for asked in {"int4", "mxfp4"} - {rounded}:
            with pytest.raises(SystemExit):
                bench.peer_job.check_products(job_of(bench, folder, tmp_path, inputs=asked), model, linears, sample)


def test_weights_on_more_levels_than_the_job_has_are_found_out(
    bench: ModuleType, tmp_path: Path, tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    handle = quantized(tiny_model("llama"), "w6a4")
    linears, model = list(handle.schemes()), handle.take()
    bench.peer_job.check_products(job_of(bench, handle.folder, tmp_path, bits=6), model, linears, torch.arange(2, 34))
    with pytest.raises(SystemExit):
        bench.peer_job.check_products(job_of(bench, handle.folder, tmp_path), model, linears, torch.arange(2, 34))


def test_a_group_is_on_levels_under_any_scale_of_either_sign(bench: ModuleType) -> None:
    levels = torch.arange(9.0)
    values = torch.tensor([[1.0, -7.0, 0.0, 4.0], [2.0, 2.0, 6.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 2.5, 8.0, 0.0]])
    scaled = values * torch.tensor([[0.37], [-1e-6], [1.0], [3.0]])
    assert bench.peer_job.on_levels(scaled, levels).tolist() == [True, True, True, False]


def test_rows_come_back_from_their_file_and_ratios_pair_windows(bench: ModuleType, tmp_path: Path) -> None:
    import bench_rows

    same = {"peak_rss_gib": 1.0, "losses": [1.0, 2.0]}
    ours = bench.Row("w4a4", "rtn", "qtool", "d", seconds=1.0, divergences=[0.1, 0.3], **same)
    theirs = bench.Row("w4a4", "rtn", "llmcompressor", "d", seconds=2.0, divergences=[0.2, 0.6], **same)
    bench_rows.write_rows(tmp_path / "rows.json", [theirs, ours])
    back = bench_rows.sort_rows(bench_rows.read_rows(tmp_path / "rows.json"), bench.STUDY)
    assert back == [ours, theirs]  # in the study's order
    assert "| w4a4 | rtn | llmcompressor rtn | 0.500 ± 0.000 | 0.5 | 1 |" in bench.ratios(back)
    cached = bench.Row("w4a4kv4", "rtn", "qtool", "d", seconds=1.0, divergences=[0.2, 0.3], **same)
    assert "| w4a4kv4 | rtn | qtool rtn w4a4 | 1.250" in bench.ratios([*back, cached], {"w4a4kv4": "w4a4"})
