"""Windows that a model writes: begun with given tokens, continued by draws from its own predictions."""

from collections.abc import Callable
from pathlib import Path

import torch

from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.generation import BEGUN, write_windows
from qtool.progress import Silent

TOKENS = torch.randint(2, 4096, (3, 40), generator=torch.Generator().manual_seed(0))  # [samples, length]


def test_every_window_begins_as_given_text_does(tiny_model: Callable[..., Path]) -> None:
    with ModelHandle(ModelOptions(path=str(tiny_model("llama")))).materialized() as model:
        written = write_windows(model, TOKENS, 70, 0, Silent())
        again = write_windows(model, TOKENS, 70, 0, Silent())
    assert written.shape == (70, 40) and torch.equal(written, again)
    pieces = TOKENS.unfold(1, BEGUN, 1).flatten(0, 1)  # [places, begun]
    assert all((pieces == row).all(1).any() for row in written[:, :BEGUN])
    assert len({tuple(row) for row in written.tolist()}) == 70


def test_tokens_are_drawn_as_the_model_predicts_them_with_and_without_its_cache() -> None:
    """Mean loss of what it wrote is the mean entropy of its predictions, within the spread of draws."""
    handle = ModelHandle(ModelOptions(path="demo"))
    with handle.materialized() as model, torch.no_grad():
        text = torch.tensor(handle.tokenizer("import os\nimport sys\n\n\ndef main():\n    return 0\n" * 4)["input_ids"])
        written = write_windows(model, text[:40].unsqueeze(0), 48, 0, Silent())
        p = model(written).logits[:, BEGUN - 1 : -1].float().log_softmax(-1)  # [windows, length - begun, vocab]
    losses = -p.gather(-1, written[:, BEGUN:, None]).squeeze(-1).flatten()
    entropies = -(p.exp() * p).sum(-1).flatten()
    spread = (losses - entropies).std() / len(losses) ** 0.5
    assert abs(losses.mean() - entropies.mean()) < 4 * spread
