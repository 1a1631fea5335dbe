"""`qtool init`: write a commented recipe for a model and a goal."""

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qtool.errors import QtoolError


class Goal(StrEnum):
    """What the recipe is for."""

    SMALL = "small"
    FAST = "fast"
    W4 = "w4"
    W8 = "w8"
    W3 = "w3"
    SPARSE = "sparse"


@dataclass(frozen=True)
class Plan:
    """What a goal means: the head of the file, the steps, and what may be lost."""

    purpose: str
    steps: tuple[str, ...]
    allowed_increase: str


PLANS = {
    Goal.SMALL: Plan(
        "the fewest bytes: int3 weights in groups of 64, then trained back toward the original",
        (
            "- transform/awq: {scheme: w3a16g64-asym}          # protects channels with large activations",
            "- quantize/gptq: {scheme: w3a16g64-asym, act_order: static, ignore: [lm_head]}",
            "- distill/logits: {steps: 200, lr: 1.0e-5}        # the scales learn; the slowest step",
        ),
        "25%",
    ),
    Goal.FAST: Plan(
        "throughput: int8 weights and activations, for int8 matrix units",
        (
            "- transform/smoothquant: {alpha: 0.5}             # moves activations' outliers into the weights",
            "- quantize/gptq: {scheme: w8a8, ignore: [lm_head]}",
        ),
        "3%",
    ),
    Goal.W4: Plan(
        "int4 weights in groups of 128: a quarter of the bytes, little loss",
        ("- quantize/gptq: {scheme: w4a16g128, act_order: static, ignore: [lm_head]}",),
        "5%",
    ),
    Goal.W8: Plan(
        "int8 weights: half the bytes, hardly any loss, the shortest run",
        ("- quantize/rtn: {scheme: w8a16, ignore: [lm_head]}",),
        "1%",
    ),
    Goal.W3: Plan(
        "int3 weights in groups of 64",
        ("- quantize/gptq: {scheme: w3a16g64-asym, act_order: static, ignore: [lm_head]}",),
        "30%",
    ),
    Goal.SPARSE: Plan(
        "two of four weights zero, for sparse matrix units, then trained back toward the original",
        (
            '- prune/sparsegpt: {pattern: "2:4", ignore: [lm_head]}',
            "- distill/logits: {steps: 200, lr: 5.0e-5}        # the weights that are left learn; the slowest step",
        ),
        "60%",
    ),
}
DEMO_TEXT = ("{source: demo:calibration, samples: 128, length: 512}", "{source: demo:test, length: 512}")
HUB_TEXT = (
    "{source: Salesforce/wikitext, config: wikitext-2-raw-v1, samples: 128, length: 2048}",
    "{source: Salesforce/wikitext, config: wikitext-2-raw-v1, split: test, length: 2048}",
)


def init(
    model: Annotated[str, typer.Option(help="demo, a local folder, or a hub id.")] = "demo",
    goal: Annotated[Goal, typer.Option(help="What matters most.")] = Goal.W4,
    out: Annotated[Path, typer.Option(help="File to write; it must not exist yet.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe, ready to run, to start your own from."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(write_recipe(model, goal, out.name))
    except FileExistsError as error:
        raise QtoolError(f"--out: {out} exists already; choose another name") from error
    except OSError as error:
        raise QtoolError(f"--out: {out} cannot be written: {error.strerror}; choose another place") from error
    print(f"{out} is written; carry it out with: qtool run {out}")


def write_recipe(model: str, goal: Goal, name: str) -> str:
    """The text of a recipe."""
    plan = PLANS[goal]
    calibration, test = DEMO_TEXT if model == "demo" else HUB_TEXT
    lines = [
        f"# {name}: {plan.purpose}",
        "# Every option of a step: qtool methods KIND/METHOD.   Check after an edit: qtool validate FILE",
        f"model: {json.dumps(model)}   # demo, a folder, a hub id, or {{path: ..., dtype: bfloat16, device: auto}}",
        "seed: 0",
        "pipeline:   # carried out in this order",
        '  # text of your own serves better: a .jsonl of {"text": ...} lines, .json, .parquet, .txt, a hub data set',
        f"  - calibrate/text: {calibration}",
        *(f"  {step}" for step in plan.steps),
        "  # measured on the original, on the compressed model and on every export's own bytes",
        f"  - evaluate/perplexity: {test}",
        f"  - evaluate/kl_divergence: {test}",
        f"  - export/{'safetensors' if goal == Goal.SPARSE else 'compressed_tensors'}: {{}}",
        "gates:   # a broken limit makes qtool run exit with 3",
        f"  perplexity: {{max_increase: {plan.allowed_increase}}}",
    ]
    return "\n".join(lines) + "\n"
