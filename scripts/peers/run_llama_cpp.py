"""Check a GGUF export with llama.cpp, against what qtool finds in the same folder.

    python run_llama_cpp.py prepare EXPORT JOB.json                                   with the python that has qtool
    OMP_NUM_THREADS=1 DIR/peer-llama-cpp/bin/python run_llama_cpp.py check JOB.json   with the peer's, which has no torch

`prepare` writes what is to be expected: the tokens of documents and of texts that are hard to cut, the mean loss over the
windows of a text, and greedy tokens with the margin by which each won. `check` loads the file and finds the same by
llama-cpp-python. It prints one JSON object and ends with status 1 where a text is cut otherwise, or the perplexity is more
than MAX_CHANGE away. Greedy tokens may differ where the margin is within rounding: llama.cpp rounds activations to 8 bits,
and its cache to float16, which qtool does not; the first difference and its margin are printed.
"""

import argparse
import json
import math
import sys
from pathlib import Path

MAX_CHANGE = 0.01  # of the perplexity
N_DOCUMENTS, N_PROMPT, N_GREEDY = 200, 64, 64
HARD = (
    "it's we'll I'D they've",
    "1 12 123 1234 12345,678.90",
    "  two  spaces\n\n\tand\ttabs \n  ",
    "naïve café — “quotes” … €5",
    "日本語のテキスト 中文 한국어 עברית",
    "🙂👩‍👩‍👧‍👦 e\u0301 \u00a0x\u200by",
    "def f(x):\n    return x**2  # x²\n",
    "a" * 100 + "!" * 50,
    "",
)


def prepare(export: Path, job: Path, source: str, length: int, n_windows: int | None) -> None:
    """Write the job: the model's file, and what qtool makes of it."""
    import torch

    from qtool.calibration.tokens import read_documents, read_tokens
    from qtool.methods.evaluate.perplexity import PerplexityOptions, window_losses
    from qtool.model.handle import ModelHandle
    from qtool.options import ModelOptions

    model = ModelHandle(ModelOptions(path=str(export), device="cpu"))
    options = PerplexityOptions(source=source, length=length)
    texts = [*HARD, *map(str, read_documents(options)[:N_DOCUMENTS])]
    tokens = read_tokens(options, model.tokenizer, 0)[:n_windows]  # [samples, length]
    losses = window_losses(model, tokens)  # [samples]
    found, margins = tokens[:1, :N_PROMPT], []  # [1, tokens]
    with model.materialized() as module, torch.no_grad():
        for _ in range(N_GREEDY):
            best = module(found).logits[0, -1].float().topk(2)
            margins.append(float(best.values[0] - best.values[1]))
            found = torch.cat([found, best.indices[:1].view(1, 1)], 1)
    facts = {
        "model": str((export / "model.gguf").resolve()),
        "texts": texts,
        "ids": [model.tokenizer(text).input_ids for text in texts],
        "windows": tokens.tolist(),
        "nats": float(losses.mean()),
        "greedy": found[0].tolist(),
        "margins": margins,
    }
    job.write_text(json.dumps(facts))
    print(f"{job}: {len(texts)} texts, {len(tokens)} windows, perplexity {math.exp(facts['nats']):.4f}")


def check(job: Path) -> int:
    """Compare llama.cpp with the job; returns the exit status."""
    import llama_cpp
    import numpy as np

    facts = json.loads(job.read_text())
    length = max(len(window) for window in facts["windows"])
    model = llama_cpp.Llama(facts["model"], n_ctx=length, n_batch=length, n_threads=1, logits_all=True, verbose=False)
    cut = [model.tokenize(text.encode("utf-8"), add_bos=True, special=False) for text in facts["texts"]]
    other = [text for text, ours, theirs in zip(facts["texts"], facts["ids"], cut, strict=True) if ours != theirs]

    losses = []
    for window in facts["windows"]:
        model.reset()
        model.eval(window)
        logits = np.array(model.scores[: len(window) - 1], dtype=np.float64)  # [length - 1, vocab]
        top = logits.max(1)
        log_sum = top + np.log(np.exp(logits - top[:, None]).sum(1))
        losses.append(float((log_sum - logits[np.arange(len(logits)), window[1:]]).mean()))

    model.reset()
    greedy = facts["greedy"][:N_PROMPT]
    model.eval(greedy)
    for _ in range(N_GREEDY):
        greedy.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(greedy[-1:])
    first = next((i for i, pair in enumerate(zip(facts["greedy"], greedy, strict=True)) if pair[0] != pair[1]), None)

    ours, theirs = math.exp(facts["nats"]), math.exp(sum(losses) / len(losses))
    result = {
        "tool": "llama-cpp-python",
        "version": llama_cpp.__version__,
        "texts": len(cut),
        "texts_cut_otherwise": len(other),
        "first_cut_otherwise": other[0] if other else None,
        "perplexity_qtool": ours,
        "perplexity_llama_cpp": theirs,
        "change": theirs / ours - 1,
        "greedy_equal": N_GREEDY if first is None else first - N_PROMPT,
        "margin_at_difference": None if first is None else facts["margins"][first - N_PROMPT],
    }
    print(json.dumps(result, indent=2, ensure_ascii=False))
    return int(bool(other) or abs(theirs / ours - 1) > MAX_CHANGE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("prepare")
    verb.add_argument("export", type=Path)
    verb.add_argument("job", type=Path)
    verb.add_argument("--source", default="demo:test", help="text that the perplexity is measured on")
    verb.add_argument("--length", type=int, default=512, help="tokens in a window")
    verb.add_argument("--windows", type=int, help="how many of its windows; all where it is left out")
    verb = verbs.add_parser("check")
    verb.add_argument("job", type=Path)
    chosen = parser.parse_args()
    if chosen.verb == "check":
        sys.exit(check(chosen.job))
    prepare(chosen.export, chosen.job, chosen.source, chosen.length, chosen.windows)
