"""Laws of the methods that see a model: calibrations, transforms, distillation losses, evaluations and exports.

They are checked on a two-block Llama of random weights, in float32, made anew for every law.
"""

import fnmatch
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.artifact import Finding, Metric, Record, Sample
from qtool.calibration.statistics import LayerStats
from qtool.calibration.tokens import ASSETS
from qtool.formats.scheme import Scheme
from qtool.formats.target import Target
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.quant_linear import QuantLinear
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.rotated_network import RotatedNetwork
from qtool.model.rotation import Places, Rotations, Trial, block_edits, find_places, outer_change
from qtool.model.sizes import export_size
from qtool.model.store import save_changes
from qtool.model.wiring import Edits, change_of_output, find_scalings
from qtool.options import ModelOptions, Options
from qtool.registry import Method

UNCHANGED = 1e-5  # relative change of a block's float32 output that rounding explains
SAMPLE_CHOICES: dict[str, Any] = {  # what required or costly options are set to, by name
    "scheme": "w4a16g32",
    "source": "demo:test",
    "samples": 2,
    "length": 32,
    "tasks": ["demo_cloze"],
    "limit": 4,
    "steps": 10,
    "drop": 1,
    "neurons": 64,
    "heads": 2,
    "keep": 3,
    "parameters": 0.9,
    "candidates": 8,
    "bins": 2,
    "clusters": 2,
    "submodels": {"small": {"blocks": 1, "neurons": 64}},
    "target": {"source": "demo:validation"},
    "sources": [{"source": "demo:test"}, {"source": "demo:validation"}],
}
BLOCK_SCHEMES = ("w4a16g32", "w2a16g32-asym")
EXPORT_SCHEMES = ("w4a16g32",)


def sample_options(method: Method, **stated: object) -> Options:
    """Options of a method that make it cheap, but for those stated; defaults elsewhere."""
    fields = method.options.model_fields
    chosen = {name: value for name, value in SAMPLE_CHOICES.items() if name in fields}
    if "heads" in chosen and fields["heads"].annotation is bool:
        del chosen["heads"]  # there it tells whether they are rotated, not how many stay
    if "scheme" in chosen and not fields["scheme"].is_required():
        del chosen["scheme"]  # it goes with another choice than the default
    return method.options.model_validate(chosen | stated)


@contextmanager
def tiny_checkpoint(family: str = "Llama", **fields: object) -> Iterator[Path]:
    """A folder with a random model, a Llama: hidden 64, ffn 128, 2 blocks, 4 heads of 16, 2 key/value heads."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        **fields,
    )
    with tempfile.TemporaryDirectory() as name, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        folder = Path(name) / "model"
        model.save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(ASSETS / "demo" / "model" / file, folder / file)
        yield folder


def sample_tokens() -> Tensor:
    return torch.randint(2, 4096, (3, 24), generator=torch.Generator().manual_seed(0))  # [samples, length]


# ---- quantize, a block at a time ----


def quantize_first_block(method: Method, folder: Path, scheme: str) -> tuple[Block, Tensor, Tensor, dict[str, QuantizedTensor]]:
    """The block, its inputs and outputs before it was changed [samples, length, hidden], and what the method made of it."""
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32", device="cpu"))
    hidden = model.embed(sample_tokens())
    block = model.block(0)
    targets = block.forward(hidden)
    options = sample_options(method, scheme=scheme)
    schemes = dict.fromkeys(block.linears(), Scheme.model_validate(scheme))
    found: dict[str, QuantizedTensor] = method.run(block, hidden, targets, schemes, options, 0, lambda text: None)
    return block, hidden, targets, found


def every_linear_of_the_block_is_quantized(method: Method) -> None:
    """Each gets its scheme, codes in range and a scale for every group; the block itself is left as it was."""
    with tiny_checkpoint() as folder:
        for scheme in method.schemes or BLOCK_SCHEMES:
            block, hidden, targets, found = quantize_first_block(method, folder, scheme)
            assert list(found) == list(block.linears()), f"{method.key} quantizes {', '.join(found)}"
            for name, tensor in found.items():
                low, high = tensor.scheme.grid.low, tensor.scheme.grid.high
                asked = tensor if tensor.salient is None else tensor.salient.tensor  # the scheme may be theirs alone
                assert asked.scheme == Scheme.model_validate(scheme).weights, f"{name}: the result has another scheme"
                assert tensor.shape == shape_of(block.get(name)), f"{name}: shape {tensor.shape}"
                assert low <= int(tensor.codes.min()) and int(tensor.codes.max()) <= high, f"{name}: codes out of range"
                base = replace(tensor, salient=None, column_scale=None, outliers=None)
                again = quantize(base.dequantize(), base.scheme, base.params())
                assert torch.equal(again.codes, base.codes), f"{name}: values are not on the grid of their params"
            assert torch.equal(block.forward(hidden), targets), f"{method.key} changes the block"


def quantizing_a_block_is_deterministic(method: Method) -> None:
    """Two runs with one seed give the same bits."""
    with tiny_checkpoint() as folder:
        first, second = (quantize_first_block(method, folder, (method.schemes or BLOCK_SCHEMES)[0])[-1] for _ in range(2))
        for name, tensor in first.items():
            is_same = torch.equal(tensor.codes, second[name].codes) and torch.equal(tensor.scale, second[name].scale)
            assert is_same, f"{method.key}: {name}: two runs differ"


def the_blocks_error_is_no_worse_than_roundings(method: Method) -> None:
    """The squared error of the block's output is at most that of rounding every linear to nearest."""
    with tiny_checkpoint() as folder:
        for scheme in method.schemes or BLOCK_SCHEMES:
            block, hidden, targets, found = quantize_first_block(method, folder, scheme)
            rounded = {name: quantize(weight_of(block.get(name)), tensor.scheme) for name, tensor in found.items()}
            losses = []
            for tensors in (found, rounded):
                with block.replaced({name: QuantLinear(tensor, None) for name, tensor in tensors.items()}):
                    losses.append(float((block.forward(hidden) - targets).square().mean()))
            # Sums in float32 end in the sixth digit.
            assert losses[0] <= losses[1] * (1 + 1e-5), f"{method.key}: {scheme}: error {losses[0]}, rounding's {losses[1]}"


# ---- transform ----


def transform_first_block(method: Method, folder: Path) -> tuple[Block, Tensor, Edits]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32", device="cpu"))
    hidden = model.embed(sample_tokens())
    block, options = model.block(0), sample_options(method, **({"scheme": method.schemes[0]} if method.schemes else {}))
    scalings, needs = find_scalings(block, hidden[:1]), method.needed(options)
    edits: Edits
    if "inputs" in needs:
        edits = method.run(block, scalings, hidden, block.forward(hidden), options, 0, lambda text: None)
    else:
        stats = {name: LayerStats(shape_of(linear)[1], needs) for name, linear in block.linears().items()}
        block.forward_observed(hidden, stats)
        edits = method.run(block, scalings, stats, options, lambda text: None)
    return block, hidden, edits


def transforming_keeps_the_output(method: Method) -> None:
    """The block computes the same before any rounding, and something was edited."""
    with tiny_checkpoint() as folder:
        block, hidden, edits = transform_first_block(method, folder)
        assert edits, f"{method.key} edits nothing"
        names = {f"{block.name}.{name}": p.shape for name, p in block.module.named_parameters()}
        for name, value in edits.items():
            assert name in names, f"{name} is no parameter of {block.name}"
            assert value.shape == names[name], f"{name}: shape {tuple(value.shape)}, must be {tuple(names[name])}"
        change = change_of_output(block, hidden[:1], edits)
        assert change <= UNCHANGED, f"the block's output changes by {change:.1e}"


def transforming_is_deterministic(method: Method) -> None:
    """Two runs give the same bits."""
    with tiny_checkpoint() as folder:
        first, second = (transform_first_block(method, folder)[2] for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first), "two runs differ"


# ---- transform, of a whole model ----


def rotate_model(method: Method, folder: Path) -> tuple[ModelHandle, Places, Rotations]:
    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32", device="cpu"))
    options = sample_options(method)
    places = find_places(model, sample_tokens()[:1], with_scalings="inputs" in method.needed(options))
    rotations: Rotations
    if "inputs" in method.needed(options):
        with model.materialized() as module:
            network = RotatedNetwork(model, module.float(), places, sample_tokens())
            rotations = method.run(places, network, options, 0, lambda text: None)
    else:
        rotations = method.run(places, options, 0, lambda text: None)
    return model, places, rotations


def rotations_are_orthogonal(method: Method) -> None:
    """Every matrix keeps lengths, signs are ±1, scales are above zero, and something is rotated."""
    with tiny_checkpoint() as folder:
        _, _, rotations = rotate_model(method, folder)
        residual = [] if rotations.residual is None else [rotations.residual]
        matrices = [*residual, *(R for heads in rotations.heads.values() for R in heads)]
        assert matrices or rotations.inputs, f"{method.key} rotates nothing"
        for Q in matrices:
            error = float((Q.T @ Q - torch.eye(len(Q), dtype=Q.dtype)).abs().max())
            assert error <= 1e-5, f"a rotation of {len(Q)} is {error:.1e} away from an orthogonal matrix"
        for name, signs in rotations.inputs.items():
            assert bool((signs.abs() == 1).all()), f"{name}: signs are not ±1"
        for name, s in rotations.scales.items():
            assert bool((s > 0).all()), f"{name}: scales are not above zero"


def rotating_keeps_every_unit(method: Method) -> None:
    """Every block, embedding and head, on rotated input, give their output rotated; something was edited."""
    with tiny_checkpoint() as folder:
        model, places, rotations = rotate_model(method, folder)
        tokens, units = sample_tokens()[:1], iter(places.blocks)
        hidden = model.embed(tokens)
        for block in model.blocks():
            edits = block_edits(block, next(units), rotations)
            assert edits, f"{method.key} edits nothing in {block.name}"
            change = Trial(block, hidden).change(edits, rotations)
            assert change <= UNCHANGED, f"the output of {block.name} changes by {change:.1e}"
            hidden = block.forward(hidden)
        if rotations.residual is not None:
            with model.outer():
                edits = block_edits(Block(model, -1, model.model, ""), places.outer, rotations)
            change = outer_change(model, tokens, hidden, edits, rotations.residual)
            assert change <= UNCHANGED, f"embedding or head change by {change:.1e}"


def rotating_is_deterministic(method: Method) -> None:
    """Two runs with one seed give the same bits."""
    with tiny_checkpoint() as folder:
        first, second = (rotate_model(method, folder)[2] for _ in range(2))
        pairs = [(first.residual, second.residual)] if first.residual is not None else []
        pairs += [(first.heads[name], second.heads[name]) for name in first.heads]
        pairs += [(first.inputs[name], second.inputs[name]) for name in first.inputs]
        pairs += [(first.scales[name], second.scales[name]) for name in first.scales]
        assert all(b is not None and torch.equal(a, b) for a, b in pairs), "two runs differ"


# ---- distill ----


def the_loss_is_smallest_at_the_teacher(method: Method) -> None:
    """Equal logits cost least, and moving away from them costs more."""
    options, random = sample_options(method), torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 6, 11, generator=random)  # [samples, length, vocab]
    away = torch.randn(2, 6, 11, generator=random)
    labels = teacher.argmax(-1)  # [samples, length]
    losses = [float(method.run(teacher + step * away, Target(teacher), labels, options)) for step in (0.0, 0.5, 1.0)]
    assert losses == sorted(losses) and losses[0] < losses[1], f"losses by distance: {losses}"


def the_gradient_is_finite(method: Method) -> None:
    """A scalar with finite gradients, for ordinary and for extreme logits."""
    options = sample_options(method)
    for size in (1.0, 1e4):
        teacher = size * torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0))
        student = (-teacher).requires_grad_(True)
        loss = method.run(student, Target(teacher), teacher.argmax(-1), options)
        assert loss.shape == (), f"the loss has shape {tuple(loss.shape)}, must be a scalar"
        (gradient,) = torch.autograd.grad(loss, student)
        assert bool(torch.isfinite(gradient).all()), f"gradients are not finite at logits of size {size:g}"


# ---- calibrate ----


def calibrating_gives_the_windows_asked_for(method: Method) -> None:
    """As many windows as asked for, of that length, of tokens that the model knows; and the model is as it was."""
    with tiny_checkpoint() as folder:
        model, options = ModelHandle(ModelOptions(path=str(folder), device="cpu")), sample_options(method)
        before = model.final_hidden(sample_tokens()).clone()
        tokens = method.run(model, options, 0)
        asked = options.model_dump()
        assert tokens.shape == (asked["samples"], asked["length"]), f"{tuple(tokens.shape)} windows and tokens"
        assert tokens.dtype == torch.int64 and 0 <= int(tokens.min()) and int(tokens.max()) < 4096, "no tokens of the model"
        assert torch.equal(model.final_hidden(sample_tokens()), before), "the model computes something else afterwards"


def calibrating_repeats(method: Method) -> None:
    """The same seed gives the same windows, in a model of its own too."""
    with tiny_checkpoint() as folder:
        first, second = (
            method.run(ModelHandle(ModelOptions(path=str(folder), device="cpu")), sample_options(method), 3) for _ in range(2)
        )
        assert torch.equal(first, second), "the same seed gives other windows"


# ---- evaluate ----


def evaluating_repeats(method: Method) -> None:
    """Two evaluations give the same metrics, and the model is as it was between them."""
    with tiny_checkpoint() as folder:
        model = ModelHandle(ModelOptions(path=str(folder), device="cpu"))
        before = model.final_hidden(sample_tokens()).clone()
        first, second = (method.run(model, model, sample_options(method), 0) for _ in range(2))
        first, second = ([one for one in found if not isinstance(one, Record)] for found in (first, second))  # dated
        if not method.repeats:
            assert [_without_value(one) for one in first] == [_without_value(one) for one in second], "other figures"
        else:
            assert first == second, f"{first} and {second} differ"
        assert torch.equal(model.final_hidden(sample_tokens()), before), "the model computes something else afterwards"
        metrics = [one for one in first if not isinstance(one, Sample)]
        assert metrics, "nothing was measured"
        for metric in metrics:
            assert isinstance(metric, Metric) and math.isfinite(metric.value) and metric.unit, f"{metric} is no metric"
            told = method.measures is None or any(fnmatch.fnmatchcase(metric.name, name) for name in method.measures)
            assert told, f"{metric.name} is not among what the method says it measures: {method.measures}"


def _without_value(found: Finding) -> Finding:
    return replace(found, value=0.0, stderr=None, parts=None) if isinstance(found, Metric) else found


# ---- export ----


def exported_bytes_are_the_model(method: Method) -> None:
    """The export, read back from disk, gives the logits of the model in memory; digests and size are those of its files."""
    tokens = sample_tokens()
    for scheme in method.schemes or EXPORT_SCHEMES:
        with tiny_checkpoint() as folder, tempfile.TemporaryDirectory() as out:
            model = rounded_model(folder, Path(out) / "changes", scheme)
            target = Path(out) / "export"
            target.mkdir()
            artifact = method.export(model, target, sample_options(method))
            told = export_size(method, model, model.schemes(), sample_options(method))
            room = 0.01 * artifact.bytes + 8192  # what card, manifest and headers may take of so small a model
            assert artifact.bytes <= told <= artifact.bytes + room, f"{told} bytes are told, {artifact.bytes} are written"
            reloaded = ModelHandle(ModelOptions(path=str(target), device="cpu"))
            expected, found = logits_of(model, tokens), logits_of(reloaded, tokens)
            error = float((found - expected).norm() / expected.norm())
            assert error <= 1e-3, f"logits of the export are {error:.1e} away"


def rounded_model(folder: Path, changes: Path, word: str) -> ModelHandle:
    """The tiny model with every linear of its blocks rounded to a scheme."""
    model, scheme = ModelHandle(ModelOptions(path=str(folder), device="cpu")), Scheme.model_validate(word)
    for block in model.blocks():
        rounded = {f"{name}.weight": quantize(weight_of(x), scheme.weights) for name, x in block.linears().items()}
        save_changes(changes / f"block_{block.index:03d}.safetensors", {k: (v, scheme) for k, v in rounded.items()})
    return ModelHandle(model.options, (changes,))


def logits_of(model: ModelHandle, tokens: Tensor) -> Tensor:
    """Logits [samples, length, vocab], float32."""
    hidden = model.final_hidden(tokens)
    with model.outer():
        return model.logits(hidden).float()
