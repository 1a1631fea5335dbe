"""Quantize a checkpoint with torchao for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-torchao/bin/python run_torchao.py JOB.json

Settings are IntxWeightOnlyConfig's at the job's bits, group and symmetry: rtn with its default choice of ranges, hqq with
`hqq_scale_only`. It looks at no tokens; `options` names other arguments of the config.
Dequantization: the tool's own codes times its scales, in float32. Bits per weight: the tool keeps each code in eight bits;
counted are the job's bits a weight, its scales as it keeps them, and, if asymmetric, a zero point of the job's bits a group.
"""

import time

import peer_job
import torch
from peer_job import Job
from torch import Tensor
from transformers import PreTrainedModel


def quantize(job: Job, model: PreTrainedModel, linears: list[str]) -> float:
    """Quantize the linears in place; returns wall seconds."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    settings = {
        "weight_dtype": getattr(torch, f"int{job.bits}"),
        "granularity": PerGroup(job.group),
        "mapping_type": MappingType.SYMMETRIC if job.symmetric else MappingType.ASYMMETRIC,
        "intx_choose_qparams_algorithm": {"rtn": "affine", "hqq": "hqq_scale_only"}[job.method],
    }
    start = time.perf_counter()
    quantize_(model, IntxWeightOnlyConfig(**settings | job.options), filter_fn=lambda module, name: name in linears)
    return time.perf_counter() - start


def dequantize(job: Job, model: PreTrainedModel, names: list[str], linears: list[str]) -> tuple[dict[str, Tensor], float]:
    """All parameters in float32, the linears' weights [out, in] from the tool's codes; and the bits of these linears."""
    weights = {}
    n_bits = 0.0
    for name in names:
        value = model.get_parameter(name)
        if name.removesuffix(".weight") in linears and name.endswith(".weight"):
            scale, zero = value.scale.float()[..., None], value.zero_point.float()[..., None]  # [out, in / group, 1]
            codes = value.qdata.float().reshape(*scale.shape[:2], job.group)  # [out, in / group, group]
            weights[name] = ((codes - zero) * scale).reshape(value.shape)
            n_bits += value.numel() * job.bits + 8 * value.scale.nbytes + (0 if job.symmetric else zero.numel() * job.bits)
        else:
            weights[name] = value.float().contiguous()
    return weights, n_bits


if __name__ == "__main__":
    peer_job.run(lambda: peer_job.run_without_data("torchao", quantize, dequantize, note="; codes counted as packed"))
