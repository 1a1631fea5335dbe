"""The simulated cache: rounded keys and values in every forward, in generate() and in exports, as its arithmetic says."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import qtool
from qtool.artifact import Artifact
from qtool.errors import QtoolError
from qtool.formats.kv_cache import CacheScales, rounded
from qtool.formats.scheme import KvScheme
from qtool.layers.kv_cache import attentions_of, pass_through
from qtool.model.handle import ModelHandle
from qtool.model.store import save_changes
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

TinyModel = Callable[..., Path]
E4M3, INT8 = KvScheme(bits=8, format="e4m3"), KvScheme(bits=8)
TOKENS = torch.randint(2, 4096, (2, 12), generator=torch.Generator().manual_seed(0))  # [samples, length]


def cached(folder: Path, changes: Path, scheme: KvScheme, k: float = 0.01, v: float = 0.02) -> ModelHandle:
    """The model with scales k and v in every block."""
    model = ModelHandle(ModelOptions(path=str(folder)))
    for index in range(model.n_blocks):
        names = [name for name in model.attention_names() if name.startswith(f"{model.blocks_name}.{index}.")]
        scales = CacheScales(scheme, torch.tensor([k]), torch.tensor([v]))
        save_changes(changes / f"block_{index:03d}.safetensors", {name: scales for name in names})
    return ModelHandle(model.options, (changes,))


def nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The level nearest to each of x; of two as near, either."""
    return levels[(x.flatten().unsqueeze(1) - levels).abs().argmin(1)].view(x.shape)


@pytest.mark.parametrize("scheme", [E4M3, INT8, KvScheme(bits=4)])
def test_an_entry_becomes_the_nearest_level(scheme: KvScheme) -> None:
    x, scale = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0.013])
    if scheme.format == "e4m3":
        bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        levels = bits[torch.isfinite(bits)]
    else:
        levels = torch.arange(-(1 << (scheme.bits - 1)), 1 << (scheme.bits - 1)).float()
    expected = nearest(x.double() / scale.double(), levels.double()) * scale.double()
    torch.testing.assert_close(rounded(x, scale, scheme).double(), expected, rtol=1e-6, atol=0)
    far = torch.tensor([1e6, -1e6])
    torch.testing.assert_close(rounded(far, scale, scheme), torch.tensor([levels.max(), levels.min()]) * scale)


def test_gradients_pass_as_if_nothing_were_rounded() -> None:
    x = torch.randn(3, requires_grad=True)
    rounded(x, torch.tensor([0.1]), INT8).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3))


def test_every_entry_passes_once_after_its_rotation(
    family: str, tiny_model: TinyModel, tmp_path: Path, logits_of: Callable
) -> None:
    folder = tiny_model(family)
    model = ModelHandle(ModelOptions(path=str(folder)))
    names = model.attention_names()
    assert len(names) == 2 and all("att" in name.rsplit(".", 1)[-1] for name in names)
    hidden, block, seen = model.embed(TOKENS), model.block(0), []
    before = block.forward(hidden)
    (attention,) = attentions_of(block.module).values()

    def zero(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        seen.append((k.shape, v.shape))
        return k, torch.zeros_like(v)

    handle = pass_through(attention, zero)
    without = block.forward(hidden)
    handle.remove()
    assert all(shape[2] == TOKENS.shape[1] for pair in seen for shape in pair)
    assert not torch.equal(without, before) and torch.equal(block.forward(hidden), before)

    plain, found = logits_of(model), logits_of(cached(folder, tmp_path / "changes", INT8, 0.04, 0.04))
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.3  # a router may choose another expert


@pytest.mark.parametrize("name", ["compressed_tensors", "qtool"])
@pytest.mark.parametrize("scheme", [E4M3, INT8])
def test_exports_bring_the_scales(
    scheme: KvScheme, name: str, tiny_model: TinyModel, tmp_path: Path, export: Callable[..., Artifact], logits_of: Callable
) -> None:
    folder = tiny_model("llama")
    recipe = f"model: {folder}\npipeline:\n  - quantize/rtn: {{scheme: w8a16}}\n"
    run_recipe(parse(recipe, "r"), tmp_path / "run", Silent())
    (changes,) = (path.parent for path in (tmp_path / "run" / "state").glob("*/block_000.safetensors"))
    model = ModelHandle(ModelOptions(path=str(folder)), (changes,))
    for index in range(model.n_blocks):
        found = model.unit_changes(f"block_{index:03d}")
        found[f"model.layers.{index}.self_attn"] = CacheScales(scheme, torch.tensor([0.02]), torch.tensor([0.03]))
        save_changes(tmp_path / "both" / f"block_{index:03d}.safetensors", found)
    model = ModelHandle(model.options, (tmp_path / "both",))
    artifact = export(name, model)
    read = ModelHandle(ModelOptions(path=str(artifact.path)))
    assert read.cache() == model.cache() == scheme
    assert torch.equal(logits_of(read), logits_of(model))
    tensors = load_file(artifact.path / "model.safetensors")
    assert float(tensors["model.layers.1.self_attn.k_scale"]) == pytest.approx(0.02)
    if name == "compressed_tensors":
        config = json.loads((artifact.path / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
        kind = "float" if scheme.format == "e4m3" else "int"
        assert config == {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}
    else:
        loaded = qtool.load(artifact.path)
        with torch.no_grad():
            written = loaded.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
            again = loaded.generate(TOKENS[:1], max_new_tokens=8, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(written, again) and written.shape == (1, 20)


def test_a_cache_that_only_a_later_block_has_is_known(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = tiny_model("llama")
    cached(folder, tmp_path / "changes", E4M3)
    save_changes(tmp_path / "changes" / "block_000.safetensors", {})  # as of a block without attention
    assert ModelHandle(ModelOptions(path=str(folder)), (tmp_path / "changes",)).cache() == E4M3


@pytest.mark.parametrize("name", ["safetensors", "gguf", "gptq", "onnx"])
def test_other_exports_refuse_a_quantized_cache(name: str, tiny_model: TinyModel) -> None:
    steps = "quantize/rtn: {scheme: w4a16g32}", "quantize/kv_cache: {}", f"export/{name}: {{}}"
    lines = "\n".join(f"  - {step}" for step in ("calibrate/text: {source: demo:calibration}", *steps))
    with pytest.raises(QtoolError, match=f"export/{name} cannot hold a quantized cache .*use export/compressed_tensors"):
        parse(f"model: {tiny_model('llama')}\npipeline:\n{lines}\n", "recipe")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dynamic": True}, "kv_cache_scheme: a cache of float 8 bits, strategy tensor, cannot be read"),
        ({"num_bits": 4}, "kv_cache_scheme: a cache of float 4 bits"),
        ({"strategy": "attn_head"}, "strategy attn_head, cannot be read"),
    ],
)
def test_caches_of_another_kind_are_refused(
    change: dict[str, object], message: str, tiny_model: TinyModel, quantized: Callable[..., ModelHandle], export: Callable
) -> None:
    folder = export("compressed_tensors", quantized(tiny_model("llama"), "w8a16")).path
    config = json.loads((folder / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = cache | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=message):
        ModelHandle(ModelOptions(path=str(folder))).schemes()


def test_a_scale_that_is_missing_is_told(
    tiny_model: TinyModel, quantized: Callable[..., ModelHandle], export: Callable[..., Artifact]
) -> None:
    folder = export("compressed_tensors", quantized(tiny_model("llama"), "w8a16")).path
    config = json.loads((folder / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = cache
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(QtoolError, match=r"self_attn: the cache is quantized, but the checkpoint has no .*k_scale"):
        ModelHandle(ModelOptions(path=str(folder))).block(0)
