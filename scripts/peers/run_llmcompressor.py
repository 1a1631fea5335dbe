"""Quantize a checkpoint with llmcompressor (RTN, GPTQ or AWQ) for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-llmcompressor/bin/python run_llmcompressor.py JOB.json

Settings are the tool's own: the scheme is its W4A16 preset (W4A16_ASYM if asymmetric) at the job's bits and group;
modifiers keep their defaults (GPTQ: static activation order, 1% damping; AWQ: its mappings, 20 grid points, duo
scaling, then plain rounding) unless `options` names an argument of GPTQModifier, AWQModifier or QuantizationModifier.
Dequantization: the tool's own codes (its `quantize`, as its exporter calls it) times its scales, in float32.

Patch: `torch.Tensor.pin_memory` returns its tensor. AWQ pins its cached activations unasked before each grid search
(`IntermediatesCache.pin_memory`), which raises where there is no accelerator. Pinning changes no value.
"""

import os
import time
import warnings
from importlib.metadata import version

import peer_job
import torch
from peer_job import Job, Outcome
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel


def quantize(job: Job, model: PreTrainedModel, tokens: Tensor) -> tuple[float, str]:
    """Quantize `model` in place with calibration tokens [samples, length]; returns wall seconds and a note."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from loguru import logger

    args = QuantizationArgs(num_bits=job.bits, strategy="group", group_size=job.group, symmetric=job.symmetric)
    target = {"config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=args)}, "ignore": ["lm_head"]}
    if job.method == "rtn":
        recipe = [QuantizationModifier(**target, **job.options)]
    elif job.method == "gptq":
        recipe = [GPTQModifier(**target, **job.options)]
    else:
        recipe = [AWQModifier(**job.options), QuantizationModifier(**target)]
    ones = torch.ones_like(tokens)
    rows = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(tokens, ones, strict=True)]
    data = None if job.method == "rtn" else DataLoader(rows, batch_size=1)

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
    patch = "pin_memory patched out; " if job.method == "awq" else ""
    return seconds, f"{patch}warnings: {peer_job.count_messages(messages)}"


@torch.no_grad()
def dequantize(model: PreTrainedModel, names: list[str], linears: list[str]) -> dict[str, Tensor]:
    """All parameters in float32, the linears' weights [out, in] from the tool's codes, scales and zeros."""
    from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

    weights = {name: model.get_parameter(name).float().contiguous() for name in names}
    for name in linears:
        module = model.get_submodule(name)
        args = module.quantization_scheme.weights
        scale, zero = module.weight_scale, module.weight_zero_point  # [out, in / group]
        codes = quantize(module.weight, scale, zero, args, dtype=torch.int8)  # [out, in]
        weights[f"{name}.weight"] = dequantize(codes, scale.float(), zero, args)  # [out, in]
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
    quantized = [name for name, module in model.named_modules() if getattr(module, "quantization_scheme", None)]
    if sorted(quantized) != sorted(linears):
        peer_job.fail(f"quantized {len(quantized)} modules, must be the {len(linears)} linears of the blocks")
    with torch.no_grad():
        logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
    outcome = Outcome(seconds, peak, logits, dequantize(model, names, linears), note)
    peer_job.write_result(job, "llmcompressor", version("llmcompressor"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
