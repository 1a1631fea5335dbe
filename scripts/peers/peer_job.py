"""What the peer runners share: read a job, check what the peer made of it, write the result.

A job is a JSON file with the fields of `Job`. Where it rounds weights alone, a runner leaves two files in `out`:
`weights.safetensors` holds every parameter of the final model in float32 under its transformers name, the quantized
ones dequantized from the peer's own codes, scales and zeros; `result.json` holds settings, seconds, memory and a note.
Nothing is written unless the weights pass the checks of `check_levels`, `check_e2m1` and `check_logits`.
`bits_per_weight` counts what the tool stores for the quantized linears, see `stored_bits`.

Where a job rounds inputs too, weights alone do not tell what the tool's model computes, and the tool's own forward is measured
where it runs, in float32: `result.json` holds loss and KL from the original of every window besides, see `measure_windows`, and
nothing is written unless all that the linears multiply lies on levels of the job's formats, see `check_products`.
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
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

MAX_LOGIT_ERROR = 0.01  # relative L2; both models round to bfloat16 (2^-9), a few times per block
E2M1 = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of NVFP4's elements, without 0
# How inputs may be rounded: magnitudes under one scale, and how many channels share it, null for all of a token.
INPUT_LEVELS: dict[str, tuple[tuple[float, ...], int | None]] = {
    "int8": (tuple(range(129)), None),
    "int4": (tuple(range(9)), None),
    "e4m3": (tuple(torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist()), None),
    "nvfp4": ((0.0, *E2M1), 16),
    "mxfp4": ((0.0, *E2M1), 32),
}
LOOKED_AT = 32  # tokens whose rounded inputs are checked
INDICES = ("g_idx", "weight_shape", "bias")  # of a linear's stored tensors, what is no code, scale or zero point


@dataclass(frozen=True)
class Job:
    """model: checkpoint folder; tokens: safetensors file; out: folder to create; options: the tool's own arguments.

    format: int, nf4, fp4 (bitsandbytes' table), nvfp4 or mxfp4; group: null for one scale an output channel. Or sparse: weights
    of 16 bits, of which the share `sparsity` in the options is zero, or all but N of every M where they have a `pattern` N:M.
    inputs: how they are rounded, a key of INPUT_LEVELS; reference: what `write_reference` wrote. Null: weights alone.
    """

    model: Path
    tokens: Path
    method: str
    format: str
    bits: int
    group: int | None
    symmetric: bool
    out: Path
    options: dict[str, str | int | float | bool | None]
    inputs: str | None = None
    reference: Path | None = None


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


@dataclass(frozen=True)
class Cost:
    """What quantizing took, as in Outcome."""

    seconds: float
    peak_rss_gib: float
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
    return parse_job(json.loads(Path(sys.argv[1]).read_text()))


def parse_job(raw: dict[str, Any]) -> Job:
    """The job with these fields; exits with one line if they are not those of a job."""
    known = {field.name for field in fields(Job)}
    if not known - {"inputs", "reference"} <= set(raw) <= known:
        fail(f"a job: fields {sorted(raw)} must be {sorted(known)}")
    return Job(**{**raw, **{name: Path(raw[name]) for name in ("model", "tokens", "out", "reference") if raw.get(name)}})


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


def on_levels(values: Tensor, levels: Tensor) -> Tensor:
    """Which groups [groups] of values [groups, group] are levels [n], rising from 0, under one scale and either sign."""
    top = values.abs().amax(-1, keepdim=True).clamp(min=1e-30)  # [groups, 1]
    fits = values.abs().amax(-1) == 0  # [groups]
    for level in levels[1:]:  # the largest value is one of them
        ratio = values.abs() * (level / top)
        nearest = levels[torch.bucketize(ratio, (levels[1:] + levels[:-1]) / 2)]
        fits |= ((ratio - nearest).abs() < 1e-3 * nearest.clamp(min=float(levels[1]))).all(-1)
    return fits


def check_e2m1(rounded: dict[str, Tensor], group: int = 16) -> None:
    """Each linear's weights [out, in] must be E2M1 levels under one scale a group, or the run fails."""
    for name, weight in rounded.items():
        fits = on_levels(weight.reshape(-1, group), torch.tensor((0.0, *E2M1)))
        if not fits.all():
            fail(f"{name}: {int((~fits).sum())} of {len(fits)} groups are no E2M1 levels under one scale")


def check_levels(job: Job, rounded: dict[str, Tensor]) -> None:
    """Each linear's weights [out, in] must lie on at most 2^bits levels per row and group, or the run fails."""
    for name, weight in rounded.items():
        levels = max_levels(weight, job.group or weight.shape[1])
        if levels > 2**job.bits:
            fail(f"{name}: {levels} levels in one group must be at most {2**job.bits}")


def check_zeros(job: Job, weights: dict[str, Tensor]) -> None:
    """Each linear's weights [out, in] must have as many zeros as the job asks for, or the run fails."""
    pattern, sparsity = job.options.get("pattern"), float(job.options["sparsity"] or 0)
    for name, weight in weights.items():
        if pattern is not None:
            keep, of = map(int, str(pattern).split(":"))
            most = int((weight.unflatten(1, (-1, of)) != 0).sum(-1).max())
            if most > keep:
                fail(f"{name}: {most} of {of} neighbours stay, must be at most {keep}")
        share = float((weight == 0).float().mean())
        if abs(share - sparsity) > 0.001:
            fail(f"{name}: {share:.4f} of the weights are zero, must be {sparsity}")


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


@torch.no_grad()
def write_reference(model: nn.Module, tokens: Tensor, path: Path) -> None:
    """Keep test tokens [windows, length] and what the original predicts after them, log p [windows, length - 1, vocab]."""
    found = [model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1) for ids in tokens]
    save_file({"tokens": tokens, "log_probs": torch.stack(found)}, path)


@torch.no_grad()
def measure_windows(model: nn.Module, reference: Path, n_windows: int | None = None) -> tuple[list[float], list[float]]:
    """Mean loss, and mean KL from the original, of the first windows, or all, that `write_reference` kept; nats a token.

    As qtool's evaluate/perplexity and evaluate/kl_divergence: log-softmax in float32, means in float64.
    """
    losses, divergences = [], []
    with safe_open(reference, "pt") as file:
        log_probs = file.get_slice("log_probs")
        for index, ids in enumerate(file.get_tensor("tokens")[:n_windows]):
            q = model(ids[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)  # [length - 1, vocab]
            p = log_probs[index : index + 1][0]  # [length - 1, vocab]
            losses.append(float(F.nll_loss(q, ids[1:], reduction="none").double().mean()))
            divergences.append(float((p.exp() * (p - q)).sum(-1).double().mean()))
    return losses, divergences


@torch.no_grad()
def products(model: nn.Module, linears: list[str], sample: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input [tokens, in] and weights [out, in] of the last product within each linear, or what stands for it, on a window."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    inside: list[str] = []
    linear = F.linear

    def watch(x: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
        if inside:
            found[inside[-1]] = x.flatten(0, -2).clone(), W.clone()
        return linear(x, W, bias)

    hooks = []
    for name in linears:
        module = model.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: inside.append(name)))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    F.linear = watch
    try:
        model(sample[None], use_cache=False)
    finally:
        F.linear = linear
        for hook in hooks:
            hook.remove()
    return found


def check_products(job: Job, model: nn.Module, linears: list[str], sample: Tensor) -> None:
    """What linears multiply on a window [length] must lie on levels of the job's formats, or the run fails."""
    assert job.inputs is not None, "the job rounds inputs"
    found = products(model, linears, sample)
    if sorted(found) != sorted(linears):
        fail(f"{len(found)} linears multiplied, must be the {len(linears)} of the blocks")
    magnitudes, group = INPUT_LEVELS[job.inputs]
    for name, (x, _) in found.items():
        fits = on_levels(x[:LOOKED_AT].float().reshape(-1, group or x.shape[-1]), torch.tensor(magnitudes))
        if not fits.all():
            fail(f"{name}: inputs of {int((~fits).sum())} of {len(fits)} groups are no levels of {job.inputs} under one scale")
    weights = {name: W.float() for name, (_, W) in found.items()}
    if job.format in ("nvfp4", "mxfp4"):
        check_e2m1(weights, job.group or 16)
    else:
        check_levels(job, weights)


def write_measured(job: Job, tool: str, version: str, model: PreTrainedModel, cost: Cost, linears: list[str]) -> None:
    """Check and measure the tool's own quantized model, in float32, then write result.json into job.out.

    Bits per weight are counted by the job's formats: scales of 16 bits, of MXFP4 8, of NVFP4 8 and 32 for each linear.
    """
    assert job.reference is not None, "the job has a reference"
    plain = load_plain(job).float()
    n_weights = count_weights(plain, linears)
    _, (divergence,) = measure_windows(plain, job.reference, 1)
    if not divergence < 1e-6:
        fail(f"the checkpoint is {divergence:.1e} nats from what the reference was written by, must be the same model")
    n_scales = n_weights / job.group if job.group else sum(plain.get_submodule(name).out_features for name in linears)
    bits = job.bits + {"nvfp4": 8, "mxfp4": 8}.get(job.format, 16) * n_scales / n_weights
    bits += 32 * len(linears) / n_weights if job.format == "nvfp4" else 0
    model.float()
    check_products(job, model, linears, read_tokens(job)[0])
    losses, divergences = measure_windows(model, job.reference)
    result = {
        "version": version,
        "bits_per_weight": bits,
        "seconds": cost.seconds,
        "peak_rss_gib": cost.peak_rss_gib,
        "note": f"{cost.note}; {len(linears)} linears; inputs and weights on levels",
        "losses": losses,
        "divergences": divergences,
    }
    job.out.mkdir(parents=True, exist_ok=True)
    (job.out / "result.json").write_text(json.dumps(result) + "\n")


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


@torch.no_grad()
def write_sparse(job: Job, tool: str, version: str, model: PreTrainedModel, cost: Cost) -> None:
    """`write_result` of a model that was pruned in place; its weights stay in 16 bits."""
    sample = read_tokens(job)[0]
    logits = model(sample[None]).logits[0].float()  # [length, vocab]
    weights = {name: parameter.float().contiguous() for name, parameter in model.named_parameters()}
    write_result(job, tool, version, Outcome(cost.seconds, cost.peak_rss_gib, logits, weights, 16.0, cost.note), sample)


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
    if job.format == "sparse":
        check_zeros(job, rounded)
    else:
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
