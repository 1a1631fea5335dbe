"""What a method of scope shape does: it chooses what stays of a model, and a smaller one is written, unit by unit.

The step's folder then holds a config.json and, for every unit of the smaller model, all of its tensors; a ModelHandle with such
a folder among its changes is that model (see handle.py), so that later steps, evaluations and exports need to know nothing of
it. Resume: the choice is kept, units that stand are not written again, and config.json comes last.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.calibration.importance import Importance
from qtool.errors import QtoolError
from qtool.linalg.divergence import kl
from qtool.model.cutting import Cut, Cutter
from qtool.model.handle import CONFIG, ModelHandle
from qtool.model.shape import Shape, shape_of_model
from qtool.model.store import save_changes, write_atomically, write_text
from qtool.pipeline.blockwise import before_step
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.rotation import trial_tokens
from qtool.progress import Progress
from qtool.registry import Method

KEPT, FACTS = "cut.safetensors", "cut.json"  # what was chosen
TRIED = "tried.json"  # scores of candidates, until the step is done
SCORED = 16  # windows that candidates are scored on


def run_shaping(
    model: ModelHandle, method: Method, options: Any, tokens: Tensor, seed: int, folder: StepFolder, progress: Progress
) -> dict[str, Any]:
    """Carry the step through, going on after the units that are done; returns what was chosen, and fallbacks."""
    before = before_step(model, folder)
    try:
        if not (folder.path / FACTS).is_file():
            decide(before, method, options, tokens, folder, progress)
        record = json.loads((folder.path / FACTS).read_text(encoding="utf-8"))
        cut = Cut.from_tensors(Shape(**record["shape"]), load_file(folder.path / KEPT), record["facts"])
        cutter = Cutter(before, cut)
        progress.stage(method.key, len(cut.blocks) + 1)
        write_cut(cutter, folder.path, progress.advance)
    except QtoolError as error:
        raise QtoolError(f"{method.key}: {error}") from error
    (folder.path / TRIED).unlink(missing_ok=True)  # the choice stays: a run killed before the step is recorded asks for it
    shape = {
        "before": asdict(shape_of_model(before)),
        "after": asdict(cut.shape),
        "parameters": cutter.target.n_parameters(),
        "blocks": list(cut.blocks),
    }
    return {"linears": [], "fallbacks": record["fallbacks"], "learned": {"shape": shape, **cut.facts}}


def decide(before: ModelHandle, method: Method, options: Any, tokens: Tensor, folder: StepFolder, progress: Progress) -> None:
    """Ask the method what stays and keep its answer in the step's folder."""
    notes: list[str] = []
    progress.stage(f"{method.key}: what each unit does", before.n_blocks)
    left = iter(range(before.n_blocks))  # a method may look several times

    def advance() -> None:
        if next(left, None) is not None:
            progress.advance()

    importance = Importance(before, tokens, advance, Trials(before, tokens, folder.path))
    cut: Cut = method.run(importance, options, notes.append)
    for _ in left:
        progress.advance()
    stored = cut.to_tensors()
    write_atomically(folder.path / KEPT, lambda temporary: save_file(stored, temporary))
    record = {"shape": asdict(cut.shape), "facts": cut.facts, "fallbacks": notes}
    write_text(folder.path / FACTS, json.dumps(record, indent=1))


def write_cut(cutter: Cutter, path: Path, advance: Callable[[], None] = lambda: None) -> None:
    """Write every unit of the smaller model that `path` has not, each tried, then its config."""
    model, cut = cutter.model, cutter.cut
    sample = trial_tokens(model)
    hidden = model.embed(sample)  # [1, length, hidden]
    for old in range(model.n_blocks):
        block = model.block(old)
        if old in cut.blocks:
            index = cut.blocks.index(old)
            unit = path / f"block_{index:03d}.safetensors"
            if not unit.is_file():
                cutter.try_block(block, index, hidden)
                save_changes(unit, dict(cutter.block_tensors(block, index)))
            advance()
        hidden = block.forward(hidden)
        model.release(old)
    unit = path / "outer.safetensors"
    if not unit.is_file():
        with model.outer():
            cutter.try_outer(sample, hidden)
        with model.outer():
            save_changes(unit, dict(cutter.outer_tensors()))
    write_text(path / CONFIG, json.dumps(cutter.fields, indent=2) + "\n")
    advance()


class Trials:
    """Scores cuts: each is written beside the step's units, measured on the first windows, and deleted; scores are kept."""

    def __init__(self, model: ModelHandle, tokens: Tensor, path: Path) -> None:
        self._model, self._tokens, self._path = model, tokens[:SCORED], path

    @torch.no_grad()
    def __call__(self, cut: Cut) -> float:
        """KL of the model so cut from the model as it is, nats a token."""
        record, candidate = self._path / TRIED, self._path / "candidate"
        known: dict[str, float] = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        if (key := str(cut.shape)) in known:
            return known[key]
        shutil.rmtree(candidate, ignore_errors=True)
        write_cut(Cutter(self._model, cut), candidate)
        smaller = ModelHandle(self._model.options, (*self._model.changes, candidate))
        original, hidden = self._model.final_hidden(self._tokens), smaller.final_hidden(self._tokens)
        total = 0.0
        with self._model.outer(), smaller.outer():
            for p, q in zip(original.split(1), hidden.split(1), strict=True):  # one window's logits at a time
                total += float(kl(self._model.logits(p)[0, :-1], smaller.logits(q)[0, :-1]).double().mean())
        shutil.rmtree(candidate)
        write_text(record, json.dumps({**known, key: total / len(self._tokens)}))
        return total / len(self._tokens)
