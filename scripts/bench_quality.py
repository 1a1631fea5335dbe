"""Compare qtool's weight-only methods with other tools on the same model, calibration tokens and test text.

    scripts/peers/setup_venvs.sh                      # once: each peer in an environment of its own, beside the repository
    python scripts/bench_quality.py                   # prints the table; --json FILE keeps the rows

Every tool quantizes the same checkpoint with the same 128 x 512 tokens in a process of its own and leaves its weights
dequantized in float32. One evaluator then measures all of them in float32: mean KL from the original in nats per token
with its standard error, and perplexity. Seconds are those of the quantization call, without imports and without saving
the export; memory is the peak of the process.
Choices (options, recipes) are made with --text demo:validation; the test split is only measured.

    python scripts/bench_quality.py --ablate recipes/best-w3.yaml --text demo:validation

tells what each step of a recipe that changes the model brings: the recipe's first such step alone, the first two, and so on.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
SYMMETRIC = {"rtn": True, "gptq": True, "awq": False}  # AWQ's own preset has zero points, in every tool
PEERS = {"llmcompressor": ("rtn", "gptq", "awq"), "gptqmodel": ("rtn", "gptq", "awq")}


def qtool_steps(method: str, scheme: str) -> list[dict[str, Any]]:
    """The recipe's steps for a method; options are qtool's defaults."""
    if method == "awq":
        return [{"transform/awq": {"scheme": scheme}}, {"quantize/rtn": {"scheme": scheme, "range": "output"}}]
    return [{f"quantize/{method}": {"scheme": scheme}}]


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
    scheme = f"w{job['bits']}a16g{job['group']}" + ("" if job["symmetric"] else "-asym")
    steps = [{"calibrate/text": job["text"]}, *qtool_steps(job["method"], scheme)]
    (out / "recipe.yaml").write_text(yaml.safe_dump({"model": job["model"], "pipeline": steps}, sort_keys=False))
    recipe = load(out / "recipe.yaml")
    results = run_recipe(recipe, out / "run", Silent(), fresh=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    changes = tuple(sorted(path.parent for path in (out / "run" / "state").glob("*/block_000.safetensors")))
    model = ModelHandle(recipe.model.model_copy(update={"dtype": "float32"}), changes)
    weights: dict[str, torch.Tensor] = {}
    with model.materialized() as whole:
        for name, module in whole.named_modules():
            if is_linear(module):
                weights[f"{name}.weight"] = weight_of(module)
            else:
                weights |= {f"{name}.{key}": value.float() for key, value in module.named_parameters(recurse=False)}
    save_file(weights, out / "weights.safetensors")
    result = {
        "tool": "qtool",
        "version": __version__,
        "seconds": sum(stage["seconds"] for stage in results["stages"][1:]),
        "peak_rss_gib": peak,
        "note": f"{results['model']['bits_per_weight']:.3f} bits; {len(results['fallbacks'])} fallbacks",
    }
    (out / "result.json").write_text(json.dumps(result))


def measure(model: str, text: str, rows: list[dict[str, Any]], windows: int | None) -> None:
    """Add perplexity and KL, with standard errors, to every row that has weights."""
    from qtool import registry
    from qtool.model.handle import ModelHandle
    from qtool.options import ModelOptions

    original = ModelHandle(ModelOptions(path=model, dtype="float32"))
    options = {"source": text, "length": 512, "samples": windows}
    evaluators = [registry.load(f"evaluate/{name}") for name in ("perplexity", "kl_divergence")]
    for row in rows:
        if "error" in row:
            continue
        handle = original if row["out"] is None else ModelHandle(ModelOptions(path=row["out"], dtype="float32"))
        for evaluator in evaluators:
            for metric in evaluator.run(handle, original, evaluator.options.model_validate(options), 0):
                row[metric.name] = metric.value
                row[f"{metric.name}_stderr"] = metric.stderr


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
    kept: list[dict[str, Any]] = []
    for step in recipe.steps:
        if step.method.kind not in ("calibrate", *CHANGING):
            continue
        kept.append({step.key: step.options.model_dump(mode="json")})
        if step.method.kind == "calibrate":
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
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    shutil.move(out / "weights.safetensors", folder / "model.safetensors")
    return folder


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| scheme | method | tool | KL (nats/token) | perplexity | seconds | peak GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['scheme']} | {row['method']} | {row['tool']} {row.get('version', '')} "
        if "error" in row:
            lines.append(f"{head}| failed: {row['error']} | | | |")
            continue
        kl = f"{row['kl_divergence']:.5f} ± {row['kl_divergence_stderr']:.5f}" if row["out"] else "0"
        time = f"{row['seconds']:.1f} | {row['peak_rss_gib']:.2f}" if row["out"] else " | "
        lines.append(f"{head}| {kl} | {row['perplexity']:.3f} ± {row['perplexity_stderr']:.3f} | {time} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a local transformers checkpoint")
    parser.add_argument("--text", default="demo:test", help="what is measured; demo:validation for making choices")
    parser.add_argument("--venvs", type=Path, default=REPO.parent / "venvs", help="where setup_venvs.sh put the peers")
    parser.add_argument("--work", type=Path, default=REPO / "build" / "bench_quality")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq", "awq"])
    parser.add_argument("--tools", nargs="+", default=["qtool", *PEERS])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--windows", type=int, default=None, help="windows of text to measure; all without it")
    parser.add_argument("--ablate", type=Path, default=None, metavar="RECIPE", help="measure a recipe step by step instead")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--job", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        run_qtool(arguments.job)
        return
    if arguments.ablate is not None:
        print(ablate(arguments.ablate, arguments.text, arguments.windows, arguments.work.resolve()))
        return

    from safetensors.torch import save_file

    from qtool.calibration.tokens import TextOptions, read_tokens
    from qtool.model.handle import ModelHandle, resolve_folder
    from qtool.options import ModelOptions

    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    options = ModelOptions(path=arguments.model)
    source = resolve_folder(options)
    text = {"source": "demo:calibration", "samples": arguments.samples, "length": 512}
    tokens = read_tokens(TextOptions.model_validate(text), ModelHandle(options).tokenizer, 0)
    save_file({"tokens": tokens}, work / "tokens.safetensors")

    rows: list[dict[str, Any]] = [{"scheme": "bf16", "method": "", "tool": "original", "out": None}]
    # Large pages as the command line sets them, for every tool.
    threads = {"OMP_NUM_THREADS": str(os.cpu_count()), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    threads |= {"THP_MEM_ALLOC_ENABLE": "1"}
    for bits in arguments.bits:
        for method in arguments.methods:
            for tool in arguments.tools:
                if tool != "qtool" and method not in PEERS[tool]:
                    continue
                symmetric = SYMMETRIC[method]
                name = f"{tool}-{method}-w{bits}g{arguments.group}"
                out = work / name
                shutil.rmtree(out, ignore_errors=True)
                job = {
                    "model": str(source), "tokens": str(work / "tokens.safetensors"), "method": method, "bits": bits,
                    "group": arguments.group, "symmetric": symmetric, "out": str(out), "options": {},
                }  # fmt: skip
                job_file = work / f"{name}.json"
                if tool == "qtool":
                    job_file.write_text(json.dumps(job | {"text": text}))
                    command = [sys.executable, __file__, "--job", str(job_file)]
                else:
                    job_file.write_text(json.dumps(job))
                    python = arguments.venvs / f"peer-{tool}" / "bin" / "python"
                    command = [str(python), str(REPO / "scripts" / "peers" / f"run_{tool}.py"), str(job_file)]
                row: dict[str, Any] = {
                    "scheme": f"w{bits}a16g{arguments.group}{'' if symmetric else '-asym'}",
                    "method": method,
                }
                # in the work folder, because some tools leave logs where they run
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads, check=False, cwd=work)
                if done.returncode:
                    row |= {
                        "tool": tool,
                        "error": (done.stderr.strip().splitlines() or ["no message"])[-1][:120],
                        "out": None,
                    }
                else:
                    row |= json.loads((out / "result.json").read_text())
                    row["out"] = str(make_checkpoint(source, out))
                print(json.dumps(row), file=sys.stderr, flush=True)
                rows.append(row)
    measure(arguments.model, arguments.text, rows, arguments.windows)
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
