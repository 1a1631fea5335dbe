"""What the peer runners share: read a job, check what the peer made of it, write the result.

A job is a JSON file with the fields of `Job`. A runner leaves two files in `out`:
`weights.safetensors` holds every parameter of the final model in float32 under its transformers name, the quantized
ones dequantized from the peer's own codes, scales and zeros; `result.json` holds settings, seconds, memory and a note.
Nothing is written unless the weights pass the checks of `check_levels` and `check_logits`.
"""

import json
import resource
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NoReturn

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

METHODS = ("rtn", "gptq", "awq")
MAX_LOGIT_ERROR = 0.01  # relative L2; both models round to bfloat16 (2^-9), a few times per block


@dataclass(frozen=True)
class Job:
    """model: checkpoint folder; tokens: safetensors file; out: folder to create; options: the tool's own arguments."""

    model: Path
    tokens: Path
    method: str
    bits: int
    group: int
    symmetric: bool
    out: Path
    options: dict[str, str | int | float | bool | None]


@dataclass(frozen=True)
class Outcome:
    """What a runner measured. seconds: the quantization call alone; peak_rss_gib: of the process when it returned."""

    seconds: float
    peak_rss_gib: float
    logits: Tensor  # [length, vocab] of the tool's own quantized model on the first sample
    weights: dict[str, Tensor]
    note: str


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
    if raw["method"] not in METHODS:
        fail(f"{sys.argv[1]}: method {raw['method']!r} must be one of {METHODS}")
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


def peak_rss_gib() -> float:
    """Peak resident memory of this process up to now (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def count_messages(messages: Iterable[str]) -> str:
    """`2x first; 1x second`, each message cut to one short line; `none` if there are none."""
    counts = Counter(" ".join(message.split())[:160] for message in messages)
    return "; ".join(f"{n}x {message}" for message, n in counts.items()) or "none"


def max_levels(weight: Tensor, group: int) -> int:
    """Most distinct values in any row's group of a weight [out, in]."""
    ordered = weight.reshape(len(weight), -1, group).sort(-1).values  # [out, in / group, group]
    return int((ordered.diff(dim=-1) != 0).sum(-1).max()) + 1


def check_levels(job: Job, weights: dict[str, Tensor], linears: list[str]) -> None:
    """Every linear must lie on at most 2^bits levels per row and group, or the run fails."""
    for name in linears:
        levels = max_levels(weights[f"{name}.weight"], job.group)
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


def write_result(job: Job, tool: str, version: str, outcome: Outcome, sample: Tensor) -> None:
    """Check the outcome, then write weights.safetensors and result.json into job.out."""
    model = load_plain(job)
    missing = {name for name, _ in model.named_parameters()} ^ set(outcome.weights)
    if missing:
        fail(f"parameters on one side only: {sorted(missing)[:4]}")
    linears = block_linears(model)
    check_levels(job, outcome.weights, linears)
    logits = check_logits(model, outcome, sample)
    job.out.mkdir(parents=True, exist_ok=True)
    save_file(outcome.weights, job.out / "weights.safetensors")
    result = {
        "tool": tool,
        "version": version,
        "method": job.method,
        "bits": job.bits,
        "group": job.group,
        "symmetric": job.symmetric,
        "seconds": outcome.seconds,
        "peak_rss_gib": outcome.peak_rss_gib,
        "note": f"{outcome.note}; {len(linears)} linears; {logits}",
    }
    (job.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
