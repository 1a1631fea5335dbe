"""How long qtool's perplexity takes beside lm-eval's own rolling log-likelihood, and what a kept original saves.

    python scripts/bench_evaluation.py [--model demo] [--source demo:test] [--windows 40] [--length 512] [--threads 1]
Both measure the same model on the same documents, in batches of eight windows, in turn, three times each; the least seconds
count, of this process's CPU time, which other work on the machine does not add to, and of the clock. lm-eval predicts every
token of every document, after the text's beginning alone where a window begins; qtool all but the first of each window of
the packed stream. So what counts is tokens a second. The model is in memory for lm-eval; qtool reads it from disk, block by
block, each time.
Then KL divergence of the model rounded to four bits: with the original's pass, and with the original kept from before.
"""

import argparse
import functools
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from qtool.calibration.tokens import TextOptions, read_documents
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.methods.evaluate.kl_divergence import KlOptions, kl_divergence
from qtool.methods.evaluate.lm_eval import silenced
from qtool.methods.evaluate.perplexity import perplexity
from qtool.model.handle import ModelHandle
from qtool.model.kept import Kept
from qtool.options import ModelOptions
from qtool.pipeline.run import finished_run, run_recipe
from qtool.progress import Silent
from qtool.recipe import parse

REPEATS = 3
Seconds = tuple[float, float]  # of the CPU, of the clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--source", default="demo:test")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    text = WindowOptions(source=options.source, samples=options.windows, length=options.length)
    print("| | tokens | perplexity | CPU seconds | seconds | tokens a CPU second |\n|---|---|---|---|---|---|")
    rows = compare_perplexity(options.model, text)
    for name, (n_tokens, value, (cpu, clock)) in rows.items():
        print(f"| {name} | {n_tokens} | {value:.4f} | {cpu:.2f} | {clock:.2f} | {n_tokens / cpu:.0f} |")
    ours, theirs = (n_tokens / seconds[0] for n_tokens, _, seconds in rows.values())
    print(f"\nqtool takes {theirs / ours:.2f} times lm-eval's CPU time a token\n")
    first, tenth = compare_kl(options.model, text)
    print(f"KL divergence: {first[0]:.2f} CPU seconds with the original's pass, {tenth[0]:.2f} with the original kept")


def compare_perplexity(path: str, text: WindowOptions) -> dict[str, tuple[int, float, Seconds]]:
    """Name: tokens predicted, perplexity, seconds."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, loaded = (ModelHandle(ModelOptions(path=path, device="cpu")) for _ in range(2))
    documents = documents_of(text, model)
    counted = sum(read_windows(text, model.tokenizer, 0).counted)
    encoded = model.tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    n_tokens = sum(map(len, encoded))
    with silenced():
        lm = HFLM(pretrained=loaded.take(), tokenizer=loaded.tokenizer, batch_size=8, max_length=text.length)
        requests = [
            Instance(request_type="loglikelihood_rolling", doc={}, arguments=(document,), idx=index)
            for index, document in enumerate(documents)
        ]
        ours: list[tuple[float, Seconds]] = []
        theirs: list[tuple[float, Seconds]] = []
        for _ in range(REPEATS):
            one = fresh(path)
            ours.append(timed(functools.partial(perplexity_of, one, text)))
            theirs.append(timed(lambda: math.exp(-sum(lm.loglikelihood_rolling(requests, disable_tqdm=True)) / n_tokens)))
    found = {}
    both = (("qtool, evaluate/perplexity", counted, ours), ("lm-eval, loglikelihood_rolling", n_tokens, theirs))
    for name, count, runs in both:
        found[name] = (count, runs[0][0], (min(cpu for _, (cpu, _) in runs), min(clock for _, (_, clock) in runs)))
    return found


def perplexity_of(model: ModelHandle, text: WindowOptions) -> float:
    return perplexity(model, model, text, 0)[0].value


def documents_of(text: WindowOptions, model: ModelHandle) -> list[str]:
    """The documents that the windows are cut from, the last of them cut to where the windows end."""
    left, found = (text.samples or 0) * text.length, []
    for document in read_documents(TextOptions(source=text.source)):
        ids = model.tokenizer(str(document), verbose=False)["input_ids"]
        found.append(str(document) if len(ids) <= left else str(model.tokenizer.decode(ids[:left], skip_special_tokens=True)))
        left -= len(ids)
        if left <= 0:
            break
    return found


def fresh(path: str) -> ModelHandle:
    """A handle that holds nothing from before."""
    return ModelHandle(ModelOptions(path=path, device="cpu"))


def compare_kl(path: str, text: WindowOptions) -> tuple[Seconds, Seconds]:
    """Seconds for a first recipe and for a later one."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = parse(f"model: {{path: {path}, device: cpu}}\npipeline: [quantize/rtn: {{scheme: w4a16g128}}]", "bench")
        run_recipe(recipe, Path(folder) / "run", Silent())
        _, changes = finished_run(Path(folder) / "run")
        options = KlOptions.model_validate(text.model_dump())
        seconds = []
        for _ in range(2):
            original = fresh(path)
            original.kept = Kept(Path(folder) / "kept", 2**40)
            rounded = ModelHandle(original.options, changes)
            seconds.append(timed(lambda ours=rounded, theirs=original: kl_divergence(ours, theirs, options, 0)[0].value)[1])
    return seconds[0], seconds[1]


def timed(work: Callable[[], float]) -> tuple[float, Seconds]:
    """What came out, and the seconds it took."""
    cpu, clock = time.process_time(), time.perf_counter()
    value = work()
    return value, (time.process_time() - cpu, time.perf_counter() - clock)


if __name__ == "__main__":
    main()
