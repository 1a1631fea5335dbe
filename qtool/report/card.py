"""The card of an export: README.md as model hubs show it, with what was measured, the recipe, and the files' licence.

Written once all is measured, the export's own bytes too; the front matter is that of hubs: base_model, license, tags.
Source: https://huggingface.co/docs/hub/model-cards, metadata of model cards.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from qtool.artifact import digest_file, read_manifest, write_manifest
from qtool.model.store import write_text
from qtool.recipe import Recipe
from qtool.report.results import parameters_in_words

CARD = "README.md"


def write_card(folder: Path, recipe: Recipe, original: Path, results: dict[str, Any], export: dict[str, Any]) -> None:
    """Write the card into an export's folder, and its digest into the manifest.

    original: the folder of the model that was compressed; results: those of results.json; export: this one's entry there. A
    file of this name that is not as it was written is someone else's, and stays.
    """
    manifest, card, text = read_manifest(folder), folder / CARD, card_of(recipe, original, results, export)
    if card.is_file() and digest_file(card) != manifest.get(CARD) and card.read_bytes() != text.encode():
        return
    write_text(card, text)
    write_manifest(folder, {**manifest, CARD: digest_file(card)})


def card_of(recipe: Recipe, original: Path, results: dict[str, Any], export: dict[str, Any]) -> str:
    """The card's text."""
    front = {"library_name": "transformers", "tags": ["qtool", "quantized", export["format"]]}
    front |= licence_of(original)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", recipe.model.path) and not Path(recipe.model.path).exists():
        front |= {"base_model": recipe.model.path, "base_model_relation": "quantized"}
        front |= {"base_model_revision": results["model"]["revision"]}
    model = results["model"]
    name = Path(recipe.model.path).name
    kept = "decodes to exactly the weights that were measured as compressed" if export["lossless"] else (
        "holds the compressed weights rounded once more to what its format has; the column of the export is what counts"
    )  # fmt: skip
    if export.get("submodel") is not None:
        kept = f"holds the sub-model {export['submodel']} of the recipe's model, which the run did not measure"
    lines = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n",
        f"# {name}, compressed ({export['format']})\n",
        f"{parameters_in_words(model)}, {model['bits_per_weight']:.2f} bits per quantized weight; "
        f"{model['bytes_original'] / 2**20:,.1f} MiB of weights before, {export['bytes'] / 2**20:,.1f} MiB in this folder. "
        + ("" if model.get("cache") is None else f"Keys and values are cached as {model['cache']}. ")
        + ("" if model.get("attention") is None else f"Attention rounds: {model['attention']}. ")
        + f"This export {kept}.\n",
        *measured(results["metrics"], export["format"]),
        "## Recipe\n",
        f"```yaml\n{recipe.to_yaml()}```\n",
        "Made by qtool from this recipe (`qtool run`) with "
        + ", ".join(f"{package} {version}" for package, version in results["versions"].items())
        + ". `qtool verify` in this folder tells whether its files are as they were written.",
    ]
    return "\n".join(lines) + "\n"


def measured(metrics: list[dict[str, Any]], format: str) -> list[str]:
    """A Markdown table of the metrics of the original, the compressed model and this export, with standard errors."""
    subjects = {"original": "original", "compressed": "compressed", f"export:{format}": "this export"}
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for metric in metrics:
        if metric["subject"] in subjects:
            error = "" if metric["stderr"] is None else f" ± {metric['stderr']:.2g}"
            cells = rows.setdefault((metric["name"], metric["dataset"], metric["unit"]), {})
            cells[metric["subject"]] = f"{metric['value']:.4g}{error}"
    if not rows:
        return []
    found = [subject for subject in subjects if any(subject in cells for cells in rows.values())]
    lines = [
        "## Measured\n",
        f"| metric | {' | '.join(subjects[subject] for subject in found)} |",
        "|---" * (len(found) + 1) + "|",
    ]
    for (name, dataset, unit), cells in rows.items():
        values = " | ".join(cells.get(subject, "") for subject in found)
        lines.append(f"| {name} ({unit}, {dataset}) | {values} |")
    return [*lines, ""]


def licence_of(folder: Path) -> dict[str, str]:
    """The licence fields of the original's own card; empty where it has none."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        front = None  # a card that cannot be read states no licence
    names = ("license", "license_name", "license_link")
    return {name: str(front[name]) for name in names if name in front} if isinstance(front, dict) else {}
