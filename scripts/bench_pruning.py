"""Compare qtool's pruning of weights with other tools' on the same model, calibration tokens and test text.

    scripts/peers/setup_venvs.sh                # once: each peer in an environment of its own, beside the repository
    python scripts/bench_pruning.py             # prints the tables; --json FILE keeps the rows
    python scripts/bench_pruning.py --schemes 2:4 --methods sparsegpt --tools qtool llmcompressor

Half of the weights of every linear but the head become zero, anywhere (50%) or two of every four neighbours (2:4). Jobs, the
evaluator and the tables are bench_quality.py's: one process for each tool, weights in float32, mean KL from the original and
perplexity of every window. modelopt's SparseGPT takes patterns alone, and keeps the mask it finds, not the weights it updates.
Choices (options, recipes) are made with --text demo:validation; the test split is only measured.
"""

import sys
from pathlib import Path
from typing import Any

from bench_quality import compare, make_checkpoint, run_qtool
from bench_rows import REPO, Row, ratios, read_subject, run_study, study_parser, table

STUDY = {
    "50%": {"magnitude": "qtool", "wanda": "qtool llmcompressor", "sparsegpt": "qtool llmcompressor"},
    "2:4": {"magnitude": "qtool", "wanda": "qtool llmcompressor", "sparsegpt": "qtool llmcompressor modelopt"},
}


def main() -> None:
    arguments = study_parser(__doc__, STUDY, REPO / "build" / "bench_pruning").parse_args()
    if arguments.append and arguments.json is None:
        sys.exit("bench_pruning: --append needs --json FILE")
    if arguments.job is not None:
        return run_qtool(arguments.job)
    subject = read_subject(arguments)
    folder = subject.original.folder

    def job_of(scheme: str, method: str, tool: str) -> tuple[dict[str, Any], object]:
        pattern = None if scheme == "50%" else scheme
        if tool == "qtool":
            options = {} if pattern is None else {"pattern": pattern}  # half is the default
            return {"model": str(folder), "text": subject.text, "steps": [{f"prune/{method}": options}]}, None
        job = {
            "model": str(folder), "tokens": str(subject.tokens), "method": method, "format": "sparse", "bits": 16,
            "group": None, "symmetric": True, "options": {"sparsity": 0.5, "pattern": pattern},
        }  # fmt: skip
        return job, None

    def measure(row: Row, out: Path) -> None:
        row.losses, row.divergences = compare(make_checkpoint(folder, out), subject.original, subject.test)

    losses, divergences = compare(folder, subject.original, subject.test)
    original = Row("dense", "", "original", "", losses=losses, divergences=divergences)
    rows = run_study(arguments, STUDY, __file__, subject, original, job_of, measure)
    print(f"{table(rows)}\n\n{ratios(rows)}")


if __name__ == "__main__":
    main()
