"""Streaming gives the tensors of a run to the bit, goes on after a kill, and refuses what it cannot do before it writes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool import registry
from qtool.artifact import changed_files, read_manifest
from qtool.errors import QtoolError, RecipeError
from qtool.model.handle import ModelHandle, resolve_folder
from qtool.options import ModelOptions
from qtool.pipeline.run import Stage, run_recipe
from qtool.pipeline.stream import stream_recipe, streaming_exports
from qtool.progress import Progress, Silent
from qtool.recipe import load

Step = dict[str, object]


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of steps for a model."""

    def write(model: Path, *steps: Step, **rest: object) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"model": str(model), "pipeline": list(steps), **rest}))
        return path

    return write


def split(folder: Path, n_files: int, prefix: str = "") -> Path:
    """The checkpoint in several files, neighbours in different ones, its keys without a prefix."""
    tensors = {key.removeprefix(prefix): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    names = [f"part-{number}.safetensors" for number in range(n_files)]
    weight_map = {key: names[index % n_files] for index, key in enumerate(sorted(tensors))}
    for name in names:
        save_file({key: tensors[key] for key, file in weight_map.items() if file == name}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same(streamed: Path, ran: Path) -> None:
    """The same tensors to the bit, and the same files beside them."""
    found, wanted = tensors_of(streamed), tensors_of(ran)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    weights = ("*.safetensors", "*.index.json", "SHA256SUMS", "README.md")  # a stream measures nothing that a card could tell
    beside = [{p.name: p.read_bytes() for p in each.iterdir() if not any(map(p.match, weights))} for each in (streamed, ran)]
    assert beside[0] == beside[1] and "config.json" in beside[0] and "tokenizer.json" in beside[0]


@pytest.mark.parametrize(
    ("family", "fields", "quantize", "export", "n_files"),
    [
        ("llama", {"dtype": "bfloat16"}, {"scheme": "w4a16g32"}, "compressed_tensors", 1),
        (
            "qwen2",
            {"dtype": "bfloat16", "tie_word_embeddings": True},
            {"scheme": "nvfp4", "range": "mse"},
            "compressed_tensors",
            3,
        ),
        ("qwen2", {"tie_word_embeddings": True}, {"scheme": "w4a16g32-asym"}, "gptq", 3),
        ("mistral", {"dtype": "float16"}, {"scheme": "w4a16g32", "modules": {"down_proj": "w4a16g32-asym"}}, "awq", 2),
        ("llama", {"dtype": "bfloat16"}, {"scheme": "nf4g64-dq", "ignore": ["lm_head", "v_proj"]}, "bitsandbytes", 2),
        ("qwen3", {"dtype": "bfloat16"}, {"scheme": "w8a8"}, "torchao", 3),
        ("gpt2", {}, {"scheme": "w3a16g32-ic"}, "safetensors", 2),
        ("mixtral", {"dtype": "bfloat16"}, {"scheme": "mxfp4"}, "compressed_tensors", 3),
        ("mixtral", {}, {"scheme": "w4a16", "ignore": ["*.down.*", "lm_head"]}, "safetensors", 3),
        ("mixtral", {"dtype": "bfloat16", "num_hidden_layers": 1}, {"scheme": "nvfp4"}, "qtool", 3),
    ],
)
def test_the_tensors_are_those_of_a_run(
    family: str,
    fields: dict[str, object],
    quantize: Step,
    export: str,
    n_files: int,
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    recipe: Callable[..., Path],
) -> None:
    model = tiny_model(family, **fields)
    model = split(model, n_files) if n_files > 1 else model
    loaded = load(recipe(model, {"quantize/rtn": quantize}, {f"export/{export}": None}))
    results = run_recipe(loaded, tmp_path / "run", Silent())
    artifact = stream_recipe(loaded, tmp_path / "streamed", Silent(), workers=2)
    assert_same(tmp_path / "streamed", tmp_path / "run" / "exports" / export)
    assert artifact.lossless == results["exports"][0]["lossless"]
    assert len(list((tmp_path / "streamed").glob("*.safetensors"))) == n_files
    assert not changed_files(tmp_path / "streamed", read_manifest(tmp_path / "streamed"))
    assert not list(tmp_path.glob(".streamed*"))
    ModelHandle(ModelOptions(path=str(tmp_path / "streamed"))).schemes()  # index and config fit each other


def test_a_mixture_stored_without_the_prefix_of_its_base_model_streams_too(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    model = split(tiny_model("mixtral", num_hidden_layers=1), 2, prefix="model.")
    loaded = load(recipe(model, {"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/safetensors": None}))
    run_recipe(loaded, tmp_path / "run", Silent())
    stream_recipe(loaded, tmp_path / "streamed", Silent())
    assert_same(tmp_path / "streamed", tmp_path / "run" / "exports" / "safetensors")


def test_torchaos_last_file_tells_of_the_tensors_of_all(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    model = split(tiny_model("llama", dtype="bfloat16"), 3)
    loaded = load(recipe(model, {"quantize/rtn": {"scheme": "w8a16"}}, {"export/torchao": None}))
    stream_recipe(loaded, tmp_path / "out", Silent(), workers=3)
    run_recipe(loaded, tmp_path / "run", Silent())
    with safe_open(tmp_path / "out" / "model-00003-of-00003.safetensors", framework="pt") as file:
        found = dict(file.metadata())
    with safe_open(tmp_path / "run" / "exports" / "torchao" / "model.safetensors", framework="pt") as file:
        wanted = dict(file.metadata())
    names = [sorted(json.loads(each.pop("tensor_names"))) for each in (found, wanted)]
    assert names[0] == names[1] and found == wanted


def test_methods_that_need_no_text_stream_too(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    steps: list[Step] = [{"quantize/hqq": {"scheme": "w4a16g32-asym"}}, {"export/compressed_tensors": None}]
    loaded = load(recipe(tiny_model("llama"), *steps))
    run_recipe(loaded, tmp_path / "run", Silent())
    stream_recipe(loaded, tmp_path / "streamed", Silent())
    assert_same(tmp_path / "streamed", tmp_path / "run" / "exports" / "compressed_tensors")


@pytest.fixture
def three_files(tiny_model: Callable[..., Path], recipe: Callable[..., Path]) -> Path:
    """A recipe for a checkpoint of three files."""
    model = split(tiny_model("llama", dtype="bfloat16"), 3)
    return recipe(model, {"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/compressed_tensors": None})


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_stream_goes_on_after_its_finished_files(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    model = split(tiny_model("llama", dtype="bfloat16", num_hidden_layers=12), 6)
    steps: list[Step] = [{"quantize/rtn": {"scheme": "w4a16g32", "range": "mse"}}, {"export/compressed_tensors": None}]
    path, out = recipe(model, *steps), tmp_path / "killed"
    command = [sys.executable, "-m", "qtool", "stream", str(path), "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    files = tmp_path / ".killed.part" / "exports" / "compressed_tensors"
    deadline = time.monotonic() + 240
    while not (files / "model-00002-of-00006.safetensors").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.0005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = {file: file.stat().st_mtime_ns for file in files.iterdir()}
    assert 2 <= len(kept) < 6 and not out.exists()

    noted: list[str] = []
    progress = Silent()
    progress.note = noted.append  # type: ignore[method-assign]
    stream_recipe(load(path), out, progress)
    assert noted == [f"{len(kept)} of 6 files were finished before"]
    assert all((out / file.name).stat().st_mtime_ns == written for file, written in kept.items())
    stream_recipe(load(path), tmp_path / "whole", Silent())
    assert files_of(out) == files_of(tmp_path / "whole")


def test_an_interrupted_stream_goes_on_with_the_same_bits(
    three_files: Path, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream_recipe(load(three_files), tmp_path / "cut", interrupted(12), workers=3)
    assert not (tmp_path / "cut").exists() and not list((tmp_path / ".cut.part").glob("shard-*"))
    for name in ("SHA256SUMS", ".config.json.1.tmp"):  # as a kill near the end would leave them
        (tmp_path / ".cut.part" / "exports" / "compressed_tensors" / name).write_text("half of it")
    stream_recipe(load(three_files), tmp_path / "cut", Silent(), workers=3)
    stream_recipe(load(three_files), tmp_path / "whole", Silent())
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


def test_another_recipe_does_not_go_on_with_the_files_of_the_first(
    three_files: Path, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        stream_recipe(load(three_files), out, interrupted(12))
    other = load(three_files, ["pipeline.quantize/rtn.scheme=w8a16g32"])
    with pytest.raises(QtoolError, match=r"holds a run with another recipe; use --fresh"):
        stream_recipe(other, out, Silent())
    stream_recipe(other, out, Silent(), fresh=True)
    stream_recipe(other, tmp_path / "whole", Silent())
    assert files_of(out) == files_of(tmp_path / "whole")


def test_another_checkpoint_does_not_go_on_either(
    three_files: Path, tmp_path: Path, interrupted: Callable[[int], Progress]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream_recipe(load(three_files), tmp_path / "out", interrupted(12))
    part = tmp_path / "tiny-llama" / "part-2.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(part).items()}, part)
    with pytest.raises(QtoolError, match="holds a run with another model"):
        stream_recipe(load(three_files), tmp_path / "out", Silent())


def test_a_disk_that_refuses_keeps_the_finished_files(three_files: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = [path.stat().st_size for path in (tmp_path / "tiny-llama").glob("part-*")]
    assert min(sizes) < 300_000 < max(sizes)  # the embedding's is the large one
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, before[1]))  # the system refuses longer files, as a full disk would
    try:
        with pytest.raises(QtoolError, match=r"(?s)cannot write: .*free space.*of 3 files are finished and kept; the same com"):
            stream_recipe(load(three_files), out, Silent())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not out.exists() and not list((tmp_path / ".out.part").glob("shard-*"))
    stream_recipe(load(three_files), out, Silent())
    stream_recipe(load(three_files), tmp_path / "whole", Silent())
    assert files_of(out) == files_of(tmp_path / "whole")


def resident() -> int:
    """Bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read and reset as Linux has it")
def test_what_stays_dense_passes_in_pieces(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    model = tiny_model("llama", dtype="bfloat16", vocab_size=400_000, tie_word_embeddings=True)
    loaded = load(recipe(model, {"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/compressed_tensors": None}))
    stream_recipe(loaded, tmp_path / "before", Silent())  # so that all code and the tokenizer are in memory
    before = resident()
    with Stage("stream") as stage:
        stream_recipe(loaded, tmp_path / "out", Silent())
    embedding = 400_000 * 64 * 2
    assert stage.facts["peak_rss_gib"] * 2**30 - before < embedding / 2


# ---- refusals ----


def refuse(path: Path, out: Path, words: str) -> None:
    with pytest.raises(QtoolError, match=words):
        stream_recipe(load(path), out, Silent())
    assert not list(out.parent.glob("*out*"))


def test_a_recipe_with_more_is_refused_with_every_step_that_is_too_much(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    path = recipe(
        Path("demo"),
        {"calibrate/text": {"source": "demo:calibration"}},
        {"quantize/rtn": {"scheme": "w4a16g32", "range": "output"}},
        {"evaluate/perplexity": {"source": "demo:test"}},
        {"export/gguf": None},
        {"export/safetensors": None},
        gates={"perplexity": {"max": 9}},
    )
    with pytest.raises(RecipeError) as caught:
        stream_recipe(load(path), tmp_path / "out", Silent())
    words = [
        ": calibrate/text has no place here",
        "evaluate/perplexity has no place here",
        "export/safetensors is one export step too many",
        "quantize/rtn with these options looks at more than weights (hessian)",
        "export/gguf does not write each linear by itself into safetensors; use qtool run, or one of export/awq, ",
        "gates need an evaluate step, which has no place here",
        "stream takes a recipe of one quantize step that needs no text, such as quantize/rtn, and one export step; everything",
    ]
    for word, problem in zip(words, caught.value.problems, strict=True):
        assert word in problem
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.part").exists()


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([{"quantize/rtn": {"scheme": "w4a16g32"}}], "there is no export step"),
        ([{"export/safetensors": None}], "there is no quantize step"),
        ([{"quantize/fine_quant": {"scheme": "w4a16g32"}}, {"export/gptq": None}], "decides by itself"),
        ([{"quantize/rtn": {"scheme": "w4a16g48"}}, {"export/gptq": None}], "do not divide into groups of 48"),
        ([{"quantize/rtn": {"scheme": "w5a16g32"}}, {"export/gptq": None}], "kernels take 2 or 3 or 4 or 8 bits"),
        ([{"quantize/rtn": {"scheme": "w4a16g32", "ignore": ["nothing"]}}, {"export/gptq": None}], "matches no linear"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    steps: list[Step], words: str, tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    refuse(recipe(tiny_model("llama", name="model"), *steps), tmp_path / "out", words)


def test_experts_of_which_some_stay_dense_are_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    quantize = {"quantize/rtn": {"scheme": "w4a16g32", "ignore": ["experts.down.1", "lm_head"]}}
    words = "layers.0.mlp.experts: some experts' down are quantized and others dense, which stream cannot write"
    model = tiny_model("mixtral", name="model", num_hidden_layers=1)
    refuse(recipe(model, quantize, {"export/qtool": None}), tmp_path / "out", words)


def test_a_folder_that_holds_something_is_left_alone(three_files: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("mine")
    with pytest.raises(QtoolError, match="exists already"):
        stream_recipe(load(three_files), tmp_path / "out", Silent())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["letter.txt"]


def break_file(path: Path, change: str) -> None:
    """Damage a safetensors file."""
    data = path.read_bytes()
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(data[:-1000])
    elif change == "dtype":
        path.write_bytes(data.replace(b'"BF16"', b'"U16" ', 1))
    elif change == "nan":
        path.write_bytes(data[:-2] + b"\xff\xff")
    elif change == "renamed":
        path.write_bytes(data.replace(b"_proj.weight", b"_porj.weight", 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("missing", r"part-1\.safetensors is missing, though the index names it"),
        ("truncated", r"part-1\.safetensors is truncated"),
        ("dtype", r"is U16, which cannot be read"),
        ("renamed", r"part-1\.safetensors has no model\.\S+_proj\.weight, though the index names it"),
    ],
)
def test_a_damaged_file_is_named_before_anything_is_written(change: str, words: str, three_files: Path, tmp_path: Path) -> None:
    break_file(tmp_path / "tiny-llama" / "part-1.safetensors", change)
    refuse(three_files, tmp_path / "out", words)


def test_a_corrupted_weight_is_named_and_the_rest_is_kept(three_files: Path, tmp_path: Path) -> None:
    part = tmp_path / "tiny-llama" / "part-1.safetensors"
    whole = part.read_bytes()
    break_file(part, "nan")
    with pytest.raises(QtoolError, match=r"(?s)part-1\.safetensors: \S+ holds NaN .*1 of 3 files are finished and kept"):
        stream_recipe(load(three_files), tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()
    part.write_bytes(whole)
    with pytest.raises(QtoolError, match="another model"):  # what was read from it before may have been wrong too
        stream_recipe(load(three_files), tmp_path / "out", Silent())


def test_another_models_weights_are_refused(
    tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]
) -> None:
    model = tiny_model("llama", name="model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    steps: list[Step] = [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/safetensors": None}]
    refuse(recipe(model, *steps), tmp_path / "out", r"\[128, 64\], but the config makes it \[96, 64\]")


def test_a_missing_tensor_is_named(tmp_path: Path, tiny_model: Callable[..., Path], recipe: Callable[..., Path]) -> None:
    model = tiny_model("llama", name="model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, model / "model.safetensors")
    steps: list[Step] = [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/safetensors": None}]
    refuse(recipe(model, *steps), tmp_path / "out", "has no tensor model.norm.weight")


def test_experts_that_are_stored_as_one_tensor_are_refused(tmp_path: Path, recipe: Callable[..., Path]) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "intermediate_size_mlp": 32, "head_dim": 16, "vocab_size": 4096}
    counts = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    config = transformers.Llama4TextConfig(**sizes | counts)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(resolve_folder(ModelOptions(path="demo")) / file, tmp_path / "model" / file)
    steps: list[Step] = [{"quantize/rtn": {"scheme": "w4a16g32"}}, {"export/safetensors": None}]
    words = r"experts\.gate_up\.0: the checkpoint keeps all experts of a block in one tensor; .* use qtool run"
    refuse(recipe(tmp_path / "model", *steps), tmp_path / "out", words)


def test_a_quantized_checkpoint_is_refused(three_files: Path, tmp_path: Path) -> None:
    stream_recipe(load(three_files), tmp_path / "quantized", Silent())
    refuse_quantized = load(three_files, [f"model={tmp_path / 'quantized'}"])
    with pytest.raises(QtoolError, match="is quantized already; stream takes a dense checkpoint"):
        stream_recipe(refuse_quantized, tmp_path / "again", Silent())


def test_every_export_of_single_linears_says_how_it_stores_them() -> None:
    found = streaming_exports()
    assert {"export/compressed_tensors", "export/gptq", "export/safetensors"} <= set(found)
    assert registry.load("export/gguf").storage is None
