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
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_rows import REPO, Row, Steps, carry_out, ratios, read_subject, recipe_steps, run_study, study_parser, table

# Which rows there are, see bench_rows.py.
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


def peer_options(method: str, iterations: int | None) -> dict[str, int]:
    return {"iters": iterations} if iterations is not None and method.startswith("autoround") else {}


def run_qtool(job_file: Path) -> None:
    """The qtool side of a job, in a process of its own: runs a recipe, writes dequantized weights and result.json."""
    import torch
    from safetensors.torch import save_file

    from qtool.model.linear import is_linear, weight_of

    job = json.loads(job_file.read_text())
    model, result = carry_out(job)
    weights: dict[str, torch.Tensor] = {}
    with model.materialized() as whole:
        for name, module in whole.named_modules():
            kept = dict(module.named_parameters(recurse=False))
            if is_linear(module):
                weights[f"{name}.weight"] = weight_of(module).contiguous()  # those in groups of one input channel are not
                kept = {key: value for key, value in kept.items() if key == "bias"}
            weights |= {f"{name}.{key}": value.to(torch.float32, copy=True) for key, value in kept.items()}
    save_file(weights, Path(job["out"]) / "weights.safetensors")
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))


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


def train_model(out: Path, architecture: str, tokens: float) -> None:
    """Train a small model of another family on the demo model's text, with its tokenizer."""
    script = REPO / "scripts" / "train_demo_model.py"
    command = [sys.executable, str(script), "--architecture", architecture, "--out", str(out), "--work", str(out / "work")]
    subprocess.run([*command, "--tokens", str(tokens)], check=True)


def main() -> None:
    parser = study_parser(__doc__, STUDY, REPO / "build" / "bench_quality")
    parser.add_argument("--plot", type=Path, default=None, metavar="SVG", help="draw the rows; needs the extra bench")
    parser.add_argument("--ablate", type=Path, default=None, metavar="RECIPE", help="measure a recipe step by step instead")
    parser.add_argument("--train-model", type=Path, default=None, metavar="OUT", help="train a second small model instead")
    parser.add_argument("--architecture", default="qwen3", help="of --train-model: qwen3 or gpt_neox")
    parser.add_argument("--tokens", type=float, default=12e6, help="of --train-model: how many to train on")
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
    from qtool.formats.scheme import Scheme

    subject = read_subject(arguments)
    folder = subject.original.folder

    def job_of(scheme: str, method: str, tool: str) -> tuple[dict[str, Any], object] | None:
        if tool == "qtool":
            steps = qtool_steps(scheme, method, arguments.iterations)
            return None if steps is None else ({"model": str(folder), "text": subject.text, "steps": steps}, None)
        weights = Scheme.model_validate(scheme).weights
        format = "nvfp4" if scheme == "nvfp4" else "fp4" if weights.format == "fp4_bnb" else weights.format
        job = {
            "model": str(folder), "tokens": str(subject.tokens), "method": method, "format": format, "bits": weights.bits,
            "group": weights.group, "symmetric": weights.symmetric, "options": peer_options(method, arguments.iterations),
        }  # fmt: skip
        return job, None

    def measure(row: Row, out: Path) -> None:
        row.losses, row.divergences = compare(make_checkpoint(folder, out), subject.original, subject.test)

    losses, divergences = compare(folder, subject.original, subject.test)
    original = Row("bf16", "", "original", "", losses=losses, divergences=divergences)
    rows = run_study(arguments, STUDY, __file__, subject, original, job_of, measure)
    print(f"{table(rows)}\n\n{ratios(rows)}")
    if arguments.plot is not None:
        from plot_quality import plot

        plot([json.loads(row.to_json()) for row in rows], arguments.plot)


if __name__ == "__main__":
    main()
