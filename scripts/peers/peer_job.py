"""What the peer runners share: read a job, check what the peer made of it, write the result.

A job is a JSON file with the fields of `Job`. A runner leaves two files in `out`:
`weights.safetensors` holds every parameter of the final model in float32 under its transformers name, the quantized
ones dequantized from the peer's own codes, scales and zeros; `result.json` holds settings, seconds, memory and a note.
Nothing is written unless the weights pass the checks of `check_levels`, `check_e2m1` and `check_logits`.
`bits_per_weight` counts what the tool stores for the quantized linears, see `stored_bits`.
"""

import json
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

MAX_LOGIT_ERROR = 0.01  # relative L2; both models round to bfloat16 (2^-9), a few times per block
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of NVFP4's elements, without 0
INDICES = ("g_idx", "weight_shape", "bias")  # of a linear's stored tensors, what is no code, scale or zero point


@dataclass(frozen=True)
class Job:
    """model: checkpoint folder; tokens: safetensors file; out: folder to create; options: the tool's own arguments.

    format: int, nf4, fp4 (bitsandbytes' table) or nvfp4.
    """

    model: Path
    tokens: Path
    method: str
    format: str
    bits: int
    group: int
    symmetric: bool
    out: Path
    options: dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Outcome:
    """What a runner measured. seconds: the quantization call alone; peak_rss_gib: of the process when it returned.

    rounded: the linears' weights by the linears' names, where those in `weights` hold scales of inputs besides.
    """

    seconds: float
    peak_rss_gib: float
    logits: Tensor  # [length, vocab] of the tool's own quantized model on the first sample
    weights: dict[str, Tensor]
    bits_per_weight: float
    note: str
    rounded: dict[str, Tensor] | None = None


def fail(message: str) -> NoReturn:
    """Print one line and exit with status 1."""
    print(f"error: {message}".replace("\n", " "), file=sys.stderr)
    sys.exit(1)


def run(main: Callable[[], None]) -> None:
    """Call `main`; whatever it raises ends the process with its traceback, one last line and status 1."""
    try:
        main()
    except Exception as error:
        traceback.print_exc()
        fail(f"{type(error).__name__}: {error}")


def read_job() -> Job:
    """The job named on the command line; exits with one line if it is no valid job."""
    if len(sys.argv) != 2:
        fail(f"usage: {Path(sys.argv[0]).name} JOB.json")
    raw = json.loads(Path(sys.argv[1]).read_text())
    known = {field.name for field in fields(Job)}
    if set(raw) != known:
        fail(f"{sys.argv[1]}: fields {sorted(raw)} must be {sorted(known)}")
    return Job(**{**raw, **{name: Path(raw[name]) for name in ("model", "tokens", "out")}})


def read_tokens(job: Job) -> Tensor:
    """Calibration tokens, int64 [samples, length]."""
    tokens = load_file(job.tokens)["tokens"]
    if tokens.dtype != torch.int64 or tokens.ndim != 2:
        fail(f"{job.tokens}: tokens {tokens.dtype} {list(tokens.shape)} must be int64 [samples, length]")
    return tokens


def load_plain(job: Job) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in its own dtype, on the CPU."""
    return AutoModelForCausalLM.from_pretrained(job.model, dtype="auto", device_map=None, local_files_only=True).eval()


def block_linears(model: PreTrainedModel) -> list[str]:
    """Names of all linears but the output embedding."""
    head = model.get_output_embeddings()
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]


def head_names(model: PreTrainedModel) -> list[str]:
    """Name of the output embedding, which stays as it is."""
    return [name for name, module in model.named_modules() if module is model.get_output_embeddings()]


def peak_rss_gib() -> float:
    """Peak resident memory of this process up to now.

    Not getrusage's, which begins with that of the process that started this one.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20  # from KiB


def count_messages(messages: Iterable[str]) -> str:
    """`2x first; 1x second`, each message cut to one short line; `none` if there are none."""
    counts = Counter(" ".join(message.split())[:160] for message in messages)
    return "; ".join(f"{n}x {message}" for message, n in counts.items()) or "none"


def max_levels(weight: Tensor, group: int) -> int:
    """Most distinct values in any row's group of a weight [out, in]."""
    ordered = weight.reshape(len(weight), -1, group).sort(-1).values  # [out, in / group, group]
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def stored_bits(folder: Path, linears: list[str], n_weights: int) -> float:
    """Bits per weight of what the safetensors files in `folder` hold for the linears, `n_weights` weights in all.

    Counted are codes as packed, scales and zero points, as the tool stores them. Not counted are biases, and orders of
    columns and shapes (`g_idx`, `weight_shape`), which are as nothing in large models.
    """
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                linear, _, last = name.rpartition(".")
                if linear in linears and last not in INDICES:
                    total += file.get_tensor(name).nbytes
    if not total:
        fail(f"{folder}: no tensor of {linears[0]} in it")
    return 8 * total / n_weights


def count_weights(model: nn.Module, linears: list[str]) -> int:
    """How many weights the linears have, of a model that still has them."""
    return sum(model.get_parameter(f"{name}.weight").numel() for name in linears)


def check_e2m1(rounded: dict[str, Tensor]) -> None:
    """Every 16 neighbours of each linear's weights [out, in] must be E2M1 levels under one scale, or the run fails."""
    levels = torch.tensor((0.0, *E2M1))
    for name, weight in rounded.items():
        w = weight.abs().reshape(-1, 16)  # [groups, 16]
        top = w.amax(-1, keepdim=True)  # [groups, 1]
        fits = torch.zeros(len(w), dtype=torch.bool)
        for level in E2M1:  # the largest weight is one of them
            ratio = w * level / top.clamp(min=1e-30)
            nearest = levels[torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)]
            fits |= ((ratio - nearest).abs() < 1e-3).all(-1)
        if not fits.all():
            fail(f"{name}: {int((~fits).sum())} of {len(fits)} groups are no E2M1 levels under one scale")


def check_levels(job: Job, rounded: dict[str, Tensor]) -> None:
    """Each linear's weights [out, in] must lie on at most 2^bits levels per row and group, or the run fails."""
    for name, weight in rounded.items():
        levels = max_levels(weight, job.group)
        if levels > 2**job.bits:
            fail(f"{name}: {levels} levels in one group must be at most {2**job.bits}")


@torch.no_grad()
def check_logits(model: PreTrainedModel, outcome: Outcome, sample: Tensor) -> str:
    """Compare a plain model's logits on `sample` [length] with the tool's own, before and with the new weights.

    Returns both relative L2 distances in words. The plain model runs in the checkpoint's dtype, as the tool's does;
    fails if the second distance is above MAX_LOGIT_ERROR.
    """

    def distance() -> float:
        return float((model(sample[None]).logits[0].float() - outcome.logits).norm() / outcome.logits.norm())

    before = distance()
    for name, parameter in model.named_parameters():
        parameter.copy_(outcome.weights[name])  # rounds to the checkpoint's dtype
    error = distance()
    if not error <= MAX_LOGIT_ERROR:
        fail(f"logits of the written weights are {error:.2g} from the tool's own, must be within {MAX_LOGIT_ERROR}")
    return f"logits {error:.1e} from the tool's own, {before:.1e} from the unquantized"


Quantize = Callable[[Job, PreTrainedModel, list[str]], float]  # the linears named, in place; returns wall seconds
Dequantize = Callable[[Job, PreTrainedModel, list[str], list[str]], tuple[dict[str, Tensor], float]]  # see run_without_data


def run_without_data(tool: str, quantize: Quantize, dequantize: Dequantize, note: str) -> None:
    """Run the job with a tool that looks at no tokens.

    dequantize(job, model, names, linears) gives all parameters in float32 by `names`, which the unquantized model has, the
    linears' weights [out, in] from the tool's codes, and what the tool stores for these linears, in bits.
    """
    job = read_job()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    tokens = read_tokens(job)
    model = load_plain(job)
    names = [name for name, _ in model.named_parameters()]
    linears = block_linears(model)
    n_weights = count_weights(model, linears)
    seconds = quantize(job, model, linears)
    peak = peak_rss_gib()
    with torch.no_grad():
        logits = model(tokens[:1]).logits[0].float()  # [length, vocab]
        weights, n_bits = dequantize(job, model, names, linears)
    outcome = Outcome(seconds, peak, logits, weights, n_bits / n_weights, f"no calibration{note}")
    write_result(job, tool, version(tool), outcome, tokens[0])


def write_result(job: Job, tool: str, version: str, outcome: Outcome, sample: Tensor) -> None:
    """Check the outcome, then write weights.safetensors and result.json into job.out."""
    model = load_plain(job)
    missing = {name for name, _ in model.named_parameters()} ^ set(outcome.weights)
    if missing:
        fail(f"parameters on one side only: {sorted(missing)[:4]}")
    linears = block_linears(model)
    rounded = outcome.rounded or {name: outcome.weights[f"{name}.weight"] for name in linears}
    if sorted(rounded) != sorted(linears):
        fail(f"{len(rounded)} rounded weights, must be those of the {len(linears)} linears of the blocks")
    check_levels(job, rounded)
    if job.format == "nvfp4":
        check_e2m1(rounded)
    logits = check_logits(model, outcome, sample)
    job.out.mkdir(parents=True, exist_ok=True)
    save_file(outcome.weights, job.out / "weights.safetensors")
    result = {
        "tool": tool,
        "version": version,
        "bits_per_weight": outcome.bits_per_weight,
        "seconds": outcome.seconds,
        "peak_rss_gib": outcome.peak_rss_gib,
        "note": f"{outcome.note}; {len(linears)} linears; {logits}",
    }
    (job.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
