"""The model handle: streamed block by block, it computes what transformers computes, for every family."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

TOKENS = torch.randint(2, 4096, (10, 24), generator=torch.Generator().manual_seed(0))  # two batches of unequal size


def streamed_logits(model: ModelHandle) -> torch.Tensor:
    hidden = model.final_hidden(TOKENS)
    with model.outer():
        return torch.cat([model.logits(part) for part in hidden.split(4)])


def test_streamed_logits_are_those_of_plain_transformers(family: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(family)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    # float32 sums in another order: batches of other sizes, experts one by one
    streamed = streamed_logits(ModelHandle(ModelOptions(path=str(folder))))
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


def test_the_materialized_model_computes_the_same(family: str, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model(family))))
    with model.materialized() as module, torch.no_grad():
        logits = module(TOKENS).logits
    torch.testing.assert_close(logits, streamed_logits(model), rtol=1e-5, atol=1e-5)  # as above


def test_nothing_stays_in_memory_after_use(family: str, tiny_model: Callable[..., Path]) -> None:
    model = ModelHandle(ModelOptions(path=str(tiny_model(family))))
    before = {name for name, parameter in model.model.named_parameters() if parameter.is_meta}
    streamed_logits(model)
    with model.materialized():
        pass
    after = {name for name, parameter in model.model.named_parameters() if parameter.is_meta}
    assert after == before == {name for name, _ in model.model.named_parameters()}


def test_a_model_of_one_block_streams_too(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama", num_hidden_layers=1)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder).eval()(TOKENS).logits
    streamed = streamed_logits(ModelHandle(ModelOptions(path=str(folder))))
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


def test_a_folder_without_weights_is_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    (folder / "model.safetensors").unlink()
    with pytest.raises(QtoolError, match=r"no weights; expected model\.safetensors"):
        ModelHandle(ModelOptions(path=str(folder)))


def test_a_truncated_file_is_refused(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("llama")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(QtoolError, match="truncated or no safetensors file"):
        ModelHandle(ModelOptions(path=str(folder)))
