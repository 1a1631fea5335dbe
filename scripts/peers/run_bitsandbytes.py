"""Quantize a checkpoint with bitsandbytes for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-bitsandbytes/bin/python run_bitsandbytes.py JOB.json

Settings: its quantize_4bit of each linear's weight, to NF4 or FP4, at the job's group (its block size); rtn keeps a float32
scale a block, rtn-double quantizes the scales too, to eight bits in blocks of 256, as `bnb_4bit_use_double_quant` does. It
looks at no tokens.
Dequantization: its own dequantize_4bit, in float32. Bits per weight: of its packed codes and what its states hold of scales,
and the 256-entry table of eight-bit scales left out, which is the same for all.
Why no Linear4bit: on a CPU it multiplies in a kernel that packs the weights anew; the logits that are checked are those of
plain linears with the dequantized weights in the model's dtype.
"""

import os
import time
from importlib.metadata import version

import peer_job
import torch
from peer_job import Outcome


@torch.no_grad()
def main() -> None:
    job = peer_job.read_job()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tokens = peer_job.read_tokens(job)
    model = peer_job.load_plain(job)
    linears = peer_job.block_linears(model)
    n_weights = peer_job.count_weights(model, linears)
    double = job.method == "rtn-double"
    start = time.perf_counter()
    packed = {}
    for name in linears:
        weight = model.get_parameter(f"{name}.weight")
        packed[name] = quantize_4bit(weight, blocksize=job.group, compress_statistics=double, quant_type=job.format)
    seconds = time.perf_counter() - start
    peak = peer_job.peak_rss_gib()

    weights = {name: parameter.float().contiguous() for name, parameter in model.named_parameters()}
    n_bytes = 0
    for name, (codes, state) in packed.items():
        n_bytes += codes.nbytes + state.absmax.nbytes
        if state.nested:
            n_bytes += state.state2.absmax.nbytes + state.offset.nbytes
        state.dtype = torch.float32
        weights[f"{name}.weight"] = dequantize_4bit(codes, state)  # [out, in]
        model.get_parameter(f"{name}.weight").copy_(weights[f"{name}.weight"])
    logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
    outcome = Outcome(seconds, peak, logits, weights, 8 * n_bytes / n_weights, "no calibration")
    peer_job.write_result(job, "bitsandbytes", version("bitsandbytes"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
