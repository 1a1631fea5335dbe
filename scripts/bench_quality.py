"""Compare qtool's weight-only methods with other tools on the same model, calibration tokens and test text.

    scripts/peers/setup_venvs.sh                      # once: each peer in an environment of its own, beside the repository
    python scripts/bench_quality.py                   # prints the tables; --json FILE keeps the rows, --plot FILE draws them
    python scripts/bench_quality.py --schemes w4a16g128 --methods gptq gptaq --tools qtool gptqmodel
    python scripts/bench_quality.py --json rows.json --append      # a study of hours: what rows.json holds is not run again

Every tool quantizes the same checkpoint with the same 128 x 512 tokens in a process of its own and leaves its weights
dequantized in float32. One evaluator then measures all of them in float32, window by window of the same text: mean KL from
the original in nats per token, and perplexity. Differences and ratios of two rows pair the windows, which takes out how hard
each text is. Seconds are those of the quantization call, without imports and without saving the export; memory is the peak
of the process. Bits per weight are counted in what the tool stores for the linears it quantized: codes as packed, scales,
zero points.
Choices (options, recipes) are made with --text demo:validation; the test split is only measured.

    python scripts/bench_quality.py --ablate recipes/best-w3.yaml --text demo:validation

tells what each step of a recipe that changes the model brings: the recipe's first such step alone, the first two, and so on.

    python scripts/bench_quality.py --train-model build/qwen3   # a small model of another family, for --model build/qwen3/model
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
Steps = list[dict[str, Any]]

# Which rows there are. {scheme: {method: tools}}; a scheme before its first "-" is a class, whose rows compete.
STUDY = {
    "w4a16g128": {
        "rtn": "qtool llmcompressor gptqmodel torchao",
        "gptq": "qtool llmcompressor gptqmodel",
        "gptaq": "qtool gptqmodel",
        "awq": "qtool modelopt",
        "hqq": "qtool torchao",
        "autoround": "qtool auto-round llmcompressor",
        "autoround-best": "auto-round",
        "autoround-v2": "auto-round",
        "yaqa": "qtool",
        "best": "qtool",
    },
    "w4a16g128-asym": {"awq": "qtool llmcompressor gptqmodel", "autoround": "qtool auto-round"},
    "w3a16g128": {
        "rtn": "qtool llmcompressor gptqmodel torchao",
        "gptq": "qtool llmcompressor gptqmodel",
        "gptaq": "qtool gptqmodel",
        "hqq": "qtool torchao",
        "autoround": "qtool auto-round llmcompressor",
        "autoround-best": "auto-round",
        "autoround-v2": "auto-round",
        "yaqa": "qtool",
        "best": "qtool",
    },
    "w3a16g128-asym": {"awq": "qtool llmcompressor gptqmodel", "autoround": "qtool auto-round"},
    "w2a16g64": {
        "gptq": "qtool llmcompressor gptqmodel",
        "autoround": "qtool auto-round llmcompressor",
        "autoround-v2": "auto-round",
    },
    "w2a16g64-asym": {
        "rtn": "qtool llmcompressor gptqmodel",
        "gptq": "qtool llmcompressor gptqmodel",
        "gptaq": "qtool gptqmodel",
        "awq": "qtool llmcompressor gptqmodel",
        "autoround": "qtool auto-round",
        "autoround-best": "auto-round",
        "yaqa": "qtool",
        "best": "qtool",
    },
    "w4a16g64-asymf16": {"hqq": "qtool hqq"},
    "w3a16g64-asymf16": {"hqq": "qtool hqq"},
    "w2a16g64-asymf16": {"hqq": "qtool hqq"},
    "nvfp4": {
        "rtn": "qtool llmcompressor modelopt",
        "gptq": "qtool llmcompressor",
        "awq": "modelopt",
        "autoround": "qtool auto-round",
        "autoround-best": "auto-round",
        "autoround-v2": "auto-round",
        "yaqa": "qtool",
        "best": "qtool",
    },
    "nf4g64": {"rtn": "qtool bitsandbytes", "rtn-double": "bitsandbytes"},
    "fp4_bnbg64": {"rtn": "qtool bitsandbytes", "rtn-double": "bitsandbytes"},
    # Methods that no peer has in the same scheme, as their recipes in recipes/ run them.
    "recipe": dict.fromkeys(
        [
            "w4-fine-quant", "nf4-daq", "mixed-search", "w4-deep-shape", "w3-ada-dim", "w3-spqr", "w3-lorc", "w3-ada-round",
            "w3-omniquant", "w3-nupes", "w2-lattice", "w1-ptq161",
        ],
        "qtool",
    ),
}
BEST = {
    "w4a16g128": "best-w4.yaml",
    "w3a16g128": "best-w3.yaml",
    "w2a16g64-asym": "best-w2.yaml",
    "nvfp4": "best-nvfp4.yaml",
}


@dataclass
class Row:
    """One tool's one result; what was not measured is null, and the original has neither seconds nor bits."""

    scheme: str
    method: str
    tool: str
    digest: str  # of the model, the tokens and the text; of the settings
    version: str = ""
    note: str = ""
    bits_per_weight: float | None = None
    seconds: float | None = None
    peak_rss_gib: float | None = None
    losses: Sequence[float] = ()  # mean of every window, nats a token
    divergences: Sequence[float] = ()  # mean KL from the original of every window, nats a token
    error: str = ""

    @property
    def kl(self) -> float:
        return statistics.fmean(self.divergences)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    @property
    def family(self) -> str:
        return self.scheme.split("-")[0]

    def to_json(self) -> str:
        """One line, with the means that follow from the windows."""
        means: dict[str, float] = {}
        if self.losses:
            means = {"kl_divergence": self.kl, "kl_divergence_stderr": standard_error(self.divergences)}
            means |= {"perplexity": self.perplexity, "perplexity_stderr": self.perplexity * standard_error(self.losses)}
        return json.dumps(asdict(self) | means)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def read_rows(path: Path) -> list[Row]:
    names = [field.name for field in fields(Row)]
    return [Row(**{name: raw[name] for name in names}) for raw in json.loads(path.read_text())]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A JSON list, one row a line; the file is replaced whole, so that a killed study leaves the one before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(row.to_json() for row in rows) + "\n]\n")
    temporary.replace(path)


def qtool_steps(scheme: str, method: str, iterations: int | None) -> Steps | None:
    """The steps for a method, options being qtool's defaults, or a recipe's; None where its file does not exist."""
    if scheme == "recipe" or method == "best":
        return recipe_steps(f"{method}.yaml" if scheme == "recipe" else BEST[scheme])
    if method == "awq":
        return [{"transform/awq": {"scheme": scheme}}, {"quantize/rtn": {"scheme": scheme, "range": "output"}}]
    if method == "gptaq":
        return [{"quantize/gptq": {"scheme": scheme, "alpha": 0.25}}]
    if method == "autoround":
        return [{"quantize/sign_round": {"scheme": scheme, "steps": iterations or 200}}]
    return [{f"quantize/{method}": {"scheme": scheme}}]


def recipe_steps(file: str) -> Steps | None:
    """The steps of a recipe that change the model or choose its schemes; None where the file does not exist."""
    from qtool.recipe import CHANGING, load

    path = REPO / "recipes" / file
    if not path.is_file():
        print(f"bench_quality: no {path.relative_to(REPO)}; its row is left out", file=sys.stderr)
        return None
    steps = [step for step in load(path).steps if step.method.kind in ("search", *CHANGING)]
    return [{step.key: step.options.model_dump(mode="json")} for step in steps]


def peer_options(method: str, iterations: int | None) -> dict[str, int]:
    return {"iters": iterations} if iterations is not None and method.startswith("autoround") else {}


def run_qtool(job_file: Path) -> None:
    """The qtool side of a job, in a process of its own: runs a recipe, writes dequantized weights and result.json."""
    import torch
    import yaml
    from safetensors.torch import save_file

    from qtool import __version__
    from qtool.model.handle import ModelHandle
    from qtool.model.linear import is_linear, weight_of
    from qtool.pipeline.run import run_recipe
    from qtool.progress import Silent
    from qtool.recipe import load

    job = json.loads(job_file.read_text())
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    steps = [{"calibrate/text": job["text"]}, *job["steps"]]
    (out / "recipe.yaml").write_text(yaml.safe_dump({"model": job["model"], "pipeline": steps}, sort_keys=False))
    recipe = load(out / "recipe.yaml")
    results = run_recipe(recipe, out / "run", Silent(), fresh=True)
    changes = tuple(sorted(path.parent for path in (out / "run" / "state").glob("*/block_000.safetensors")))
    model = ModelHandle(recipe.model.model_copy(update={"dtype": "float32"}), changes)
    weights: dict[str, torch.Tensor] = {}
    with model.materialized() as whole:
        for name, module in whole.named_modules():
            kept = dict(module.named_parameters(recurse=False))
            if is_linear(module):
                weights[f"{name}.weight"] = weight_of(module).contiguous()  # those in groups of one input channel are not
                kept = {key: value for key, value in kept.items() if key == "bias"}
            weights |= {f"{name}.{key}": value.to(torch.float32, copy=True) for key, value in kept.items()}
    save_file(weights, out / "weights.safetensors")
    result = {
        "version": __version__,
        "bits_per_weight": results["model"]["bits_per_weight"],
        "seconds": sum(stage["seconds"] for stage in results["stages"][1:]),
        "peak_rss_gib": max(stage["peak_rss_gib"] for stage in results["stages"]),
        "note": f"{len(results['fallbacks'])} fallbacks",
    }
    (out / "result.json").write_text(json.dumps(result))


def compare(folder: Path, original: Any, tokens: Any) -> tuple[list[float], list[float]]:
    """Mean loss, and mean KL from the original, of every window of tokens [samples, length], nats a token.

    As evaluate/perplexity and evaluate/kl_divergence compute them, which give their means alone.
    """
    import torch
    import torch.nn.functional as F

    from qtool.model.handle import ModelHandle
    from qtool.options import ModelOptions

    model = ModelHandle(ModelOptions(path=str(folder), dtype="float32")) if folder != original.folder else original
    losses, divergences = [], []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        hidden, reference = model.final_hidden(tokens), original.final_hidden(tokens)  # [samples, length, hidden]
        for handle in {model, original}:
            stack.enter_context(handle.outer())
        for ids, own, other in zip(tokens, hidden.split(1), reference.split(1), strict=True):  # one window at a time
            q = model.logits(own)[0, :-1].float().log_softmax(-1)  # [length - 1, vocab]
            p = original.logits(other)[0, :-1].float().log_softmax(-1)  # [length - 1, vocab]
            losses.append(float(F.nll_loss(q, ids[1:], reduction="none").double().mean()))
            divergences.append(float((p.exp() * (p - q)).sum(-1).double().mean()))
    return losses, divergences


def ablate(path: Path, text: str, windows: int | None, work: Path) -> str:
    """A Markdown table: KL and perplexity after each of a recipe's changing steps."""
    from qtool import registry
    from qtool.model.handle import ModelHandle
    from qtool.pipeline.run import run_recipe
    from qtool.progress import Silent
    from qtool.recipe import CHANGING, load

    recipe = load(path)
    original = ModelHandle(recipe.model)
    evaluators = [registry.load(f"evaluate/{name}") for name in ("kl_divergence", "perplexity")]
    lines = ["| up to | KL (nats/token) | perplexity | bits per weight | seconds |", "|---|---|---|---|---|"]
    kept: Steps = []
    for step in recipe.steps:
        if step.method.kind not in ("calibrate", "search", *CHANGING):
            continue
        kept.append({step.key: step.options.model_dump(mode="json")})
        if step.method.kind in ("calibrate", "search"):
            continue
        folder = work / f"{path.stem}-{len(kept)}"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"model": recipe.model.model_dump(mode="json"), "seed": recipe.seed, "pipeline": kept}
        (folder / "recipe.yaml").write_text(json.dumps(content))
        results = run_recipe(load(folder / "recipe.yaml"), folder / "run", Silent(), fresh=True)
        changes = sorted({file.parent for file in (folder / "run" / "state").glob("*/block_000.safetensors")})
        handle = ModelHandle(recipe.model, tuple(changes))
        cells = []
        for evaluator in evaluators:
            options = evaluator.options.model_validate({"source": text, "length": 512, "samples": windows})
            metric = evaluator.run(handle, original, options, 0)[0]
            cells.append(f"{metric.value:.5f} ± {metric.stderr:.5f}")
        bits = f"{results['model']['bits_per_weight']:.3f}"
        seconds = sum(stage["seconds"] for stage in results["stages"][1:])
        lines.append(f"| {step.key} | {' | '.join(cells)} | {bits} | {seconds:.0f} |")
    return "\n".join(lines)


def make_checkpoint(source: Path, out: Path) -> Path:
    """A plain float32 checkpoint folder of a job's dequantized weights."""
    folder = out / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in source.iterdir():  # the tokenizer's files, whatever it is made of
        if path.suffix in (".json", ".txt", ".model", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copyfile(path, folder / path.name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    shutil.move(out / "weights.safetensors", folder / "model.safetensors")
    return folder


def run_tool(row: Row, job: dict[str, Any], out: Path, venvs: Path) -> None:
    """Run one job in a process of its own; fills the row's version, bits, seconds, memory and note, or its error."""
    shutil.rmtree(out, ignore_errors=True)
    job_file = out.with_suffix(".json")
    job_file.write_text(json.dumps(job | {"out": str(out)}))
    if row.tool == "qtool":
        command = [sys.executable, __file__, "--job", str(job_file)]
    else:
        runner = REPO / "scripts" / "peers" / f"run_{row.tool.replace('-', '_')}.py"
        command = [str(venvs / f"peer-{row.tool}" / "bin" / "python"), str(runner), str(job_file)]
        if not Path(command[0]).is_file():
            row.error = f"no {command[0]}; scripts/peers/setup_venvs.sh makes it"
            return
    # Large pages as the command line sets them, for every tool.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    # in the work folder, because some tools leave logs where they run
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=out.parent)
    out.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        row.error = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return
    for name, value in json.loads((out / "result.json").read_text()).items():
        if name != "tool":
            setattr(row, name, value)


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, each beside the peer of the lowest KL in its class and the original."""
    lines = [
        "| scheme | method | tool | bits | KL (nats/token) | less the best peer's | perplexity | change | seconds | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    original = next(row for row in rows if row.tool == "original")
    for row in rows:
        head = f"| {row.scheme} | {row.method} | {row.tool} {row.version} "
        if row.error:
            lines.append(f"{head}| failed: {row.error} | | | | | | |")
            continue
        ppl = f"{row.perplexity:.3f} ± {row.perplexity * standard_error(row.losses):.3f}"
        if row is original:
            lines.append(f"{head}| | 0 | | {ppl} | | | |")
            continue
        peer = best_peer(rows, row.family)
        less = ""
        if peer is not None and peer is not row:
            pairs = [a - b for a, b in zip(row.divergences, peer.divergences, strict=True)]
            less = f"{statistics.fmean(pairs):+.5f} ± {standard_error(pairs):.5f}"
        pairs = [a - b for a, b in zip(row.losses, original.losses, strict=True)]
        ratio = math.exp(statistics.fmean(pairs))
        change = f"{100 * (ratio - 1):+.2f} ± {100 * ratio * standard_error(pairs):.2f} %"
        kl = f"{row.kl:.5f} ± {standard_error(row.divergences):.5f}"
        cost = f"{row.seconds:.1f} | {row.peak_rss_gib:.2f}"
        lines.append(f"{head}| {row.bits_per_weight:.3f} | {kl} | {less} | {ppl} | {change} | {cost} |")
    return "\n".join(lines)


def best_peer(rows: Sequence[Row], family: str) -> Row | None:
    """The row of the lowest KL among other tools' of a class."""
    peers = [row for row in rows if row.family == family and row.tool not in ("qtool", "original") and not row.error]
    return min(peers, key=lambda row: row.kl, default=None)


def ratios(rows: Sequence[Row]) -> str:
    """A Markdown table: qtool's rows against the best peer of the same method, and its best against the best peer of all.

    KL against the peer of the lowest KL; seconds and memory against the lowest of any peer with the row's method.
    """
    lines = ["| scheme | method | against | KL ratio | seconds ratio | memory ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.tool != "qtool" or row.error:
            continue
        same = [other for other in rows if (other.scheme, other.method) == (row.scheme, row.method)]
        peers = [other for other in same if other.tool != "qtool" and not other.error]
        against = min(peers, key=lambda peer: peer.kl, default=None)
        if row.method == "best":
            against = best_peer(rows, row.family)
            peers = [] if against is None else [against]
        if against is None:
            continue
        ratio = row.kl / against.kl
        spread = standard_error([a - ratio * b for a, b in zip(row.divergences, against.divergences, strict=True)])
        seconds = row.seconds / min(peer.seconds for peer in peers)
        memory = row.peak_rss_gib / min(peer.peak_rss_gib for peer in peers)
        name = f"{against.tool} {against.method} {against.scheme if against.scheme != row.scheme else ''}".strip()
        kl = f"{ratio:.3f} ± {spread / against.kl:.3f}"
        lines.append(f"| {row.scheme} | {row.method} | {name} | {kl} | {seconds:.3g} | {memory:.3g} |")
    return "\n".join(lines)


def short_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def train_model(out: Path, architecture: str, tokens: float) -> None:
    """Train a small model of another family on the demo model's text, with its tokenizer."""
    script = REPO / "scripts" / "train_demo_model.py"
    command = [sys.executable, str(script), "--architecture", architecture, "--out", str(out), "--work", str(out / "work")]
    subprocess.run([*command, "--tokens", str(tokens)], check=True)


def main() -> None:
    methods = {method for row in STUDY.values() for method in row}
    tools = {tool for row in STUDY.values() for names in row.values() for tool in names.split()}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a local transformers checkpoint")
    parser.add_argument("--text", default="demo:test", help="what is measured; demo:validation for making choices")
    parser.add_argument("--venvs", type=Path, default=REPO.parent / "venvs", help="where setup_venvs.sh put the peers")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "bench_quality")
    parser.add_argument("--schemes", nargs="+", default=list(STUDY), choices=list(STUDY), metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", default=sorted(methods), choices=sorted(methods), metavar="METHOD")
    parser.add_argument("--tools", nargs="+", default=sorted(tools), choices=sorted(tools), metavar="TOOL")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=None, help="windows of text to measure; all without it")
    parser.add_argument("--iterations", type=int, default=None, help="for trials: updates of AutoRound, not its 200 or 1000")
    parser.add_argument("--json", type=Path, default=None, help="file that keeps the rows, written after each")
    parser.add_argument("--append", action="store_true", help="keep the rows of --json, run only what is not in it")
    parser.add_argument("--redo", nargs="+", default=[], metavar="TOOL", help="with --append: tools to run again all the same")
    parser.add_argument("--plot", type=Path, default=None, metavar="SVG", help="draw the rows; needs the extra bench")
    parser.add_argument("--ablate", type=Path, default=None, metavar="RECIPE", help="measure a recipe step by step instead")
    parser.add_argument("--train-model", type=Path, default=None, metavar="OUT", help="train a second small model instead")
    parser.add_argument("--architecture", default="qwen3", help="of --train-model: qwen3 or gpt_neox")
    parser.add_argument("--tokens", type=float, default=12e6, help="of --train-model: how many to train on")
    parser.add_argument("--job", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.append and arguments.json is None:
        parser.error("--append needs --json FILE")
    if arguments.job is not None:
        run_qtool(arguments.job)
    elif arguments.ablate is not None:
        print(ablate(arguments.ablate, arguments.text, arguments.windows, arguments.work.resolve()))
    elif arguments.train_model is not None:
        train_model(arguments.train_model, arguments.architecture, arguments.tokens)
    else:
        study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Run and measure all rows asked for, and print the tables."""
    from safetensors.torch import save_file

    from qtool.calibration.tokens import TextOptions, digest_tokens, read_tokens
    from qtool.formats.scheme import Scheme
    from qtool.model.handle import ModelHandle
    from qtool.options import ModelOptions
    from qtool.pipeline.run import digest_model

    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    original = ModelHandle(ModelOptions(path=arguments.model, dtype="float32"))
    text = {"source": "demo:calibration", "samples": arguments.samples, "length": 512}
    tokens = read_tokens(TextOptions.model_validate(text), original.tokenizer, 0)  # [samples, length]
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    measured = {"source": arguments.text, "samples": arguments.windows, "length": 512, "shuffle": False}
    test = read_tokens(TextOptions.model_validate(measured), original.tokenizer, 0)  # [windows, length]
    common = short_digest([digest_model(original), digest_tokens(tokens), digest_tokens(test)])

    rows = read_rows(arguments.json) if arguments.append and arguments.json.is_file() else []
    rows = [row for row in rows if row.tool not in ("original", *arguments.redo) and not row.error]
    if any(not row.digest.startswith(common) for row in rows):
        sys.exit(f"bench_quality: {arguments.json} holds rows of another model or other text; name another file")
    losses, divergences = compare(original.folder, original, test)
    rows.insert(0, Row("bf16", "", "original", "", losses=losses, divergences=divergences))
    for scheme in arguments.schemes:
        for method, tools in STUDY[scheme].items():
            for tool in tools.split():
                if method not in arguments.methods or tool not in arguments.tools:
                    continue
                job = {"model": str(original.folder)}
                if tool == "qtool":
                    steps = qtool_steps(scheme, method, arguments.iterations)
                    if steps is None:
                        continue
                    job |= {"text": text, "steps": steps}
                else:
                    weights = Scheme.model_validate(scheme).weights
                    format = "nvfp4" if scheme == "nvfp4" else "fp4" if weights.format == "fp4_bnb" else weights.format
                    job |= {
                        "tokens": str(work / "tokens.safetensors"), "method": method, "format": format, "bits": weights.bits,
                        "group": weights.group, "symmetric": weights.symmetric,
                        "options": peer_options(method, arguments.iterations),
                    }  # fmt: skip
                settings = {key: value for key, value in job.items() if key not in ("model", "tokens")}
                digest = f"{common}-{short_digest(settings)}"
                key = (scheme, method, tool)
                if any((row.scheme, row.method, row.tool) == key and row.digest == digest for row in rows):
                    continue
                rows = [row for row in rows if (row.scheme, row.method, row.tool) != key]
                row = Row(scheme, method, tool, digest)
                out = work / f"{tool}-{method}-{scheme}"
                run_tool(row, job, out, arguments.venvs)
                if not row.error:
                    row.losses, row.divergences = compare(make_checkpoint(original.folder, out), original, test)
                    shutil.rmtree(out)
                told = row.error or f"KL {row.kl:.5f}, {row.bits_per_weight:.3f} bits, {row.seconds:.1f} s; {row.note}"
                print(f"{scheme} {method} {tool}: {told}", file=sys.stderr, flush=True)
                rows.append(row)
                if arguments.json is not None:
                    write_rows(arguments.json, sort_rows(rows))
    rows = sort_rows(rows)
    print(f"{table(rows)}\n\n{ratios(rows)}")
    if arguments.json is not None:
        write_rows(arguments.json, rows)
    if arguments.plot is not None:
        from plot_quality import plot

        plot([json.loads(row.to_json()) for row in rows], arguments.plot)


def sort_rows(rows: Sequence[Row]) -> list[Row]:
    """In the order of the study, the original first."""
    order = [(scheme, method, tool) for scheme in STUDY for method in STUDY[scheme] for tool in STUDY[scheme][method].split()]
    return sorted(rows, key=lambda row: order.index(key) if (key := (row.scheme, row.method, row.tool)) in order else -1)


if __name__ == "__main__":
    main()
