"""What the choice of calibration text does to perplexity, on text like it and on other text.

    python scripts/bench_calibration.py [--samples 32] [--length 256] [--json FILE] [--work DIR]
Two domains that any machine has: Python code, of the demo model's own splits, and prose, the licences and descriptions of the
packages installed beside qtool. Each choice of text calibrates GPTQ at three bits on the demo model; perplexity is measured
on held-out code (demo:validation) and prose (packages that calibration does not see), with errors that pair windows.
Prints a table in Markdown. The demo model knows code and hardly any prose: its perplexity of prose is high, what matters is
how much each choice adds.
"""

import argparse
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qtool.calibration.tokens import TextOptions, read_documents
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32, help="windows of calibration text")
    parser.add_argument("--length", type=int, default=256, help="tokens in a window, of both texts")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--work", type=Path, help="folder for runs, kept; a temporary one where not given")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = list(measure(options.work or Path(temporary), options.samples, options.length))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure(work: Path, samples: int, length: int) -> Iterator[Row]:
    """One run for each choice."""
    work.mkdir(parents=True, exist_ok=True)
    texts = write_domains(work)
    for name, calibration in choices(texts, samples, length).items():
        measured = {"length": length, "samples": 64}
        pipeline = [
            calibration,
            {"quantize/gptq": {"scheme": "w3a16g128"}},
            {"evaluate/perplexity": {"source": "demo:validation", **measured}},
            {"evaluate/perplexity": {"source": str(texts["prose_held_out"]), **measured}},
        ]
        recipe = parse(json.dumps({"model": "demo", "pipeline": pipeline}), "bench_calibration")
        results = run_recipe(recipe, work / "runs" / re.sub(r"\W+", "-", name), Silent())
        yield {"choice": name, "packages": texts["n_packages"], **figures(results)}


def choices(texts: dict[str, Any], samples: int, length: int) -> dict[str, Row]:
    """Name: calibrate step."""
    windows = {"samples": samples, "length": length}
    code, prose, both = "demo:calibration", str(texts["prose"]), str(texts["both"])
    return {
        "code": {"calibrate/text": {"source": code, **windows}},
        "prose": {"calibrate/text": {"source": prose, **windows}},
        "half and half": {"calibrate/mixture": {"sources": [{"source": code}, {"source": prose}], **windows}},
        "DSIR, from both, for code": {"calibrate/dsir": {"source": both, "target": {"source": code}, **windows}},
        "DSIR, from both, for prose": {"calibrate/dsir": {"source": both, "target": {"source": prose}, **windows}},
        "coverage, of both": {"calibrate/coverage": {"source": both, "candidates": 512, **windows}},
        "written by the model": {"calibrate/self_generated": windows},
    }


def write_domains(work: Path) -> dict[str, Any]:
    """The prose of every second package, that of the others, and the first joined with the calibration's code."""
    found = sorted(prose_of_packages().items())
    halves = [[text for _, text in found[start::2]] for start in (0, 1)]
    code = [str(text) for text in read_documents(TextOptions(source="demo:calibration"))]
    files = {"prose": halves[0], "prose_held_out": halves[1], "both": [*code, *halves[0]]}
    for name, documents in files.items():
        lines = (json.dumps({"text": text}) + "\n" for text in documents)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {**{name: work / f"{name}.jsonl" for name in files}, "n_packages": len(found)}


def prose_of_packages() -> dict[str, str]:
    """Package: the longest of its description and its licences, cut at 20,000 characters; each text once."""
    found: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = str(package.metadata["Name"]).lower()
        texts = [str(package.metadata.get_payload() or "")]
        for file in package.files or ():
            if re.search(r"(?i)\b(licen[cs]e|copying|notice)", file.name) and file.suffix not in (".py", ".pyc"):
                path = Path(str(file.locate()))
                texts.append(path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
        longest = max(texts, key=len)[:20_000]
        if len(longest) > 500 and longest not in found.values():
            found[name] = longest
    return found


def figures(results: Row) -> Row:
    """Perplexities of both domains, before and after, and the relative change with its error."""
    found: Row = {}
    for row in results["metrics"]:
        domain = "code" if row["dataset"].startswith("demo:") else "prose"
        if row["name"] == "perplexity":
            found[f"{domain} {row['subject']}"] = round(row["value"], 4)
        if row["name"] == "perplexity_change":
            found |= {f"{domain} change": round(row["value"], 6), f"{domain} error": round(row["stderr"], 6)}
    return found


def table(rows: list[Row]) -> str:
    """In Markdown."""
    first = rows[0]
    lines = [
        "| calibration text | code: perplexity | change | prose: perplexity | change |",
        "|---|---|---|---|---|",
        f"| (not quantized) | {first['code original']:.3f} | | {first['prose original']:.2f} | |",
    ]
    for row in rows:
        changes = [f"{row[f'{domain} change']:+.1%} ± {row[f'{domain} error']:.1%}" for domain in ("code", "prose")]
        code, prose = row["code compressed"], row["prose compressed"]
        lines.append(f"| {row['choice']} | {code:.3f} | {changes[0]} | {prose:.2f} | {changes[1]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
