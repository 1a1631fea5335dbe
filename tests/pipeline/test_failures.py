"""What goes wrong outside qtool gives one clear error, and nothing that looks finished."""

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from qtool.errors import QtoolError
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, object]]:
    """Runs a short recipe on a model folder."""

    def carry_out(model: Path, *overrides: str, out: Path | None = None) -> dict[str, object]:
        steps = [
            {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}},
            {"quantize/gptq": {"scheme": "w4a16g32"}},
            {"export/safetensors": None},
        ]
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(model), "pipeline": steps}))
        return run_recipe(load(path, list(overrides)), out or tmp_path / "out", Silent())

    return carry_out


def test_nan_in_a_weight_names_the_tensor(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    folder = tiny_model("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QtoolError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds 1 NaN"):
        run(folder)


def test_a_truncated_file_is_named(tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path) -> None:
    folder = tiny_model("llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(QtoolError, match=r"model\.safetensors is truncated"):
        run(folder)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_missing_tensor_is_named(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    folder = tiny_model("llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QtoolError, match=r"no tensor model\.layers\.0\.self_attn\.k_proj\.weight"):
        run(folder)


def test_a_pickled_checkpoint_is_refused(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    folder = tiny_model("llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(QtoolError, match="a pickle that could run code"):
        run(folder)


def test_a_text_that_is_too_short_says_how_much_there_is(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    with pytest.raises(QtoolError, match=r"gives \d+ windows .* 9999 windows of 512 tokens are asked for"):
        run(tiny_model("llama"), "pipeline.calibrate/text.samples=9999", "pipeline.calibrate/text.length=512")


def test_a_folder_that_cannot_be_written_is_an_error(
    tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(QtoolError, match="cannot be written"):
        run(tiny_model("llama"), out=tmp_path / "file" / "out")


def test_a_full_disk_leaves_no_half_written_file(
    tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path
) -> None:
    folder = tiny_model("llama")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # the system refuses longer files, as a full disk would
    try:
        with pytest.raises(QtoolError, match="cannot write block_000.safetensors.*free space"):
            run(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    out = tmp_path / "out"
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("*.safetensors"))
    assert run(folder)["status"] == "done"  # and the same command goes on once there is room


def test_a_pattern_that_matches_nothing_stops_before_any_work(
    tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path
) -> None:
    with pytest.raises(QtoolError, match=r'recipe\.yaml:\d+: .*pattern "mlp.gatee_proj" matches no linear'):
        run(tiny_model("llama"), "pipeline.quantize/gptq.ignore=[mlp.gatee_proj]")
    assert not list((tmp_path / "out" / "state").glob("0*"))


def test_groups_that_do_not_divide_stop_before_any_work(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    with pytest.raises(QtoolError, match="64 columns do not divide into groups of 96; use 32, 64"):
        run(tiny_model("llama"), "pipeline.quantize/gptq.scheme=w4a16g96")


def test_codes_of_eight_that_do_not_divide_stop_before_any_work(
    tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path
) -> None:
    with pytest.raises(QtoolError, match=r"mlp\.down_proj: 132 columns do not divide into codes of 8, which e8p has; add it"):
        run(tiny_model("llama", intermediate_size=132), "pipeline.quantize/gptq.scheme=e8p")
    assert not list((tmp_path / "out" / "state").glob("0*"))


@pytest.mark.parametrize(
    ("family", "stated"), [("gpt2", "n_positions"), ("opt", "max_position_embeddings"), ("llama", "max_position_embeddings")]
)
def test_windows_longer_than_the_model_takes_stop_before_any_work(
    family: str, stated: str, tiny_model: Callable[..., Path], run: Callable[..., object], tmp_path: Path
) -> None:
    message = (
        r"recipe\.yaml:\d+: calibrate/text: length 513 is more than the model's 512 positions "
        rf"\(config\.{stated}\); use length: 512 or less"
    )
    with pytest.raises(QtoolError, match=message):
        run(tiny_model(family), "pipeline.calibrate/text.length=513")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_cannot_be_quantized(tiny_model: Callable[..., Path], run: Callable[..., object]) -> None:
    with pytest.raises(QtoolError, match="lm_head is tied to the embedding"):
        run(tiny_model("gpt2"), "pipeline.quantize/gptq.ignore=[]")


def test_a_mistake_put_right_needs_no_fresh_start(
    tiny_model: Callable[..., Path], run: Callable[..., dict[str, object]]
) -> None:
    folder = tiny_model("llama")
    for mistake in ("pipeline.quantize/gptq.ignore=[mlp.gatee_proj]", "pipeline.calibrate/text.samples=99999"):
        with pytest.raises(QtoolError):
            run(folder, mistake)
    assert run(folder)["status"] == "done"
