"""Quantize a checkpoint with nvidia-modelopt for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-modelopt/bin/python run_modelopt.py JOB.json

Settings are its presets for weights alone, INT4_AWQ_CFG and W4A16_NVFP4_CFG, at the job's group. Methods: rtn, algorithm
max; awq, algorithm awq_lite (of NVFP4, NVFP4_AWQ_LITE_CFG without its quantizers of activations). `options` adds to the
algorithm's arguments. With inputs rounded its presets, lists and algorithms as they are: INT8_SMOOTHQUANT_CFG and
W4A8_AWQ_BETA_CFG, whose inputs have static scales of the tensor and whose int4 weights are rounded to FP8 besides,
NVFP4_DEFAULT_CFG and MXFP4_DEFAULT_CFG.
Dequantization: what the quantizers of weights, which round in float32 without packing, make of the weights. AWQ scales
inputs as they enter each linear; the written weights hold that scale, in float32, and so leave the grid along `in`.
Bits per weight: not of a checkpoint, because the tool's export shares AWQ's scales between linears and rounds once more.
Counted are four bits a weight, 16 bits a group and for int4, 8 bits a group and 32 a linear for NVFP4, as its exports hold,
and 16 bits for each of AWQ's scales of inputs.

Patch: `dynamic_block_quantize_op`, the rounding of NVFP4 and MXFP4, exists as a CUDA kernel alone and raises on a CPU. In its
place the tool's own packing for exports, `NVFP4QTensor.quantize` and `MXFP4QTensor.quantize`, and back. It is slower, so
seconds are not the tool's.
"""

import copy
import os
import time
import warnings
from importlib.metadata import version

import peer_job
import torch
from peer_job import Cost, Job, Outcome
from torch import Tensor
from transformers import PreTrainedModel

ALGORITHMS = {
    "rtn": {"method": "max"},
    "awq": {"method": "awq_lite", "alpha_step": 0.1},
}


def settings(job: Job) -> dict[str, object]:
    """The preset, with the job's group and algorithm."""
    import modelopt.torch.quantization as mtq

    if job.inputs is not None:
        presets = {
            "int8": mtq.INT8_SMOOTHQUANT_CFG,
            "e4m3": mtq.W4A8_AWQ_BETA_CFG,
            "nvfp4": mtq.NVFP4_DEFAULT_CFG,
            "mxfp4": mtq.MXFP4_DEFAULT_CFG,
        }
        return copy.deepcopy(presets[job.inputs])
    config = copy.deepcopy(mtq.W4A16_NVFP4_CFG if job.format == "nvfp4" else mtq.INT4_AWQ_CFG)
    config["algorithm"] = ALGORITHMS[job.method] | job.options
    for entry in config["quant_cfg"]:
        blocks = (entry.get("cfg") or {}).get("block_sizes")
        if entry["quantizer_name"] == "*weight_quantizer" and blocks:
            blocks[-1] = job.group
    return config


def round_blocks(x: Tensor, block_size: int, amax: Tensor | None, *bits: int) -> Tensor:
    """What stands in for the CUDA kernel: x [..., in] to E2M1 under scales of E4M3 where there is an amax, else E8M0."""
    from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor

    assert bits[:2] == (4, 2), f"E2M1 has 4 bits, 2 of them exponent, not {bits}"
    x = x.contiguous().clone()
    if amax is None:
        packed, scale = MXFP4QTensor.quantize(x, block_size)
        return packed.dequantize(x.dtype, scale=scale, block_sizes={-1: block_size})
    whole = amax.float().amax() / (6.0 * 448.0)  # as NVFP4QTensor derives it from the quantizer's amax
    packed, scale, whole = NVFP4QTensor.quantize(x, block_size, weights_scaling_factor_2=whole)
    return packed.dequantize(x.dtype, scale=scale, double_scale=whole, block_sizes={-1: block_size})


@torch.no_grad()
def dequantize(
    model: PreTrainedModel, names: list[str], linears: list[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """All parameters in float32; the linears' weights before AWQ's scales of inputs; and how many such scales there are."""
    weights = {name: model.get_parameter(name).float().contiguous() for name in names}
    rounded, n_scales = {}, 0
    for name in linears:
        module = model.get_submodule(name)
        rounded[name] = module.weight_quantizer(module.weight.float())  # [out, in]
        scale = getattr(module.input_quantizer, "_pre_quant_scale", None)  # [in]
        weights[f"{name}.weight"] = rounded[name] if scale is None else rounded[name] * scale.float()
        n_scales += 0 if scale is None else scale.numel()
    return weights, rounded, n_scales


def prune(job: Job, model: PreTrainedModel, tokens: Tensor) -> None:
    """Carry out a sparse job: the tool's SparseGPT, which takes patterns alone and keeps a mask, not the updated weights."""
    import modelopt.torch.sparsity as mts

    linears = {"*": {}} | {name: None for name in peer_job.head_names(model)}
    mode = [("sparsegpt", {"nn.Linear": linears})]
    batches = [{"input_ids": row[None]} for row in tokens]
    config = {"data_loader": batches, "collect_func": lambda batch: batch, "device": "cpu", "verbose": False}
    config |= {"pattern": f"{job.options['pattern']} sparsity"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        model = mts.sparsify(model, mode, config=config)
        seconds = time.perf_counter() - start
    peak = peer_job.peak_rss_gib()
    told = peer_job.count_messages(str(warning.message) for warning in caught)
    model = mts.export(model)
    peer_job.write_sparse(job, "modelopt", version("nvidia-modelopt"), model, Cost(seconds, peak, f"warnings: {told}"))


def main() -> None:
    job = peer_job.read_job()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import tensor_quant

    tensor_quant.dynamic_block_quantize_op = round_blocks  # see the module docstring
    tokens = peer_job.read_tokens(job)
    model = peer_job.load_plain(job)
    if job.format == "sparse":
        return prune(job, model, tokens)
    names = [name for name, _ in model.named_parameters()]
    linears = peer_job.block_linears(model)
    n_weights = peer_job.count_weights(model, linears)

    def feed(model: PreTrainedModel) -> None:
        for row in tokens:
            model(row[None])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        mtq.quantize(model, settings(job), None if job.method == "rtn" and job.inputs != "nvfp4" else feed)
        seconds = time.perf_counter() - start
    peak = peer_job.peak_rss_gib()
    told = peer_job.count_messages(str(warning.message) for warning in caught)
    patch = "block rounding patched in; " if job.format in ("nvfp4", "mxfp4") else ""
    if job.inputs is not None:
        cost = Cost(seconds, peak, f"{patch}warnings: {told}")
        return peer_job.write_measured(job, "modelopt", version("nvidia-modelopt"), model, cost, linears)
    with torch.no_grad():
        logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
    weights, rounded, n_scales = dequantize(model, names, linears)
    scales = 8 / job.group + 32 * len(linears) / n_weights if job.format == "nvfp4" else 16 / job.group
    bits = job.bits + scales + 16 * n_scales / n_weights
    note = f"{patch}bits by arithmetic; warnings: {told}"
    outcome = Outcome(seconds, peak, logits, weights, bits, note, rounded)
    peer_job.write_result(job, "modelopt", version("nvidia-modelopt"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
