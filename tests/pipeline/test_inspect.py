"""Inspection: numbers against the whole model in numpy, and planted outliers, which are found where they were planted."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from qtool.calibration.tokens import ASSETS, TextOptions
from qtool.errors import QtoolError
from qtool.linalg.qsur import most
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions
from qtool.pipeline.inspect import Inspection, inspect_model, summarize, worst
from qtool.progress import Silent

Row = dict[str, Any]
CHANNEL = 11


def tokens(samples: int = 10, length: int = 24) -> Tensor:
    """More windows than one batch holds."""
    return torch.randint(2, 4000, (samples, length), generator=torch.Generator().manual_seed(0))


def inspected(folder: Path, ids: Tensor | None = None) -> Row:
    model = ModelHandle(ModelOptions(path=str(folder)))
    found = Inspection(model, tokens() if ids is None else ids).carry_out(Silent())
    json.dumps(found, allow_nan=False)
    return found


def change(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """Edit the checkpoint's tensors in place."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def linear(found: Row, name: str) -> Row:
    (row,) = (row for row in found["linears"] if row["name"].endswith(name))
    return dict(row)


def test_numbers_are_those_of_the_whole_model_worked_out_in_numpy(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    found = inspected(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    seen: list[Tensor] = []
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    ends: list[Tensor] = []
    plain.model.layers[1].register_forward_hook(lambda module, args, out: ends.append(out))
    with torch.no_grad():
        attentions = plain(tokens(), output_attentions=True, use_cache=False).attentions

    block, after = found["blocks"][1], ends[0].numpy()
    place = np.unravel_index(abs(after).argmax(), after.shape)
    top = block["largest"][0]
    assert (top["window"], top["position"], top["channel"]) == place
    assert top["magnitude"] == pytest.approx(abs(after[place]), rel=1e-5)
    ordered = np.sort(abs(after).reshape(10, -1), axis=1)
    assert block["median_magnitude"] == pytest.approx(ordered[:, (24 * 64 - 1) // 2].mean(), rel=1e-5)
    assert block["kurtosis"] == pytest.approx(scipy.stats.kurtosis(after, axis=None, fisher=False), rel=1e-4)
    received = attentions[1].mean(1).sum(1).numpy() / 24  # [samples, keys]
    assert block["attention"]["first_token_share"] == pytest.approx(received[:, 0].mean(), rel=1e-4)
    assert block["attention"]["sinks"] == (received >= 0.1).sum()
    assert block["attention"]["sink_share"] == pytest.approx(received[received >= 0.1].sum() / 10, rel=1e-4)
    by_head = (attentions[1].sum(2).numpy() / 24 * (received >= 0.1)[:, None]).sum(2).mean(0)
    np.testing.assert_allclose(block["attention"]["sink_share_by_head"], by_head, rtol=1e-4)

    row, x = linear(found, "layers.1.mlp.down_proj"), seen[0].reshape(-1, 128).double().numpy()
    amax = abs(x).max(0)
    assert (row["tokens"], row["input_channel"]) == (240, amax.argmax())
    assert row["input_channel_ratio"] == pytest.approx(amax.max() / np.sort(amax)[63], rel=1e-4)
    assert row["input_crest"] == pytest.approx(amax.max() / np.sqrt((x**2).mean()), rel=1e-4)
    assert row["input_over_mean"] == pytest.approx(amax.max() / abs(x).mean(), rel=1e-4)
    assert row["input_kurtosis"] == pytest.approx(scipy.stats.kurtosis(x, axis=None, fisher=False), rel=1e-4)
    second = (x**2).mean(0)
    assert row["input_channel_kurtosis"] == pytest.approx((second**2).mean() / second.mean() ** 2, rel=1e-4)
    Sigma = np.cov(x.T, bias=True)
    Sigma = 0.999 * Sigma + 0.001 * np.trace(Sigma) / 128 * np.eye(128)
    c, r = scipy.stats.chi2.ppf(0.99, 128), np.sqrt(np.diag(Sigma))
    side = (x.mean(0) + np.sqrt(c) * r).max() - (x.mean(0) - np.sqrt(c) * r).min()
    ball = 64 * math.log(math.pi) - math.lgamma(65)
    expected = math.exp((ball + 64 * math.log(c) + np.linalg.slogdet(Sigma)[1] / 2) / 128) / side
    assert row["input_qsur"] == pytest.approx(expected, rel=1e-4)
    assert row["input_qsur_share"] == pytest.approx(expected / most(128), rel=1e-4)
    W = plain.model.layers[1].mlp.down_proj.weight.detach().numpy()
    assert row["weight_kurtosis"] == pytest.approx(scipy.stats.kurtosis(W, axis=None, fisher=False), rel=1e-4)
    assert row["weight_shape"] == pytest.approx(2, abs=0.1)  # drawn normal
    assert row["weight_qsur"] is None  # 64 rows of 128 columns


def test_a_channel_scaled_by_an_equivalent_transform_is_found_and_nothing_else_changes(tiny_model: Callable[..., Path]) -> None:
    before = inspected(tiny_model("llama", name="before"))

    def scale(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.input_layernorm.weight"][CHANNEL] *= 256
        for name in ("q_proj", "k_proj", "v_proj"):
            weights[f"model.layers.1.self_attn.{name}.weight"][:, CHANNEL] /= 256

    after = inspected(change(tiny_model("llama"), scale))
    scaled = [f"model.layers.1.self_attn.{name}_proj" for name in "qkv"]
    for old, new in zip(before["linears"], after["linears"], strict=True):
        if new["name"] in scaled:
            assert new["input_channel"] == CHANNEL and new["input_channel_ratio"] > 10 * old["input_channel_ratio"]
            assert new["input_channel_kurtosis"] == pytest.approx(64, rel=0.02)  # one of 64 rules
            assert new["input_qsur_share"] < old["input_qsur_share"] / 5
        else:  # powers of two round nothing
            assert new == old
    assert after["blocks"] == before["blocks"]
    assert (before["emergent_features"], after["emergent_features"]) == ([], [CHANNEL])
    named = {row["what"]: row["where"] for row in worst(after)}
    assert named["input: largest channel over the median one"] == f"{scaled[0]}, channel {CHANNEL}"
    kind = {row["kind"]: row for row in summarize(after["linears"])}["self_attn.k_proj"]
    assert kind["count"] == 2 and kind["input_channel_ratio"]["where"] == scaled[1]


def test_one_planted_value_is_found_after_every_block_and_a_random_model_has_none(tiny_model: Callable[..., Path]) -> None:
    ids = tokens()
    ids[3, 5] = 4001

    def plant(weights: dict[str, Tensor]) -> None:
        weights["model.embed_tokens.weight"][4001, CHANNEL] = 1e4

    def silence(weights: dict[str, Tensor]) -> None:
        plant(weights)
        weights["model.layers.0.mlp.down_proj.weight"][CHANNEL] *= 30

    plain, planted = inspected(tiny_model("llama", name="plain"), ids), inspected(change(tiny_model("llama"), silence), ids)
    assert all(row["massive"] == row["outliers"] == 0 for row in (plain["embedding"], *plain["blocks"]))
    for row in (planted["embedding"], *planted["blocks"]):
        assert (row["massive"], row["outliers"], row["outlier_tokens"]) == (1, 1, 1)
        assert row["massive_channels"] == row["outlier_channels"] == [{"channel": CHANNEL, "count": 1}]
        top = row["largest"][0]
        assert (top["window"], top["position"], top["channel"]) == (3, 5, CHANNEL)
    down = linear(planted, "layers.0.mlp.down_proj")
    assert (down["weight_outlier_rows"], down["weight_largest_rows"][0]["index"]) == (1, CHANNEL)
    assert planted["blocks"][0]["outliers_meet"]["channels"] == [CHANNEL]  # the row that writes to it is large, too
    assert planted["blocks"][1]["outliers_meet"]["channels"] == []
    assert plain["blocks"][0]["outliers_meet"] == {"tokens_share": None, "channels": []}


def test_an_expert_that_no_token_reaches_is_said_and_has_weights_alone(tiny_model: Callable[..., Path]) -> None:
    found = inspected(tiny_model("mixtral", num_local_experts=8), tokens(1, 3))
    unreached = [row for row in found["linears"] if row["tokens"] == 0]
    assert len(unreached) >= 2 * 2 * 2  # of 8 experts 3 tokens reach 6 at most
    for row in unreached:
        assert row["input_qsur"] is row["input_kurtosis"] is row["input_largest"] is None and row["weight_shape"] is not None
    assert found["notes"] == [note for note in found["notes"] if note.startswith(f"{len(unreached)} linears got no token")]
    kind = {row["kind"]: row for row in summarize(found["linears"])}["mlp.experts.down.#"]
    assert kind["count"] == 16 and kind["reached"] == 16 - len(unreached) // 2


def test_of_a_quantized_model_the_values_of_its_codes_are_inspected(
    tiny_model: Callable[..., Path], quantized: Callable[..., ModelHandle]
) -> None:
    model = quantized(tiny_model("llama"), "w4a16g32")
    found = Inspection(model, tokens(2, 8)).carry_out(Silent())
    W = weight_of(model.block(1).get("model.layers.1.self_attn.q_proj"))
    row = linear(found, "layers.1.self_attn.q_proj")
    assert row["weight_largest"] == float(W.abs().max()) and len(W[0, :32].unique()) <= 16
    peak = W.abs().amax(0) / W.abs().mean(0)
    assert row["weight_peak_columns"] == {"index": int(peak.argmax()), "peak": pytest.approx(float(peak.max()))}


def test_a_tied_head_is_inspected_as_the_embedding_that_it_is(tiny_model: Callable[..., Path]) -> None:
    found = inspected(tiny_model("llama", tie_word_embeddings=True))
    head = found["linears"][-1]
    assert (head["name"], head["block"], head["shape"], head["tokens"]) == ("lm_head", None, [4096, 64], 240)
    assert head["weight_deviation"] == pytest.approx(0.1, rel=0.02) and head["weight_qsur_share"] == pytest.approx(1, abs=0.1)


def test_dead_channels_and_constant_weights_leave_numbers_finite(tiny_model: Callable[..., Path]) -> None:
    def kill(weights: dict[str, Tensor]) -> None:
        weights["model.layers.0.input_layernorm.weight"][:40] = 0
        weights["model.layers.0.self_attn.v_proj.weight"].fill_(0)
        weights["model.layers.1.mlp.gate_proj.weight"].fill_(0)

    found = inspected(change(tiny_model("llama"), kill))
    v, o, down = (linear(found, f"layers.{name}") for name in ("0.self_attn.v_proj", "0.self_attn.o_proj", "1.mlp.down_proj"))
    assert v["input_channel_ratio"] is None and v["input_qsur"] > 0
    assert v["weight_kurtosis"] is v["weight_shape"] is None and v["weight_reach"] == 0
    for row in (o, down):  # inputs that are zero throughout
        assert row["input_qsur"] is row["input_kurtosis"] is row["input_crest"] is row["input_channel_kurtosis"] is None


def test_a_block_without_attention_weights_is_noted(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 4096, "time_step_rank": 4}
    config = transformers.MambaConfig(**sizes, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mamba")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ASSETS / "demo" / "model" / file, tmp_path / "mamba" / file)
    found = inspected(tmp_path / "mamba", tokens(2, 8))
    assert [row["attention"] for row in found["blocks"]] == [None, None]
    assert sum("attention was not inspected" in note for note in found["notes"]) == 2


def test_infinite_activations_are_a_mistake_that_names_the_block(tiny_model: Callable[..., Path]) -> None:
    def spoil(weights: dict[str, Tensor]) -> None:
        weights["model.layers.1.mlp.down_proj.weight"].fill_(3e38)  # a finite weight, whose products are not

    with pytest.raises(QtoolError, match=r"model\.layers\.1 gives NaN or infinity"):
        inspected(change(tiny_model("llama"), spoil))


def test_the_model_folder_stays_and_two_inspections_agree(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_model("gpt2", dtype="bfloat16")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "t.txt").write_text("Summer is warm. Winter is cold.\n" * 40)
    text = TextOptions(source=str(tmp_path / "t.txt"), samples=3, length=16)
    first, second = (inspect_model(ModelOptions(path=str(folder)), text, tmp_path / name, Silent()) for name in "ab")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert first == json.loads((tmp_path / "a" / "inspect.json").read_text())
    assert first | {"stages": []} == second | {"stages": []}
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["inspect.html", "inspect.json"]
