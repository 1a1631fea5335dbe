"""Quantize a checkpoint with llmcompressor for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-llmcompressor/bin/python run_llmcompressor.py JOB.json

Methods: rtn, gptq, awq, autoround; before rtn and gptq also transforms, with a hyphen: smoothquant-, hadamard- (SpinQuant's
rotations R1, R2 and R4, random Hadamard matrices, which it does not learn) and quip- (the inputs of all linears rotated while
the model runs).
Of a sparse job: sparsegpt, wanda, with the job's sparsity and pattern and else the modifiers' defaults.
Settings are the tool's own: the scheme is its W4A16 preset (W4A16_ASYM if asymmetric) at the job's bits and group, or
NVFP4A16; with inputs rounded those of its presets W8A8, W4A8, W4A4, W4AFP8, NVFP4 and MXFP4. Modifiers keep their defaults
(GPTQ: static activation order, 1% damping; AWQ: its mappings, 20 grid points, duo scaling, then plain rounding; AutoRound: 200
iterations of 8 windows; SmoothQuant: strength 0.8, as in its examples) unless `options` names an argument of the method's
modifier. AutoRound runs without its `enable_torch_compile`, which takes three times as long on a CPU. Its zero points do not
reach the layers (the modifier maps scales alone), so only symmetric jobs make sense.
Dequantization: the tool's own codes (its `quantize`, as its exporter calls it) times its scales, in float32.
Bits per weight: of the checkpoint it saves, in the compressed-tensors format.

Patch: `torch.Tensor.pin_memory` returns its tensor. AWQ pins its cached activations unasked before each grid search
(`IntermediatesCache.pin_memory`), which raises where there is no accelerator. Pinning changes no value.
"""

import os
import time
import warnings
from importlib.metadata import version
from typing import TYPE_CHECKING

import peer_job
import torch
from peer_job import Cost, Job, Outcome
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme


def scheme_of(job: Job) -> "QuantizationScheme":
    """What all linears get: the tool's arguments for weights, and for inputs where the job rounds them."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import INT8_W8A8, MXFP4, NVFP4, W4AFP8

    presets = {"nvfp4": NVFP4, "mxfp4": MXFP4}
    if job.format in presets:
        weights = presets[job.format]["weights"]
    else:
        strategy = "channel" if job.group is None else "group"
        weights = QuantizationArgs(num_bits=job.bits, strategy=strategy, group_size=job.group, symmetric=job.symmetric)
    if job.inputs is None:
        return QuantizationScheme(targets=["Linear"], weights=weights)
    per_token = INT8_W8A8["input_activations"]
    presets |= {"int8": INT8_W8A8, "e4m3": W4AFP8, "int4": {"input_activations": per_token.model_copy(update={"num_bits": 4})}}
    return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=presets[job.inputs]["input_activations"])


def quantize(job: Job, model: PreTrainedModel, tokens: Tensor) -> tuple[float, str]:
    """Quantize or prune `model` in place with calibration tokens [samples, length]; returns wall seconds and a note."""
    from llmcompressor.modifiers.autoround import AutoRoundModifier
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import QuIPModifier, SmoothQuantModifier, SpinQuantModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    *transforms, rounding = job.method.split("-")
    if job.format == "sparse":
        return compress(model, tokens, [pruner(job, model)])
    target = {"config_groups": {"group_0": scheme_of(job)}, "ignore": peer_job.head_names(model)}
    if rounding == "awq":
        recipe = [AWQModifier(**job.options), QuantizationModifier(**target)]
    else:
        options = {"enable_torch_compile": False} if rounding == "autoround" else {}
        modifiers = {"rtn": QuantizationModifier, "gptq": GPTQModifier, "autoround": AutoRoundModifier}
        makers = {
            "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.8),
            "hadamard": lambda: SpinQuantModifier(rotations=["R1", "R2", "R4"], transform_type="random-hadamard"),
            "quip": lambda: QuIPModifier(rotations=["v"], transform_type="random-hadamard", ignore=peer_job.head_names(model)),
        }
        recipe = [*(makers[name]() for name in transforms), modifiers[rounding](**target, **options | job.options)]
    needs_none = job.method == "rtn" and job.inputs != "nvfp4"  # whose scale of the whole tensor is found on text
    seconds, note = compress(model, None if needs_none else tokens, recipe)
    patch = "pin_memory patched out; " if rounding == "awq" else ""
    return seconds, patch + note


def pruner(job: Job, model: PreTrainedModel) -> object:
    """The modifier of a sparse job."""
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    modifier = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[job.method]
    structure = {"mask_structure": job.options["pattern"]} if job.options["pattern"] else {}
    return modifier(sparsity=job.options["sparsity"], targets=["Linear"], ignore=peer_job.head_names(model), **structure)


def compress(model: PreTrainedModel, tokens: Tensor | None, recipe: list[object]) -> tuple[float, str]:
    """Carry out modifiers on `model` in place; returns wall seconds and a note."""
    from llmcompressor import oneshot
    from loguru import logger

    data = None
    if tokens is not None:
        ones = torch.ones_like(tokens)
        rows = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(tokens, ones, strict=True)]
        data = DataLoader(rows, batch_size=1)

    messages: list[str] = []
    logger.add(
        lambda message: messages.append(message.record["message"]),
        filter=lambda record: record["level"].name in ("WARNING", "ERROR", "CRITICAL"),  # not its own METRIC
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        oneshot(model=model, dataset=data, recipe=recipe)
        seconds = time.perf_counter() - start
    messages += [str(warning.message) for warning in caught]
    return seconds, f"warnings: {peer_job.count_messages(messages)}"


@torch.no_grad()
def dequantize(model: PreTrainedModel, names: list[str], linears: list[str]) -> dict[str, Tensor]:
    """All parameters in float32, the linears' weights [out, in] from the tool's codes, scales and zeros."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    weights = {name: model.get_parameter(name).float().contiguous() for name in names}
    for name in linears:
        module = model.get_submodule(name)
        args = module.quantization_scheme.weights
        scale, zero = module.weight_scale, module.weight_zero_point  # [out, in / group]
        whole = getattr(module, "weight_global_scale", None)  # NVFP4's, of the whole tensor
        dtype = None if args.type == "float" else torch.int8  # of the codes; None: the weight's own holds E2M1's levels
        codes = quantize(module.weight, scale, zero, args, dtype, global_scale=whole)  # [out, in]
        weights[f"{name}.weight"] = dequantize(codes, scale.float(), zero, args, global_scale=whole)  # [out, in]
    return weights


def main() -> None:
    job = peer_job.read_job()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    if job.method == "awq":
        torch.Tensor.pin_memory = lambda self, *_: self  # see the module docstring
    tokens = peer_job.read_tokens(job)
    model = peer_job.load_plain(job)
    names = [name for name, _ in model.named_parameters()]
    linears = peer_job.block_linears(model)
    seconds, note = quantize(job, model, tokens)
    peak = peer_job.peak_rss_gib()
    if job.format == "sparse":
        return peer_job.write_sparse(job, "llmcompressor", version("llmcompressor"), model, Cost(seconds, peak, note))
    quantized = [name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)]
    if sorted(quantized) != sorted(linears):
        peer_job.fail(f"quantized {len(quantized)} modules, must be the {len(linears)} linears of the blocks")
    if job.inputs is not None:
        cost = Cost(seconds, peak, note)
        return peer_job.write_measured(job, "llmcompressor", version("llmcompressor"), model, cost, linears)
    with torch.no_grad():
        logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
    weights = dequantize(model, names, linears)
    n_weights = peer_job.count_weights(model, linears)
    model.save_pretrained(job.out / "packed", save_compressed=True)
    bits = peer_job.stored_bits(job.out / "packed", linears, n_weights)
    outcome = Outcome(seconds, peak, logits, weights, bits, note)
    peer_job.write_result(job, "llmcompressor", version("llmcompressor"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
