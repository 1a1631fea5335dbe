"""What a transform of scope model does: rotations found for the whole model, then applied to one block after the other.

First every block is looked at, so that a model that cannot be rotated is refused before anything changes; then the method
answers with its rotations, which are kept in the step's folder until the step is done, and each unit is changed, tried against
what it was and saved. A run that was killed goes on at the first unit that is not saved.
"""

from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qtool.errors import QtoolError
from qtool.formats.rotations import InputRotation, LearnedRotations
from qtool.model.handle import Block, ModelHandle
from qtool.model.memory import return_free_memory
from qtool.model.rotated_network import RotatedNetwork
from qtool.model.rotation import (
    TOLERANCE,
    Places,
    Rotations,
    Trial,
    UnitPlaces,
    block_edits,
    find_places,
    outer_change,
    stored_edits,
)
from qtool.model.store import ROTATION, save_changes, write_atomically
from qtool.pipeline.blockwise import before_step, collect
from qtool.pipeline.folder import StepFolder
from qtool.pipeline.work import Work
from qtool.progress import Progress
from qtool.registry import Method

KEPT = "rotations.safetensors"  # until the step is done
LENGTH = 32  # tokens that the trials look at; rotations hold for all or none


def run_rotation(
    model: ModelHandle, method: Method, options: Any, tokens: Tensor | None, seed: int, folder: StepFolder, progress: Progress
) -> dict[str, Any]:
    """Carry the step through the model, going on after the units that are done; returns linears and fallbacks."""
    original = before_step(model, folder)
    if quantized := original.schemes():
        raise QtoolError(f"{method.key}: {next(iter(quantized))} is quantized already; rotate first, then quantize")
    n_updates = options.steps if isinstance(options, LearnedRotations) else 0
    progress.stage(method.key, original.n_blocks + 1 + n_updates)
    sample = trial_tokens(original)
    rounds_cache = isinstance(options, LearnedRotations) and options.cache is not None
    places = find_places(original, sample, with_scalings="inputs" in method.needed(options), with_keys=rounds_cache)
    if (folder.path / KEPT).is_file():
        for _ in range(n_updates):
            progress.advance()
    else:
        answer(original, method, options, places, tokens, seed, folder, progress)
    rotations = kept_rotations(original, folder)
    hidden = original.embed(sample)
    for index in range(original.n_blocks):
        block, unit = original.block(index), f"block_{index:03d}"
        if not folder.unit(unit).is_file():
            turn_block(block, places.blocks[index], rotations, hidden, method, Work(original.unit_changes(unit)), folder, unit)
        hidden = block.forward(hidden)
        original.release(index)
        progress.advance(block.name)
    if not folder.unit("outer").is_file():
        turn_outer(original, places.outer, rotations, sample, hidden, method, folder)
    progress.advance("embedding and head")
    (folder.path / KEPT).unlink(missing_ok=True)
    return {**collect(model, folder), "learned": folder.records("outer")["learned"]}


def trial_tokens(model: ModelHandle) -> Tensor:
    """Tokens [1, length] drawn from all of the vocabulary, the same for every run."""
    vocab = int(model.config.get_text_config().vocab_size)
    return torch.randint(vocab, (1, LENGTH), generator=torch.Generator().manual_seed(0))


def answer(
    model: ModelHandle,
    method: Method,
    options: Any,
    places: Places,
    tokens: Tensor | None,
    seed: int,
    folder: StepFolder,
    progress: Progress,
) -> None:
    """Ask the method for its rotations and keep them in the step's folder."""
    notes: list[str] = []
    try:
        if "inputs" in method.needed(options):
            assert tokens is not None, "the recipe check asks for a calibrate step before what needs inputs"
            with model.materialized() as module:
                network = RotatedNetwork(model, module.float(), places, tokens, progress.advance)
                rotations: Rotations = method.run(places, network, options, seed, notes.append)
        else:
            rotations = method.run(places, options, seed, notes.append)
    except QtoolError as error:
        raise QtoolError(f"{method.key}: {error}") from error
    whole = {} if rotations.residual is None else {"residual": rotations.residual}
    whole |= {f"heads:{name}": R for name, R in rotations.heads.items()}
    whole |= {f"scales:{name}": s for name, s in rotations.scales.items()}
    whole |= {f"keys:{name}": s for name, s in rotations.keys.items()}
    whole |= {f"inputs:{name}": signs for name, signs in rotations.inputs.items()}
    learned = {"losses": list(rotations.losses), "qsur": rotations.qsur}
    folder.write_records("outer", {"linears": [], "fallbacks": notes, "learned": learned if rotations.losses else {}})
    stored = {name: tensor.contiguous().cpu() for name, tensor in whole.items()}
    write_atomically(folder.path / KEPT, lambda temporary: save_file(stored, temporary))


def kept_rotations(model: ModelHandle, folder: StepFolder) -> Rotations:
    """The rotations that the method answered, on the model's device."""
    found = {name: tensor.to(model.device) for name, tensor in load_file(folder.path / KEPT).items()}
    kinds = ("heads:", "inputs:", "scales:", "keys:")
    heads, inputs, scales, keys = ({n.split(":", 1)[1]: t for n, t in found.items() if n.startswith(kind)} for kind in kinds)
    return Rotations(found.get("residual"), heads, inputs, scales, keys)


def turn_block(
    block: Block,
    places: UnitPlaces,
    rotations: Rotations,
    hidden: Tensor,
    method: Method,
    work: Work,
    folder: StepFolder,
    unit: str,
) -> None:
    """Rotate one block and save it, unless it would compute something else; hidden [1, length, hidden] is what it is fed."""
    edits = block_edits(block, places, rotations)
    check(method, block.name, Trial(block, hidden).change(edits, rotations))
    work.changes |= stored_edits(block, edits)
    for name in places.inputs:
        if name in rotations.inputs:
            work.changes[f"{name}{ROTATION}"] = InputRotation(rotations.inputs[name].to(torch.int8))
    folder.write_records(unit, {"linears": work.linears, "fallbacks": work.fallbacks})
    save_changes(folder.unit(unit), work.changes)
    return_free_memory()


def turn_outer(
    model: ModelHandle,
    places: UnitPlaces,
    rotations: Rotations,
    sample: Tensor,
    hidden: Tensor,
    method: Method,
    folder: StepFolder,
) -> None:
    """The same of embedding, last norm and head, which are parted where they were one; hidden is the last block's output."""
    changes = model.unit_changes("outer")
    if rotations.residual is not None:
        with model.outer():
            outside = Block(model, -1, model.model, "")
            edits = block_edits(outside, places, rotations)
            changes |= stored_edits(outside, edits)
        change = outer_change(model, sample, hidden, edits, rotations.residual)
        check(method, "what stands outside the blocks", change)
    save_changes(folder.unit("outer"), changes)


def check(method: Method, name: str, change: float) -> None:
    """Raise QtoolError where a rotated unit computes something else."""
    if not change <= TOLERANCE:
        raise QtoolError(
            f"{method.key}: {name}: its output, rotated back, would change by {change:.1e}, more than {TOLERANCE:.0e}; "
            "nothing of the step is used. Leave it away for this model"
        )
