"""Documents of the task demo_cloze: line numbers from demo_cloze.jsonl.gz, the lines themselves from the test split.

    {"file": str, "line": int, "choices": [int, int, int, int], "label": int}      line numbers count from 0
The context is the up to 14 lines before `line`; the choices are four lines of the same file, one of them `line` itself.
"""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets

CONTEXT_LINES = 14
HERE = Path(__file__).resolve().parent


def load(**metadata: object) -> dict[str, datasets.Dataset]:
    """{"test": rows of context, choices, label}; lm-eval passes the task's metadata, which is of no use here."""
    texts = {row["file"]: row["text"].split("\n") for row in read_lines(HERE.parent / "text" / "test.jsonl.gz")}
    rows = []
    for item in read_lines(HERE / "demo_cloze.jsonl.gz"):
        lines, at = texts[item["file"]], item["line"]
        context = "".join(f"{line}\n" for line in lines[max(0, at - CONTEXT_LINES) : at])
        choices = [lines[number] for number in item["choices"]]
        rows.append({"context": context, "choices": choices, "label": item["label"]})
    return {"test": datasets.Dataset.from_list(rows)}


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()]
