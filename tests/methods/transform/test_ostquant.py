"""OSTQuant starts level, its scales pass, its loss is the divergence on the likeliest tokens, and the best is kept."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.linalg.divergence import kl, kl_of_largest
from qtool.linalg.hadamard import levelling_rotation, random_orthogonal
from qtool.linalg.qsur import qsur
from qtool.methods.transform.ostquant import OstQuantOptions, ostquant
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.model.rotated_network import RotatedNetwork
from qtool.model.rotation import TOLERANCE, Places, Rotations, Trial, block_edits, find_places, trial_rotation
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load

TinyModel = Callable[..., Path]


@contextmanager
def network_of(folder: Path, tokens: Tensor, with_keys: bool = False) -> Iterator[tuple[Places, RotatedNetwork]]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32"))
    places = find_places(model, tokens[:1], with_scalings=True, with_keys=with_keys)
    with model.materialized() as module:
        yield places, RotatedNetwork(model, module.float(), places, tokens)


def covariance(n: int, mean: float = 0.0) -> Tensor:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, n, generator=random, dtype=torch.float64) * torch.linspace(0.1, 9, n) + mean
    return x.T @ x / 200


@pytest.mark.parametrize("n", [64, 12])
def test_the_start_makes_all_channels_alike_and_qsur_the_best_of_all_rotations(n: int) -> None:
    Sigma, random = covariance(n), torch.Generator().manual_seed(0)
    Q = levelling_rotation(Sigma, False, random)
    assert torch.allclose(Q.T @ Q, torch.eye(n, dtype=torch.float64), atol=1e-12)
    assert torch.allclose((Q.T @ Sigma @ Q).diagonal(), Sigma.trace().expand(n) / n)
    level = qsur(Q.T @ Sigma @ Q)
    assert level is not None
    for _ in range(5):
        R = random_orthogonal(n, random)
        assert level > (qsur(R.T @ Sigma @ R) or 0)


@pytest.mark.parametrize("n", [64, 92])
def test_a_start_that_keeps_the_mean_is_level_across_it(n: int) -> None:
    one, Sigma = torch.ones(n, dtype=torch.float64), covariance(n)
    Q = levelling_rotation(Sigma, True, torch.Generator().manual_seed(0))
    assert torch.allclose(Q @ one, one, atol=1e-10)
    assert torch.allclose(Q.T @ Q, torch.eye(n, dtype=torch.float64), atol=1e-10)
    P = torch.eye(n, dtype=torch.float64) - 1 / n
    across = (Q.T @ P @ Sigma @ P @ Q).diagonal()
    if n == 64:  # 92 has no Hadamard matrix, and a random one levels by and large
        assert torch.allclose(across, across.mean().expand(n))
    assert across.std() < 0.5 * (P @ Sigma @ P).diagonal().std()


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    teacher = torch.tensor([[math.log(4), math.log(2), math.log(1), math.log(3)]])
    student = torch.tensor([[0.0, math.log(9), math.log(2), 0.0]])
    p, q = (4 / 7, 3 / 7), (1 / 2, 1 / 2)  # the two largest of the teacher are the first and the last
    by_hand = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert abs(float(kl_of_largest(teacher, student, 2)) - by_hand) < 1e-6
    assert torch.allclose(kl_of_largest(teacher, student, 9), kl(teacher, student))
    assert float(kl_of_largest(teacher, teacher, 2)) == 0


def test_scales_pass_from_values_and_up_alone_and_together_with_rotations(tiny_model: TinyModel, windows: Tensor) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model("llama")), dtype="float32"))
    places = find_places(model, windows[:1], with_scalings=True)
    assert {name.split(".", 2)[2]: n for name, n in places.scales.items() if ".0." in name} == {
        "0.self_attn.v_proj": 32,
        "0.mlp.up_proj": 128,
    }
    random = torch.Generator().manual_seed(0)
    scales = {name: torch.rand(n, generator=random, dtype=torch.float64) + 0.5 for name, n in places.scales.items()}
    R = torch.stack([random_orthogonal(16, random) for _ in range(2)])
    rotations = Rotations(trial_rotation(64, False), dict.fromkeys(places.heads, R), scales=scales)
    hidden, block = model.embed(windows[:1]), model.block(0)
    edits = block_edits(block, places.blocks[0], rotations)
    assert Trial(block, hidden).change(edits, rotations) <= TOLERANCE
    name = f"{block.name}.self_attn"
    gain = block.module.get_parameter("input_layernorm.weight").detach().double()
    V = (
        torch.diag(1 / scales[f"{name}.v_proj"])
        @ weight_of(block.get(f"{name}.v_proj")).double()
        * gain
        @ trial_rotation(64, False)
    )
    assert torch.allclose(edits[f"{name}.v_proj.weight"][16:], R[1].T @ V[16:], atol=1e-6)


def test_the_covariance_of_the_weights_is_that_of_their_rows(tiny_model: TinyModel, windows: Tensor) -> None:
    with network_of(tiny_model("llama"), windows) as (places, network):
        rows, of_head = [], []
        for index in range(2):
            for norm, linears in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            ):
                layer = network._module.get_submodule(f"model.layers.{index}")
                gain = layer.get_parameter(f"{norm}.weight")
                rows += [layer.get_parameter(f"{linear}.weight") * gain for linear in linears]
        expected = torch.cov(torch.cat(rows).double().T, correction=0)
        assert torch.allclose(network.reading_covariance(), expected, atol=1e-6)
        O = network._module.get_parameter("model.layers.1.self_attn.o_proj.weight")  # noqa: E741
        of_head = torch.cat([O[:, 32:48], O[:, 48:64]])  # two query heads read the second value head
        expected = torch.cov(of_head.double().T, correction=0)
        assert torch.allclose(network.reading_of_heads()["model.layers.1.self_attn.v_proj"][1], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_best_is_kept_and_everything_learns(family: str, tiny_model: TinyModel, windows: Tensor) -> None:
    options = OstQuantOptions.model_validate({"scheme": "w3a4", "steps": 8, "batch": 4, "k": 100})
    with network_of(tiny_model(family), windows) as (places, network):
        start = ostquant(places, network, options.model_copy(update={"steps": 0}), 0, print)
        found = ostquant(places, network, options, 0, print)
        rows = torch.arange(4)
        loss = kl_of_largest(network.original_logits(rows), network.logits(found, options, rows), 100).mean()
    assert len(found.losses) == 5 and min(found.losses) < found.losses[0] == start.losses[0]
    assert abs(float(loss) - min(found.losses)) < 1e-4
    assert found.residual is not None and start.residual is not None and found.qsur is not None
    assert found.qsur[1] > found.qsur[0]
    assert (found.residual.T @ found.residual - torch.eye(64)).abs().max() < 1e-5
    if family == "gpt2":
        assert torch.allclose(found.residual.sum(1), torch.ones(64, dtype=torch.float64)) and not found.scales
    else:
        assert all((s != 1).any() and (s > 0).all() for s in found.scales.values()) and len(found.scales) == 4
    pairs = [(start.residual, found.residual), *((start.heads[name], R) for name, R in found.heads.items())]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairs)


def test_scales_of_keys_learn_where_the_cache_is_rounded(tiny_model: TinyModel, windows: Tensor) -> None:
    folder, attention = tiny_model("llama"), "model.layers.0.self_attn"
    weights = load_file(folder / "model.safetensors")
    weights[f"{attention}.k_proj.weight"][[3, 11]] *= 16  # two channels of a head of keys, turned together, that stand out
    weights[f"{attention}.q_proj.weight"][[3, 11, 19, 27]] /= 16
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    cache = {"key_bits": 2, "value_bits": 8, "group": 16, "residual": 0, "keys": "per_token"}
    options = OstQuantOptions.model_validate(
        {"scheme": "w8a8", "rounds": "inputs", "cache": cache, "steps": 12, "batch": 4, "k": 100, "scale_lr": 0.2}
    )
    with network_of(folder, windows, with_keys=True) as (places, network):
        before = network.original_logits(torch.arange(2))
        found = ostquant(places, network, options, 0, print)
        assert torch.equal(network.original_logits(torch.arange(2)), before)  # the cache of the module is as it was
    s = found.keys[f"{attention}.k_proj"]
    assert len(found.keys) == 2 and len(s) == 2 * 8 and min(found.losses) < 0.9 * found.losses[0]
    assert s[3] == s.min() < 0.8


def test_a_run_keeps_the_logits_and_tells_of_qsur(
    tiny_model: TinyModel, tmp_path: Path, logits_of: Callable[[ModelHandle], Tensor]
) -> None:
    folder, path = tiny_model("qwen2"), tmp_path / "recipe.yaml"
    text = {"calibrate/text": {"source": "demo:calibration", "samples": 4, "length": 32}}
    cache = {"group": 16, "residual": 0}
    learn = {"transform/ostquant": {"scheme": "w4a4", "cache": cache, "steps": 4, "batch": 2, "online": True, "scale_lr": 0.1}}
    path.write_text(yaml.safe_dump({"model": str(folder), "pipeline": [text, learn]}))
    run_recipe(load(path), tmp_path / "run", Silent())
    changes = (tmp_path / "run" / "state" / "01-transform-ostquant",)
    found, expected = (logits_of(ModelHandle(ModelOptions(path=str(folder)), paths)) for paths in (changes, ()))
    assert (found - expected).norm() < 1e-5 * expected.norm()
    stage = json.loads((tmp_path / "run" / "results.json").read_text())["stages"][1]
    assert len(stage["losses"]) == 5 and stage["qsur"][0] < stage["qsur"][1]
