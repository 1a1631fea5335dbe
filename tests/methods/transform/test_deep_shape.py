"""DeepShape against its rank map written out in numpy, known shapes, and the entropy of int4 codes on the demo model."""

from pathlib import Path

import numpy as np
import pytest
import scipy.special
import torch
import yaml

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.methods.transform.deep_shape import DeepShapeOptions, deep_shape, quantiles
from qtool.model.handle import ModelHandle
from qtool.model.linear import weight_of
from qtool.options import ModelOptions
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load


def sample(shape: float, n: int) -> torch.Tensor:
    """n draws from a generalised Gaussian: |w|^shape is gamma distributed, the sign a coin."""
    random = np.random.default_rng(0)
    magnitudes = random.gamma(1 / shape, size=n) ** (1 / shape)
    return torch.from_numpy(magnitudes * random.choice([-1.0, 1.0], n)).float()


def run(W: torch.Tensor, factor: float = 0.9) -> torch.Tensor:
    notes: list[str] = []
    reshaped = deep_shape(W.clone(), None, DeepShapeOptions(factor=factor), notes.append)
    assert notes == []
    return reshaped


def entropy(codes: torch.Tensor) -> float:
    """Bits per code of an ideal entropy coder that knows how often each occurs."""
    share = codes.flatten().unique(return_counts=True)[1] / codes.numel()
    return float(-(share * share.log2()).sum())


@pytest.mark.parametrize("shape", [0.1, 0.7, 1.0, 2.0, 3.0])
def test_quantiles_are_those_of_the_incomplete_gamma_function(shape: float) -> None:
    p = (np.arange(2001) + 0.5) / 2001  # 1/2 among them
    p = np.concatenate([[1e-9], p, [1 - 1e-9]])
    expected = np.sign(2 * p - 1) * scipy.special.gammaincinv(1 / shape, abs(2 * p - 1)) ** (1 / shape)
    found = quantiles(torch.from_numpy(p), shape).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)  # what NODES promises
    assert found[1001] == 0


@pytest.mark.parametrize("factor", [0.5, 0.9, 1.0])
def test_it_is_the_rank_map_written_out(factor: float) -> None:
    W = (sample(1.7, 15 * 52) / 50 + 0.01).view(15, 52)
    W[3, :7] = W[2, 5]  # equal weights share their middle rank
    w = W.double().numpy().flatten()
    n, m = len(w), w.mean()
    ratio = ((w - m) ** 2).mean() / abs(w - m).mean() ** 2
    shapes = np.arange(0.1, 3, 1e-4)
    gamma = scipy.special.gamma
    ratios = gamma(1 / shapes) * gamma(3 / shapes) / gamma(2 / shapes) ** 2
    shape = factor * shapes[abs(ratios - ratio).argmin()]
    p = np.array([((w < one).sum() + (w == one).sum() / 2) / n for one in w])
    q = np.sign(2 * p - 1) * scipy.special.gammaincinv(1 / shape, abs(2 * p - 1)) ** (1 / shape)
    expected = m + (q - q.mean()) * w.std() / q.std()
    # The table of shapes steps by 1e-4, which moves the tail by less than 1e-4 of the deviation of 0.02.
    np.testing.assert_allclose(run(W, factor).flatten().numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.0])
def test_a_constant_matrix_stays_and_is_noted(value: float) -> None:
    W, notes = torch.full((7, 9), value), list[str]()
    assert torch.equal(deep_shape(W.clone(), None, DeepShapeOptions(), notes.append), W)
    assert notes == ["all weights are equal; left as they are"]


def test_two_values_stay_two_values() -> None:
    W = torch.tensor([[1.0, -1.0, 1.0], [-1.0, -1.0, 1.0]])
    torch.testing.assert_close(run(W), W)


def test_codes_of_the_demo_models_linears_say_less_after_it() -> None:
    """Of every one of them, in int4 with a scale for each row."""
    scheme = Scheme.model_validate("w4a16").weights
    linears = ModelHandle(ModelOptions(path="demo")).block(2).linears()
    assert len(linears) == 7
    for name, linear in linears.items():
        W = weight_of(linear)
        before, less, least = (entropy(quantize(w, scheme).codes) for w in (W, run(W, 0.8), run(W, 0.5)))
        assert least < less < before, f"{name}: {before:.2f}, {less:.2f}, {least:.2f} bits per code"


def test_the_driver_reshapes_without_text_and_calls_the_linears_dense(tmp_path: Path) -> None:
    steps = [{"transform/deep_shape": {"factor": 0.5, "ignore": ["lm_head", "re:.*[qkvo]_proj"]}}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": "demo", "pipeline": steps}))
    results = run_recipe(load(tmp_path / "recipe.yaml"), tmp_path / "out", Silent())
    rows = [row for row in results["blocks"] if row["name"].startswith("model.layers.0.")]
    assert [row["name"].split(".")[-1] for row in rows] == ["gate_proj", "up_proj", "down_proj"]
    assert {row["scheme"] for row in rows} == {"dense"}
    assert all(0 < row["sqnr_db"] < 30 for row in rows)
