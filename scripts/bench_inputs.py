"""Compare qtool with other tools where inputs of linears, and the key/value cache, are rounded while the model runs.

    scripts/peers/setup_venvs.sh                      # once: each peer in an environment of its own, beside the repository
    python scripts/bench_inputs.py                    # prints the tables; --json FILE keeps the rows
    python scripts/bench_inputs.py --schemes w8a8 --methods rtn --tools qtool llmcompressor
    python scripts/bench_inputs.py --json rows.json --append       # a study of hours: what rows.json holds is not run again

As bench_quality.py, whose rows and tables these are, but no weights that a tool leaves tell what its rounded inputs cost. So
every tool's own quantized model, its own rounding of inputs in it, predicts the test text in the tool's environment, in
float32; the original's predictions are written once, for all. Measured are loss and KL from the original of every window, by
one function for all tools (peers/peer_job.py), and nothing is believed unmeasured: what the linears multiply must lie on levels
of the row's formats, weights and inputs alike.
A method's name is a chain, transforms first. Rows of planted:... run on a copy of the model that computes the same and has
outliers, which scripts/plant_outliers.py puts there as PLANTED says; the original's predictions are those of the model itself.
Choices (options, recipes) are made with --text demo:validation; the test split is only measured.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench_rows import REPO, Row, Steps, Study, carry_out, ratios, read_subject, recipe_steps, run_study, study_parser, table

sys.path.insert(0, str(REPO / "scripts" / "peers"))
import peer_job  # noqa: E402

# Which rows there are, see bench_rows.py. INT8_SMOOTHQUANT of modelopt rounds inputs by static scales; of its W4A8_AWQ inputs
# are FP8, static too.
STUDY: Study = {
    "w8a8": {
        "rtn": "qtool llmcompressor",
        "gptq": "qtool",
        "smoothquant-rtn": "qtool modelopt",
        "smoothquant-gptq": "qtool llmcompressor",
    },
    "w4a8g128": {"rtn": "qtool llmcompressor", "gptq": "qtool llmcompressor", "smoothquant-gptq": "qtool", "best": "qtool"},
    "w4g128-ae4m3": {"gptq": "qtool llmcompressor", "awq": "modelopt"},
    "w4a4": {
        "rtn": "qtool llmcompressor",
        "gptq": "qtool llmcompressor",
        "hadamard-gptq": "qtool llmcompressor",
        "quip-gptq": "llmcompressor",
        "spinquant-gptq": "qtool",
        "ostquant-gptq": "qtool",
        "best": "qtool",
    },
    "nvfp4-anvfp4": {
        "rtn": "qtool llmcompressor modelopt",
        "gptq": "qtool llmcompressor",
        "autoround": "auto-round",
        "best": "qtool",
    },
    "mxfp4-amxfp4": {
        "rtn": "qtool llmcompressor modelopt",
        "gptq": "qtool llmcompressor",
        "autoround": "auto-round",
        "best": "qtool",
    },
    "w4a4kv4": {"ostquant-gptq": "qtool", "best": "qtool"},
    "planted:w8a8": {
        "rtn": "qtool llmcompressor",
        "smoothquant-rtn": "qtool",
        "hadamard-rtn": "qtool llmcompressor",
        "spinquant-rtn": "qtool",
    },
    "planted:w4a4": {
        "rtn": "qtool llmcompressor",
        "smoothquant-rtn": "qtool",
        "hadamard-rtn": "qtool llmcompressor",
        "spinquant-rtn": "qtool",
    },
}
BEST = {
    "w4a8g128": "best-w4a8.yaml",
    "w4a4": "best-w4a4.yaml",
    "nvfp4-anvfp4": "best-nvfp4-a4.yaml",
    "mxfp4-amxfp4": "best-mxfp4-a4.yaml",
    "w4a4kv4": "best-w4a4.yaml",
}
OWN = {"w4a4kv4": "w4a4"}  # what a rounded cache costs beside rounded inputs
# What scripts/plant_outliers.py is told, one after the other.
PLANTED = (
    ("--kind", "residual"),
    ("--kind", "gains", "--strength", "16", "--channels", "4"),
    ("--kind", "hidden", "--strength", "16", "--channels", "4"),
)
# A cache of four bits as QuaRot's: each token in groups, keys rotated, none kept as it is.
KIVI = {"key_bits": 4, "value_bits": 4, "group": 64, "residual": 0, "keys": "per_token", "rotate": "hadamard"}


def qtool_steps(scheme: str, method: str) -> Steps | None:
    """The steps of a chain, options as the recipes in recipes/ have them, or a recipe's; None where its file does not exist.

    With kv4 at its end a scheme has the cache rounded before weights are, and while rotations learn.
    """
    linears, *cache = scheme.removeprefix("planted:").split("kv")
    if method == "best":
        steps = recipe_steps(BEST[scheme])
    else:
        *transforms, rounding = method.split("-")
        learned = {"scheme": linears, "rounds": "inputs", "online": True, "steps": 100, "batch": 8}
        known = {
            "smoothquant": {"alpha": "search", "scheme": linears},
            "hadamard": {"online": True},
            "spinquant": learned,
            "ostquant": learned,
        }
        steps = [{f"transform/{name}": known[name]} for name in transforms] + [{f"quantize/{rounding}": {"scheme": linears}}]
    if steps is None or not cache:
        return steps
    for step in steps:
        for name in {"transform/spinquant", "transform/ostquant"} & step.keys():
            step[name] |= {"cache": dict(KIVI)}  # the recipe has no aliases
    before = sum(next(iter(step)).startswith("transform/") for step in steps)
    return [*steps[:before], {"quantize/kivi": KIVI}, *steps[before:]]


def run_qtool(job_file: Path) -> None:
    """The qtool side of a job, in a process of its own: runs a recipe, checks and measures the model, writes result.json."""
    raw = json.loads(job_file.read_text())
    handle, result = carry_out(raw)
    job = peer_job.parse_job({name: value for name, value in raw.items() if name not in ("text", "steps")})
    linears = list(handle.schemes())
    model = handle.take()
    peer_job.check_products(job, model, linears, peer_job.read_tokens(job)[0])
    assert job.reference is not None, "study writes one"
    result["losses"], result["divergences"] = peer_job.measure_windows(model, job.reference)
    (job.out / "result.json").write_text(json.dumps(result))


def plant(model: Path, out: Path) -> Path:
    """The folder of a copy of the model with outliers, written beside others in `out` where it is not there yet."""
    for step, words in enumerate(PLANTED):
        copy = out / "-".join(["planted", *(word.lstrip("-") for one in PLANTED[: step + 1] for word in one[1::2])])
        if not copy.is_dir():
            script = REPO / "scripts" / "plant_outliers.py"
            subprocess.run([sys.executable, str(script), *words, "--model", str(model), "--out", str(copy)], check=True)
        model = copy
    return model


def main() -> None:
    arguments = study_parser(__doc__, STUDY, REPO / "build" / "bench_inputs").parse_args()
    if arguments.append and arguments.json is None:
        sys.exit("bench_inputs: --append needs --json FILE")
    if arguments.job is not None:
        run_qtool(arguments.job)
    else:
        study(arguments)


def study(arguments: argparse.Namespace) -> None:
    """Run and measure all rows asked for, and print the tables."""
    from qtool.formats.scheme import Scheme
    from qtool.model.handle import ModelHandle

    subject = read_subject(arguments)
    folder = subject.original.folder
    reference = arguments.work.resolve() / "reference.safetensors"
    model = ModelHandle(subject.original.options).take()
    peer_job.write_reference(model, subject.test, reference)
    losses, divergences = peer_job.measure_windows(model, reference)

    def job_of(scheme: str, method: str, tool: str) -> tuple[dict[str, Any], object] | None:
        is_planted = scheme.startswith("planted:")
        parts = Scheme.model_validate(scheme.removeprefix("planted:"))
        assert parts.activations is not None, f"{scheme} rounds inputs"
        weights = parts.weights
        job: dict[str, Any] = {
            "model": str(plant(folder, arguments.work.resolve()) if is_planted else folder),
            "tokens": str(subject.tokens),
            "reference": str(reference),
            "method": method,
            "format": str(weights) if weights.scale_dtype.startswith("float8") else weights.format,
            "bits": weights.bits,
            "group": weights.group,
            "symmetric": weights.symmetric,
            "inputs": str(parts.activations),
            "options": {"iters": arguments.iterations} if arguments.iterations and method == "autoround" else {},
        }
        if tool == "qtool":
            steps = qtool_steps(scheme, method)
            if steps is None:
                return None
            job |= {"text": subject.text, "steps": steps}
        return job, PLANTED if is_planted else None

    original = Row("bf16", "", "original", "", losses=losses, divergences=divergences)
    rows = run_study(arguments, STUDY, __file__, subject, original, job_of, lambda row, out: None)
    print(f"{table(rows)}\n\n{ratios(rows, OWN)}")


if __name__ == "__main__":
    main()
