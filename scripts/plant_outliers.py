#!/usr/bin/env python3
"""Write a checkpoint that computes what the original does, with outliers planted in its activations.

    python scripts/plant_outliers.py --kind gains --strength 64 --channels 4 --out build/planted
    python scripts/plant_outliers.py --kind residual --out build/turned --model path/to/model

Trained models have few input channels that are far larger than the rest, small ones such as the demo have fewer, so that
methods against outliers have nothing to show on them. Three exact transforms plant some, --channels of each place, by --seed:
    gains     norms' gains times --strength, the columns of the linears that they feed divided by it
    hidden    rows of up and value projections times --strength, columns of down and output projections divided by it
    residual  the residual stream turned into the eigenbasis of the mean of x xᵀ over what blocks are fed, tokens at length 1,
              so that few channels carry most of it; gains are folded into the linears first. Folding undoes gains, not this.
Residual turns embedding, readers, writers and head by one orthogonal matrix, which norms must commute with: RMSNorm alone.
Why float32 is written: turned weights have no bfloat16 that computes the same. Strengths that are powers of two change no bit
of a weight but its exponent.
The logits of what was written are compared with the original's, both in float32; more change than a ten-thousandth is refused.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.errors import QtoolError
from qtool.model.architectures import gain_offset
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import is_linear, shape_of, weight_of
from qtool.model.store import Changes, save_changes
from qtool.model.wiring import Edits, Scaling, apply_edits, edited_bias, edited_weight, find_scalings, scale_edits
from qtool.model.writer import write_checkpoint
from qtool.options import ModelOptions

TOLERANCE = 1e-4  # relative change of the logits that float32 explains


def scaled(block: Block, scalings: list[Scaling], kind: str, strength: float, n: int, random: torch.Generator) -> Edits:
    """Edits of a block with n channels of every place `strength` times as large; raises QtoolError where there are fewer."""
    edits: Edits = {}
    for scaling in scalings:
        if is_linear(block.get(scaling.source)) != (kind == "hidden"):
            continue
        n_channels = int(scaling.spread.max()) + 1
        if n > n_channels:
            raise QtoolError(f"--channels {n}: {scaling.source} has {n_channels}; write fewer")
        s = torch.ones(n_channels)
        s[torch.randperm(n_channels, generator=random)[:n]] = 1 / strength
        scale_edits(block, scaling, s, edits)
    return edits


def turned(block: Block, scalings: list[Scaling], Q: Tensor) -> Edits:
    """Edits of a block that reads and writes a residual stream turned by Q [hidden, hidden], gains folded."""
    edits: Edits = {}
    readers: set[str] = set()
    for scaling in scalings:
        norm = block.get(scaling.source)
        if not is_linear(norm):
            scale_edits(block, scaling, cast(Tensor, norm.weight).float() + gain_offset(norm), edits)
            readers |= set(scaling.consumers)
    for name, linear in block.linears().items():
        W, bias = edited_weight(block, name, edits), edited_bias(block, name, edits)  # [out, in]
        if name in readers:
            edits[f"{name}.weight"] = (W.double() @ Q).float()
        elif shape_of(linear)[0] == len(Q):
            edits[f"{name}.weight"] = (Q.T @ W.double()).float()
            if bias is not None:
                edits[f"{name}.bias"] = (bias.double() @ Q).float()
    return edits


def turned_outside(model: ModelHandle, Q: Tensor) -> Changes:
    """Embedding and head for the same stream, the last norm's gain folded into the head."""
    with model.outer():
        embedding, head = model.model.get_input_embeddings(), model.model.get_output_embeddings()
        assert embedding is not None and head is not None, "a causal language model has both"
        names = {module: name for name, module in model.model.named_modules()}
        parent = model.model.get_submodule(model.blocks_name.rpartition(".")[0])
        norms = [module for module in parent.children() if "Norm" in type(module).__name__]
        if len(norms) != 1 or getattr(norms[0], "bias", None) is not None:
            raise QtoolError("--kind residual: one RMSNorm must stand before the head, and nothing else; use another kind")
        gain = cast(Tensor, norms[0].weight).float() + gain_offset(norms[0])
        return {
            f"{names[embedding]}.weight": (cast(Tensor, embedding.weight).double() @ Q).float(),
            f"{names[head]}.weight": ((weight_of(head) * gain).double() @ Q).float(),
            f"{names[norms[0]]}.weight": torch.ones_like(gain) - gain_offset(norms[0]),
        }


def eigenbasis(model: ModelHandle, tokens: Tensor) -> Tensor:
    """Q [hidden, hidden], float64: the directions of the blocks' inputs, the strongest first."""
    hidden, total = model.embed(tokens), torch.zeros(())
    for block in model.blocks():
        x = hidden.flatten(0, 1).double()  # [tokens, hidden]
        x = x / x.norm(dim=1, keepdim=True).clamp(min=1e-30)
        total = total + x.T @ x
        hidden = block.forward(hidden)
    Q: Tensor = torch.linalg.eigh(total).eigenvectors  # the weakest first
    return Q.flip(1)


def plant(
    model: ModelHandle, tokens: Tensor, kind: str, strength: float, n_channels: int, seed: int, folder: Path
) -> ModelHandle:
    """The model with outliers, its changes in `folder`; tokens [samples, length]."""
    random, hidden = torch.Generator().manual_seed(seed), model.embed(tokens[:1])
    Q = eigenbasis(model, tokens) if kind == "residual" else None
    for block in model.blocks():
        scalings = find_scalings(block, hidden)
        edits = scaled(block, scalings, kind, strength, n_channels, random) if Q is None else turned(block, scalings, Q)
        if not edits:
            raise QtoolError(f"--kind {kind}: {block.name} has no place for it; use another kind")
        hidden = block.forward(hidden)
        apply_edits(block.module, block.name, edits)
        changed = {name: block.module.get_parameter(name.removeprefix(f"{block.name}.")).data for name in edits}
        save_changes(folder / f"block_{block.index:03d}.safetensors", dict(changed))
    if Q is not None:
        save_changes(folder / "outer.safetensors", turned_outside(model, Q))
    return ModelHandle(model.options, (folder,))


def largest_ratios(model: ModelHandle, tokens: Tensor) -> dict[str, float]:
    """Largest magnitude over mean magnitude of each kind of linear's input, in the block where it is most."""
    found: dict[str, float] = {}
    hidden = model.embed(tokens)
    for block in model.blocks():
        stats = {name: LayerStats(shape_of(linear)[1], ("amax", "mean_abs")) for name, linear in block.linears().items()}
        hidden = block.forward_observed(hidden, stats)
        for name, seen in stats.items():
            last = name.rpartition(".")[2]
            ratio = float(seen.amax().max() / seen.mean_abs().mean().clamp(min=1e-30))
            found[last] = max(found.get(last, 0.0), ratio)
    return found


def logits_of(model: ModelHandle, tokens: Tensor) -> Tensor:
    """Logits [samples, length, vocab], float32."""
    hidden = model.final_hidden(tokens)
    with model.outer(), torch.no_grad():
        return model.logits(hidden).float()


def write(options: argparse.Namespace) -> None:
    """Plant, write, compare; raises QtoolError, and leaves nothing behind, where the output would change."""
    if options.kind == "residual" and (options.strength is not None or options.channels is not None):
        raise QtoolError("--kind residual turns the whole stream and has no strength or channels; leave both away")
    if options.out.exists():
        raise QtoolError(f"--out {options.out} exists already; name a folder that does not")
    model = ModelHandle(ModelOptions(path=options.model, dtype="float32", device="cpu"))
    if options.kind == "residual" and model.is_tied:
        raise QtoolError("--kind residual: head and embedding are one tensor, so that no gain can be folded; use another kind")
    text = TextOptions(source=options.source, samples=options.samples, length=options.length)
    tokens = read_tokens(text, model.tokenizer, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        strength, n_channels = options.strength or 32.0, options.channels or 4
        planted = plant(model, tokens, options.kind, strength, n_channels, options.seed, Path(folder))
        options.out.mkdir(parents=True)
        write_checkpoint(planted, options.out)
    written = ModelHandle(ModelOptions(path=str(options.out), dtype="float32", device="cpu"))
    before, after = logits_of(model, tokens[:4]), logits_of(written, tokens[:4])
    change = float((after - before).norm() / before.norm())
    if not change <= TOLERANCE:
        shutil.rmtree(options.out)
        raise QtoolError(f"--kind {options.kind}: the logits would change by {change:.1e}, so that nothing was kept")
    print(f"{options.out}: relative change of the logits {change:.1e}")
    then, now = largest_ratios(model, tokens), largest_ratios(written, tokens)
    for name, ratio in now.items():
        print(f"  {name:12} largest input over the mean magnitude: {then[name]:.0f} -> {ratio:.0f}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kind", choices=("gains", "hidden", "residual"), required=True)
    parser.add_argument("--strength", type=float, help="times that a channel grows; default 32; not for residual")
    parser.add_argument("--channels", type=int, help="channels of each place; default 4; not for residual")
    parser.add_argument("--seed", type=int, default=0, help="which channels, and which text")
    parser.add_argument("--model", default="demo", help="demo, a local folder, or a hub id")
    parser.add_argument("--source", default="demo:calibration", help="text that the stream's directions are found on")
    parser.add_argument("--samples", type=int, default=16, help="windows of it")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which does not exist yet")
    options = parser.parse_args(arguments)
    for name in ("strength", "channels"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name} {value} must be greater than 0")
    try:
        write(options)
    except QtoolError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
