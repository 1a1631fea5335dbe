"""Train the demo model that ships in qtool/assets/demo: a small Llama on permissively licensed Python code.

    python scripts/train_demo_model.py --work build/demo --tokens 12e6   # 1.5 hours on two CPU cores, minutes on a GPU
    python scripts/train_demo_model.py --architecture qwen3 --work build/qwen3/work --out build/qwen3   # a second model

Stages, each kept in --work so that a second run goes on where the first stopped:
    1. text       the standard library and pinned wheels, near-duplicates dropped, split by content hash
    2. tokenizer  byte-level BPE, 4096 entries, learned on the train split
    3. training   Muon on the matrices, AdamW on the rest, constant rate then linear decay to zero
    4. assets     weights in bf16, texts, the demo_cloze task, the model card with what was measured

A model of another architecture is trained on the same text with the demo model's tokenizer; only OUT/model is written.

Why wheels, not whatever happens to be installed: a pinned list makes the text the same on every machine.
"""

import argparse
import copy
import gzip
import hashlib
import json
import math
import random
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.linalg.half_products import mixed_precision

ASSETS = Path(__file__).resolve().parent.parent / "qtool" / "assets" / "demo"
LENGTH = 512  # tokens in a training window, and the model's context

# name == version: SPDX licence as the wheel's own metadata states it
WHEELS = {
    "aiohttp==3.14.5": "Apache-2.0", "black==26.10.1": "MIT", "bokeh==3.9.2": "BSD-3-Clause",
    "botocore==1.44.5": "Apache-2.0", "celery==5.7.0": "BSD-3-Clause", "dask==2026.8.0": "BSD-3-Clause",
    "django==5.2.19": "BSD-3-Clause", "fastapi==0.165.0": "MIT", "fsspec==2026.9.0": "BSD-3-Clause",
    "httpx==0.28.1": "BSD-3-Clause", "ipython==9.18.1": "BSD-3-Clause", "jax==0.10.2": "Apache-2.0",
    "keras==3.15.1": "Apache-2.0", "moto==5.2.5": "Apache-2.0", "mypy==2.4.1": "MIT",
    "networkx==3.6.1": "BSD-3-Clause", "nltk==3.10.4": "Apache-2.0", "numpy==2.4.6": "BSD-3-Clause",
    "pandas==3.1.1": "BSD-3-Clause", "pip==26.3": "MIT", "pydantic==2.14.3": "MIT", "pygments==2.21.0": "BSD-2-Clause",
    "pytest==9.2.0": "MIT", "rich==15.0.0": "MIT", "scikit-learn==1.9.1": "BSD-3-Clause", "scipy==1.17.1": "BSD-3-Clause",
    "setuptools==84.2.1": "MIT", "sphinx==9.0.4": "BSD-2-Clause", "sqlalchemy==2.1.9": "MIT",
    "statsmodels==0.15.0": "BSD-3-Clause", "sympy==1.14.0": "BSD-3-Clause", "tornado==6.6.1": "Apache-2.0",
    "transformers==5.23.0": "Apache-2.0", "twisted==26.10.0": "MIT", "werkzeug==3.1.9": "BSD-3-Clause",
    "xarray==2026.9.0": "Apache-2.0",
}  # fmt: skip

# share of files held out per split, and the characters shipped of each
SPLITS = {"test": (0.012, 330_000), "validation": (0.012, 200_000), "calibration": (0.02, 260_000)}


def source_files(wheels: Path) -> Iterator[tuple[str, str]]:
    """Yield (origin, text) of every .py file in the standard library and the wheels."""
    wheels.mkdir(parents=True, exist_ok=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(wheels),
    ]
    subprocess.run([*pip, *WHEELS], check=True)
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(stdlib.rglob("*.py")):
        if "site-packages" not in path.parts:
            yield f"cpython/{path.relative_to(stdlib)}", path.read_bytes().decode("utf-8", "replace")
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            for name in sorted(archive.namelist()):
                if name.endswith(".py") and "/_vendor/" not in name:
                    yield f"{wheel.name.split('-')[0]}/{name}", archive.read(name).decode("utf-8", "replace")


def collect(work: Path) -> dict[str, list[dict[str, str]]]:
    """Drop near-duplicates and split by content hash; returns {split: [{"file", "project", "text"}]}."""
    seen_lines: set[int] = set()
    seen_files: set[str] = set()
    splits: dict[str, list[dict[str, str]]] = {"train": [], **{name: [] for name in SPLITS}}
    for origin, text in source_files(work / "wheels"):
        digest = hashlib.sha256(text.encode()).hexdigest()
        lines = {hash(line.strip()) for line in text.splitlines() if len(line.strip()) >= 24}
        if digest in seen_files or "\ufffd" in text or not 200 <= len(text) <= 200_000 or not lines:
            continue
        if len(lines & seen_lines) > 0.4 * len(lines):  # a copy of something already taken
            continue
        seen_files.add(digest)
        seen_lines |= lines
        place, edge, chosen = int(digest[:12], 16) / 16**12, 0.0, "train"
        for name, (share, _) in SPLITS.items():
            if edge <= place < edge + share:
                chosen = name
            edge += share
        splits[chosen].append({"file": origin, "project": origin.partition("/")[0], "text": text})
    for name, (_, characters) in SPLITS.items():
        fitting = [row for row in splits[name] if 1_000 <= len(row["text"]) <= 16_000]
        fitting.sort(key=lambda row: hashlib.sha256(row["text"].encode()).hexdigest()[::-1])
        total, kept = 0, []
        for row in fitting:
            if total < characters:
                kept.append(row)
                total += len(row["text"])
        splits[name] = kept
    return splits


def train_tokenizer(texts: list[str], path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE, 4096 entries; every text begins with <|bos|>."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|eos|>", model_max_length=LENGTH
    )
    tokenizer.save_pretrained(path)
    compact = path / "tokenizer.json"
    compact.write_text(json.dumps(json.loads(compact.read_text()), ensure_ascii=False, separators=(",", ":")))
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One stream of token ids, [tokens] uint16: <|bos|> text <|eos|> <|bos|> text <|eos|> ..."""
    rows = tokenizer.backend_tokenizer.encode_batch(texts)
    return np.concatenate([np.array([*row.ids, tokenizer.eos_token_id], dtype=np.uint16) for row in rows])


def build_config(architecture: str, vocabulary: int) -> PretrainedConfig:
    """Of 5 to 8 million parameters. qwen3: norms of queries and keys; gpt_neox: LayerNorms, biases, one fused q, k, v."""
    shared = {
        "vocab_size": vocabulary, "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**shared, intermediate_size=1024)
    config_class = {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture]
    return config_class(**shared, intermediate_size=768, num_key_value_heads=2, head_dim=64)


def mean_loss(model: PreTrainedModel, stream: torch.Tensor, windows: int) -> float:
    """Mean next-token loss in nats over the first `windows` windows of the stream."""
    batch = stream[: windows * LENGTH].view(windows, LENGTH)
    with torch.no_grad(), mixed_precision(stream.device):
        losses = []
        for rows in batch.split(8):
            logits = model(rows).logits.float()
            losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    return float(sum(losses)) / (windows * (LENGTH - 1))


def train(
    stream: np.ndarray, held_out: np.ndarray, config: PretrainedConfig, tokens: float, batch: int, work: Path
) -> tuple[PreTrainedModel, dict[str, float]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=0.006, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]
    peak_rates = [0.02, 0.006]
    windows = len(stream) // LENGTH
    data = torch.from_numpy(stream[: windows * LENGTH].astype(np.int64)).view(windows, LENGTH)
    valid = torch.from_numpy(held_out.astype(np.int64)).to(device)
    steps = int(tokens // (batch * LENGTH))
    order = torch.cat([torch.randperm(windows) for _ in range(math.ceil(steps * batch / windows))])
    first, checkpoint = 0, work / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, order = saved["step"], saved["order"].cpu()
    compiled = torch.compile(model)
    started = time.time()
    for step in range(first, steps):
        done = step / steps
        rate = min(1.0, (step + 1) / 50, (1.0 - done) / 0.5)  # warm-up, constant, linear decay over the second half
        for optimizer, peak in zip(optimizers, peak_rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
        rows = data[order[step * batch : (step + 1) * batch]].to(device)
        with mixed_precision(device):
            logits = compiled(rows).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 20 == 0:
            speed = (step + 1 - first) * batch * LENGTH / (time.time() - started)
            left = (steps - step) * batch * LENGTH / speed / 60
            print(f"step {step}/{steps} loss {loss.item():.4f} {speed:.0f} tokens/s {left:.0f} min left", flush=True)
        if step % 300 == 299 or step == steps - 1:
            print(f"step {step} validation loss {mean_loss(model, valid, 64):.4f}", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            state = {"step": step + 1, "order": order, "model": model.state_dict(), "optimizers": states}
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)
    model = model.to(torch.bfloat16).eval()
    loss = mean_loss(model, valid, len(valid) // LENGTH)
    facts = {
        "tokens": float(steps * batch * LENGTH),
        "steps": float(steps),
        "unique_tokens": float(len(stream)),
        "rounding_kl": rounding_kl(model, valid, "w3a16g128"),
        "validation_loss": loss,
        "validation_perplexity": math.exp(loss),
        "validation_tokens": float(len(valid)),
    }
    return model, facts


def rounding_kl(model: PreTrainedModel, stream: torch.Tensor, scheme: str) -> float:
    """Mean KL in nats per token that plain rounding of the blocks' linears costs: how much the model has to lose."""
    weights = Scheme.model_validate(scheme).weights
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, torch.nn.Linear) and module is not rounded.get_output_embeddings():
                module.weight.copy_(quantize(module.weight.float(), weights).dequantize())
        total, windows = 0.0, stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
        for rows in windows.split(8):
            p, q = (one(rows).logits[:, :-1].float().log_softmax(-1) for one in (model, rounded))
            total += float((p.exp() * (p - q)).sum())
    return total / (len(windows) * (LENGTH - 1))


def cloze_items(rows: list[dict[str, str]], count: int, seed: int) -> list[dict[str, object]]:
    """Which of four lines really follows? The three others stand elsewhere in the same file, equally indented."""
    rng = random.Random(seed)
    items: list[dict[str, object]] = []
    candidates = [(row, at) for row in rows for at in range(8, row["text"].count("\n"))]
    rng.shuffle(candidates)
    per_file: dict[str, int] = {}
    for row, at in candidates:
        if len(items) == count:
            break
        lines = row["text"].split("\n")
        answer = lines[at]
        indent = len(answer) - len(answer.lstrip())
        alike = {
            line for line in lines
            if 12 <= len(line.strip()) <= 90 and len(line) - len(line.lstrip()) == indent and line != answer
        }  # fmt: skip
        usable = 12 <= len(answer.strip()) <= 90 and lines.count(answer) == 1 and len(alike) >= 3
        if not usable or per_file.get(row["file"], 0) >= 10:
            continue
        per_file[row["file"]] = per_file.get(row["file"], 0) + 1
        choices = [*rng.sample(sorted(alike), 3), answer]
        rng.shuffle(choices)
        # Line numbers, not lines: the task reads the lines from the test split, and the package stays small.
        numbers = [lines.index(choice) for choice in choices]
        items.append({"file": row["file"], "line": at, "choices": numbers, "label": choices.index(answer)})
    return items


def write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def write_card(path: Path, facts: dict[str, float], parameters: int, counts: dict[str, int]) -> None:
    sources = "\n".join(f"| {pin.split('==')[0]} | {pin.split('==')[1]} | {licence} |" for pin, licence in WHEELS.items())
    python = ".".join(map(str, sys.version_info[:3]))
    path.write_text(f"""# qtool demo model

A Llama of {parameters:,} parameters (hidden 256, 6 layers, 4 heads of 64, 2 key/value heads, ffn 768, vocabulary 4096,
untied, bf16) trained from nothing on Python source code. It exists so that every part of qtool runs offline on a model
that has really learned something; it is no assistant. Made by `scripts/train_demo_model.py`. Licence: Apache-2.0.

| figure | value |
|---|---|
| training tokens | {facts["tokens"]:,.0f} in {facts["steps"]:,.0f} steps, from {facts["unique_tokens"]:,.0f} different ones |
| validation loss | {facts["validation_loss"]:.4f} nats per token over {facts["validation_tokens"]:,.0f} tokens |
| validation perplexity | {facts["validation_perplexity"]:.3f} |
| KL of plain rounding to w3a16g128 | {facts["rounding_kl"]:.3f} nats per token on validation |

Optimizer: Muon (rate 0.02) on the matrices of the blocks, AdamW (0.006) on embeddings, norms and head; 50 steps of
warm-up, constant to the half, then linear to zero; windows of {LENGTH} tokens; bf16 autocast over float32 weights.

## Text
Files of more than 40 % already seen lines were dropped, the rest split by the SHA-256 of their content, so no file is in
two splits. Shipped as `text/*.jsonl.gz`, one `{{"file", "project", "text"}}` a line, each real and whole:
{", ".join(f"{name} {count} files" for name, count in counts.items())}.
`tasks/demo_cloze` asks which of four lines really follows a piece of a test file (chance 25 %).

The texts stay under the licences of their projects:

| source | version | licence |
|---|---|---|
| cpython standard library | {python} | PSF-2.0 |
{sources}
""")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/demo"))
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--tokens", type=float, default=12e6)
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--architecture", default="llama", choices=["llama", "qwen3", "gpt_neox"])
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out
    is_demo = arguments.architecture == "llama"
    if not is_demo and out == ASSETS:
        parser.error(f"--architecture {arguments.architecture} needs --out, or it would replace the demo model")
    work.mkdir(parents=True, exist_ok=True)

    if not (work / "splits.json").exists():
        (work / "splits.json").write_text(json.dumps(collect(work)))
    splits = json.loads((work / "splits.json").read_text())
    if not is_demo:
        shutil.copytree(ASSETS / "model", work / "model", ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    elif not (work / "model" / "tokenizer.json").exists():
        train_tokenizer([row["text"] for row in splits["train"][::4]], work / "model")  # a quarter is enough for 4096
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "model")
    if not (work / "train.npy").exists():
        order = random.Random(0).sample(splits["train"], len(splits["train"]))
        np.save(work / "train.npy", encode(tokenizer, [row["text"] for row in order]))
    stream = np.load(work / "train.npy")
    held_out = encode(tokenizer, [row["text"] for row in splits["validation"]])
    print(f"{len(stream):,} training tokens, {len(held_out):,} validation tokens", flush=True)

    config = build_config(arguments.architecture, len(tokenizer))
    model, facts = train(stream, held_out, config, arguments.tokens, arguments.batch, work)
    print(json.dumps(facts))
    model.save_pretrained(out / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / "model" / name).write_bytes((work / "model" / name).read_bytes())
    if not is_demo:
        return
    for name in SPLITS:
        write_lines(out / "text" / f"{name}.jsonl.gz", splits[name])
    write_lines(out / "tasks" / "demo_cloze.jsonl.gz", cloze_items(splits["test"], 400, seed=0))
    parameters = sum(p.numel() for p in model.parameters())
    write_card(out / "README.md", facts, parameters, {name: len(splits[name]) for name in SPLITS})


if __name__ == "__main__":
    main()
