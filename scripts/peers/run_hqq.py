"""Quantize a checkpoint with hqq for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-hqq/bin/python run_hqq.py JOB.json

Settings are those of its BaseQuantizeConfig at the job's bits and group, along `in` (axis 1), with 16-bit scales and zero
points, bfloat16 as the model; `options` names other arguments of it. It looks at no tokens. Its four-bit zero points are
whole numbers before it optimizes them, and are stored as floats after.
Dequantization: the tool's own codes, (code - zero) * scale, in float32. Bits per weight: of the tensors W_q, scale and zero
of its layers, as its safetensors files hold them.
"""

import time

import peer_job
import torch
from peer_job import Job
from torch import Tensor
from transformers import PreTrainedModel


def quantize(job: Job, model: PreTrainedModel, linears: list[str]) -> float:
    """Put the tool's layers in the place of the linears; returns wall seconds."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = {"nbits": job.bits, "group_size": job.group, "axis": 1}
    start = time.perf_counter()
    for name in linears:
        path, _, last = name.rpartition(".")
        config = BaseQuantizeConfig(**settings | job.options)
        layer = HQQLinear(model.get_submodule(name), config, compute_dtype=torch.bfloat16, device="cpu")
        setattr(model.get_submodule(path), last, layer)
    return time.perf_counter() - start


def dequantize(job: Job, model: PreTrainedModel, names: list[str], linears: list[str]) -> tuple[dict[str, Tensor], float]:
    """All parameters in float32, the linears' weights [out, in] from the tool's codes; and the bits of these linears."""
    from hqq.core.quantize import Quantizer

    kept = dict(model.named_parameters())
    weights = {name: kept[name].float().contiguous() for name in names if name in kept}
    n_bytes = 0
    for name in linears:
        layer = model.get_submodule(name)
        meta = layer.meta | {"compute_dtype": torch.float32}
        meta |= {"scale": layer.meta["scale"].float(), "zero": layer.meta["zero"].float()}
        weights[f"{name}.weight"] = Quantizer.dequantize(layer.W_q, meta).contiguous()  # [out, in]
        if layer.bias is not None:
            weights[f"{name}.bias"] = layer.bias.float()
        n_bytes += layer.W_q.nbytes + layer.meta["scale"].nbytes + layer.meta["zero"].nbytes
    return weights, 8 * n_bytes


if __name__ == "__main__":
    peer_job.run(lambda: peer_job.run_without_data("hqq", quantize, dequantize, note=""))
