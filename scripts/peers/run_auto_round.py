"""Quantize a checkpoint with auto-round for comparison; run with its own venv's python.

    OMP_NUM_THREADS=2 DIR/peer-auto-round/bin/python run_auto_round.py JOB.json

Methods: autoround, the tool's defaults (200 iterations of 8 windows); autoround-best, its recipe `best` (1000 iterations);
autoround-v2, the same with `enable_alg_ext` (SignRoundV2, which it calls experimental and which changes symmetric schemes
only). The recipe asks for 512 samples; here all methods see all of the job's tokens, as every tool does. The scheme is the
job's bits, group and symmetry, or its weight format nv_fp with activations as they are; with inputs rounded its presets NVFP4
and MXFP4. `options` names other arguments of AutoRound. torch.compile is off: on a CPU it makes the same updates take three
times as long.
The tokenizer's padding token is taken away, and masks of ones are given: the tool leaves out of attention and loss what
equals the padding token, which here stands at the ends of documents.
Dequantization: the tool leaves weights rounded to its grid in the model's 16 bits; the nearest level times its own scales,
in float32. Bits per weight: of the checkpoint it saves in its own format; of NVFP4, which it saves with activations only,
four bits and its scales as its NVFP4 checkpoints hold them: one byte a group and one float32 a linear.
"""

import os
import time
import warnings
from importlib.metadata import version

import peer_job
import torch
from peer_job import Cost, Job, Outcome
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

METHODS = {
    "autoround": {"iters": 200},
    "autoround-best": {"iters": 1000},
    "autoround-v2": {"iters": 1000, "enable_alg_ext": True},
}


@torch.no_grad()
def dequantize(job: Job, model: PreTrainedModel, names: list[str], linears: list[str]) -> dict[str, Tensor]:
    """All parameters in float32, the linears' weights [out, in] on the levels of the tool's scales."""
    weights = {name: model.get_parameter(name).float().contiguous() for name in names}
    table = torch.tensor([-level for level in reversed(peer_job.E2M1)] + [0.0, *peer_job.E2M1])
    for name in linears:
        module = model.get_submodule(name)
        module = getattr(module, "orig_layer", module)  # within what rounds its inputs
        scale = module.scale.float().reshape(len(module.weight), -1, 1)  # [out, in / group, 1]
        if job.format == "nvfp4":
            scale = scale / module.weight_global_scale.float()
        w = module.weight.float().reshape(*scale.shape[:2], job.group)  # [out, in / group, group]
        steps = torch.where(scale == 0, 0.0, w / scale)
        if job.format == "nvfp4":
            levels = table[torch.bucketize(steps, (table[1:] + table[:-1]) / 2)]
        else:
            levels = steps.round()
        weights[f"{name}.weight"] = (levels * scale).reshape(module.weight.shape)
    return weights


def main() -> None:
    job = peer_job.read_job()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    from auto_round import AutoRound

    tokens = peer_job.read_tokens(job)
    model = peer_job.load_plain(job)
    names = [name for name, _ in model.named_parameters()]
    linears = peer_job.block_linears(model)
    n_weights = peer_job.count_weights(model, linears)
    tokenizer = AutoTokenizer.from_pretrained(job.model, local_files_only=True)
    tokenizer.pad_token = None
    batches = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in tokens.split(8)]
    scheme = {"bits": job.bits, "group_size": job.group, "sym": job.symmetric, "act_bits": 16}
    scheme |= {"data_type": "nv_fp" if job.format == "nvfp4" else "int"}
    if job.inputs is not None:
        scheme = {"nvfp4": "NVFP4", "mxfp4": "MXFP4"}[job.inputs]
    settings = {"nsamples": len(tokens), "seqlen": tokens.shape[1], "batch_size": 8, "device_map": "cpu"}
    settings |= {"enable_torch_compile": False}
    settings |= METHODS[job.method] | job.options
    tool = AutoRound(model, tokenizer, scheme=scheme, dataset=batches, **settings)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        start = time.perf_counter()
        model, _ = tool.quantize()
        seconds = time.perf_counter() - start
    peak = peer_job.peak_rss_gib()
    note = f"warnings: {peer_job.count_messages(str(warning.message) for warning in caught)}"
    if job.inputs is not None:
        exact = dequantize(job, model, names, linears) if job.format == "nvfp4" else {}  # MXFP4's are exact in 16 bits
        model.float()
        for name, weight in exact.items():
            model.get_parameter(name).data.copy_(weight)
        cost = Cost(seconds, peak, note)
        return peer_job.write_measured(job, "auto-round", version("auto-round"), model, cost, linears)
    with torch.no_grad():
        logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
    weights = dequantize(job, model, names, linears)
    if job.format == "nvfp4":
        bits = 4 + 8 / job.group + 32 * len(linears) / n_weights
        note = f"bits of a checkpoint that it does not write; {note}"
    else:
        # Its own format takes AWQ's layer for four bits with zero points, which refuses an argument that it passes (0.16.1).
        layout = "auto_round" if job.symmetric or job.bits != 4 else "auto_gptq"
        tool.save_quantized(str(job.out / "packed"), format=layout, inplace=True)
        bits = peer_job.stored_bits(job.out / "packed", linears, n_weights)
    outcome = Outcome(seconds, peak, logits, weights, bits, note)
    peer_job.write_result(job, "auto-round", version("auto-round"), outcome, tokens[0])


if __name__ == "__main__":
    peer_job.run(main)
