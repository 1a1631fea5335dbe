"""qtool eval of checkpoints in other tools' layouts: read by qtool's own readers, without the packages that wrote them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.cli.main import app
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TEXT = ("--source", "demo:test", "--length", "24", "--samples", "2")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("gptq", "w4a16g32"), ("awq", "w4a16g32-asym"), ("compressed_tensors", "w4a16g32")],
)
def test_another_tools_layout_is_measured_as_its_weights_decode(name: str, scheme: str, exported: Callable[..., Path]) -> None:
    folder = exported(name, scheme)
    measured = CliRunner().invoke(app, ["eval", str(folder), *TEXT, "--json"])
    assert measured.exit_code == 0, measured.stderr
    results = json.loads(measured.stdout)
    assert results["fallbacks"] == []  # nothing was left to transformers
    model = ModelHandle(ModelOptions(path=str(folder)))
    assert {str(one) for one in model.schemes().values()} == {scheme}
    tokens = read_tokens(TextOptions(source="demo:test", length=24, samples=2, shuffle=False), model.tokenizer, 0)
    with model.materialized() as module, torch.no_grad():
        logits = module(tokens).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    found = {row["name"]: row["value"] for row in results["metrics"]}
    assert found["perplexity"] == pytest.approx(float(loss.exp()), rel=1e-3)  # float16 weights, in batches of other shapes


def test_what_neither_qtool_nor_transformers_can_load_is_one_error_that_says_what_to_install(
    exported: Callable[..., Path], change_config: Callable[..., Any]
) -> None:
    folder = exported("gptq", "w4a16g32")
    change_config(folder, lambda config: config.update(checkpoint_format="marlin"))
    refused = CliRunner().invoke(app, ["eval", str(folder), *TEXT])
    assert refused.exit_code == 2
    last = refused.stderr.splitlines()[-1]
    assert "checkpoint format marlin cannot be read, gptq and gptq_v2 can" in last
    assert f"transformers cannot load {folder} either: " in last and "pip install optimum gptqmodel" in last
