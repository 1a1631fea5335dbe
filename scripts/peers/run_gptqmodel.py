"""Quantize a checkpoint with gptqmodel (RTN, GPTQ, GPTAQ or AWQ) for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-gptqmodel/bin/python run_gptqmodel.py JOB.json

Settings are the defaults of RTNConfig, GPTQConfig (group-aware activation order, 5% damping) and AWQConfig (20 grid
points, duo scaling, clip search), at the job's bits, group and symmetry, unless `options` names another argument.
GPTAQ is GPTQConfig with a GPTAQConfig, whose alpha is 0.25.
Only `offload_to_disk` is off, so that the packed layers stay in memory.
Dequantization: the packed layers' own unpacking (`TorchLinear.dequantize_weight`, AWQ: `dequantize_gemm`) with their
16-bit scales widened to float32. The layers as packed multiply in the scales' 16 bits; that rounding is left out of
the weights and, by widening the layers' scales in place, of the logits they are checked against.
Bits per weight: of the checkpoint it saves, whose zero points are there even where they are all the same.
RTN and GPTQ leave their layers packed for the checkpoint (format `gptq`: zeros less one), which their own forward
misreads by one code; the tool's load-time `convert_gptq_v1_to_v2_format_module` is applied first, as its loader does.

Patches, none of which changes a value:
- GPTQMODEL_CPU_WORKERS=2 where there are fewer than three cores: its default of one worker is too few for its own
  loader pool, which asks for two, and the first use of the pool raises.
- The C++ packing extension is compiled before the clock starts (half a minute, once), into the venv.
- Its logger calls no handlers, so the logger's one entry point is wrapped to collect warnings.
"""

import os
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import peer_job
import torch
from peer_job import Job, Outcome
from torch import Tensor
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from gptqmodel.models.base import BaseQModel


def record_warnings() -> list[str]:
    """A list that from now on receives every warning and error that gptqmodel logs."""
    from logbar import LogBar
    from logbar.logbar import LEVEL

    messages: list[str] = []
    logger = LogBar.shared()
    process = logger._process

    def record(level: LEVEL, message: str, *args: object) -> None:
        if level not in (LEVEL.DEBUG, LEVEL.INFO):
            messages.append(message % args if args else message)
        process(level, message, *args)

    logger._process = record
    logger.warning = logger.warn  # the standard library's `warning` would pass `_process` by
    return messages


def quantize(job: Job, tokens: Tensor) -> tuple["BaseQModel", list[str], int, float, str]:
    """Load and quantize with calibration tokens [samples, length]; returns model, linears, their weights, seconds, note."""
    from gptqmodel import GPTQModel, extension
    from gptqmodel.quantization.config import AWQConfig, GPTAQConfig, GPTQConfig, RTNConfig

    config_class = {"rtn": RTNConfig, "gptq": GPTQConfig, "gptaq": GPTQConfig, "awq": AWQConfig}[job.method]
    settings = {"bits": job.bits, "group_size": job.group, "sym": job.symmetric, "device": "cpu"}
    settings |= {"gptaq": GPTAQConfig()} if job.method == "gptaq" else {}
    config = config_class(**settings, **{"offload_to_disk": False, **job.options})
    peer = GPTQModel.load(str(job.model), config)
    linears = peer_job.block_linears(peer.model)
    n_weights = peer_job.count_weights(peer.model, linears)
    packer = "C++" if extension.is_available("pack_block_cpu") else "Python"
    ones = torch.ones_like(tokens)
    rows = [{"input_ids": row, "attention_mask": mask} for row, mask in zip(tokens, ones, strict=True)]

    messages = record_warnings()
    start = time.perf_counter()
    log = peer.quantize(calibration=None if job.method == "rtn" else rows, batch_size=1)
    seconds = time.perf_counter() - start
    fallbacks = sum("fallback" in str(entry.get("loss")) for entries in log.values() for entry in entries)
    note = f"{packer} packer compiled beforehand; {fallbacks} fallbacks; warnings: {peer_job.count_messages(messages)}"
    return peer, linears, n_weights, seconds, note


@torch.no_grad()
def dequantize(model: PreTrainedModel, linears: list[str]) -> dict[str, Tensor]:
    """All parameters in float32, the linears' weights [out, in] from the tool's packed codes, zeros and scales.

    Changes the packed layers in place: zeros from the checkpoint's format to the forward's, scales to float32.
    """
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    weights = {name: parameter.float().contiguous() for name, parameter in model.named_parameters()}
    for name in linears:
        module = model.get_submodule(name)
        module.scales = module.scales.float()  # [in / group, out]
        if isinstance(module, TorchLinear):
            if module.qzero_format() == 1:
                convert_gptq_v1_to_v2_format_module(module, module.bits, module.pack_dtype)
            weight = module.dequantize_weight()  # [in, out]
        elif isinstance(module, AwqTorchLinear):
            weight = dequantize_gemm(module.qweight, module.qzeros, module.scales, module.bits, module.group_size)
        else:
            peer_job.fail(f"{name}: left as {type(module).__name__}, must be a packed layer")
        weights[f"{name}.weight"] = weight.T.contiguous()  # [out, in]
        if module.bias is not None:
            weights[f"{name}.bias"] = module.bias.float()
    return weights


def main() -> None:
    job = peer_job.read_job()
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("GPTQMODEL_EXT_BUILD", str(Path(sys.prefix) / "torch_extensions" / "pack_block_cpu"))
    if (os.cpu_count() or 1) < 3:
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    tokens = peer_job.read_tokens(job)
    peer, linears, n_weights, seconds, note = quantize(job, tokens)
    peak = peer_job.peak_rss_gib()
    peer.save(str(job.out / "packed"))  # before dequantize, which changes the layers in place
    bits = peer_job.stored_bits(job.out / "packed", linears, n_weights)
    weights = dequantize(peer.model, linears)
    with torch.no_grad():
        logits = peer.model(tokens[:1]).logits[0].float()  # [length, vocab]
    outcome = Outcome(seconds, peak, logits, weights, bits, note)
    peer_job.write_result(job, "gptqmodel", version("gptqmodel"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
