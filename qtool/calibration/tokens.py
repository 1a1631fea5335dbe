"""From text to token windows: `demo:SPLIT`, a local file, or a hub data set; packed or one document a window.

    tokens [samples, length] int64
Protocol of `pack`: documents in a seeded order, each begun by the tokenizer's own special tokens (BOS where it has one and
`bos` is auto), joined into one stream and cut into windows. Without packing: each document that is long enough gives one
window from its beginning. Nothing is padded, so every token counts in every statistic.
"""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from qtool.errors import QtoolError
from qtool.options import Options

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class TextOptions(Options):
    """Which text, and how it becomes windows of tokens."""

    source: str = Field(
        description="demo:calibration, demo:validation, demo:test, a local .jsonl/.json/.parquet/.txt, or a hub data set id"
    )
    config: str | None = Field(None, description="configuration name of a hub data set, such as wikitext-2-raw-v1")
    split: str = Field("train", description="split of a hub data set")
    field: str = Field("text", description="the key or column that holds the text, or chat messages")
    samples: int | None = Field(None, ge=1, description="windows to take; null: all the text gives")
    length: int = Field(512, ge=2, description="tokens in a window")
    pack: bool = Field(True, description="join documents into one stream; false: one document, one window")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="begin each document with BOS; auto: as the tokenizer does"
    )
    chat_template: bool = Field(False, description="render the field's messages through the tokenizer's chat template")
    shuffle: bool = Field(True, description="take documents in a seeded random order")
    revision: str | None = Field(None, description="revision of a hub data set")


def read_documents(options: TextOptions) -> list[object]:
    """The field of every row, in file order; raises QtoolError where the source cannot be read."""
    source = options.source
    if source.startswith("demo:"):
        path = ASSETS / "demo" / "text" / f"{source.removeprefix('demo:')}.jsonl.gz"
        if not path.is_file():
            raise QtoolError(f"source: there is no {source}; valid: demo:calibration, demo:validation, demo:test")
        return _field_of(_read_json_lines(path), options)
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if not path.exists() and (name.endswith((".jsonl", ".json", ".parquet", ".txt")) or source.startswith((".", "/"))):
        raise QtoolError(f"source: the file {source} does not exist")
    if path.is_file():
        if name.endswith(".jsonl"):
            return _field_of(_read_json_lines(path), options)
        if name.endswith(".json"):
            return _field_of(_parse(path, _read_text(path)), options)
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return _field_of(pyarrow.parquet.read_table(path).to_pylist(), options)
        if name.endswith(".txt"):
            return [_read_text(path)]
        raise QtoolError(f"source: {source} is no .jsonl, .json, .parquet or .txt file")
    return _field_of(_read_hub(options), options)


def read_tokens(options: TextOptions, tokenizer: object, seed: int) -> Tensor:
    """Windows [samples, length] int64; raises QtoolError where the text is too short."""
    documents = read_documents(options)
    if options.shuffle:
        random.Random(seed).shuffle(documents)
    windows: list[list[int]] = []
    stream: list[int] = []
    wanted = options.samples or len(documents) * 10**6
    total = 0
    for document in documents:
        ids = _encode(document, options, tokenizer)
        total += len(ids)
        if options.pack:
            stream += ids
            while len(stream) >= options.length and len(windows) < wanted:
                windows.append(stream[: options.length])
                stream = stream[options.length :]
        elif len(ids) >= options.length:
            windows.append(ids[: options.length])
        if len(windows) >= wanted:
            break
    if not windows or (options.samples is not None and len(windows) < options.samples):
        need = f"{options.samples or 1} windows of {options.length} tokens"
        raise QtoolError(
            f"source: {options.source} gives {len(windows)} windows ({total:,} tokens in {len(documents):,} documents), "
            f"{need} are asked for; lower samples or length, or give more text"
        )
    return torch.tensor(windows, dtype=torch.int64)


def check_length(where: str, options: TextOptions, config: object) -> None:
    """Raise QtoolError for windows longer than what a text model's config says it takes; configs may leave it open.

    Why rotary models too, which compute at any position: beyond those that they were trained on, statistics and metrics
    say little about the model as it is used. A config that stretches its rotary positions states the stretched number.
    """
    limit = getattr(config, "max_position_embeddings", None)  # transformers' name; attribute_map has the config's own
    if limit is not None and options.length > limit:
        name = getattr(config, "attribute_map", {}).get("max_position_embeddings", "max_position_embeddings")
        raise QtoolError(
            f"{where}: length {options.length} is more than the model's {limit} positions (config.{name}); "
            f"use length: {limit} or less"
        )


def digest_tokens(tokens: Tensor) -> str:
    """SHA-256 of shape and ids."""
    return hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()


def _encode(document: object, options: TextOptions, tokenizer: object) -> list[int]:
    if options.chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise QtoolError("chat_template: the tokenizer has no chat template; set chat_template: false")
        ids = tokenizer.apply_chat_template(document, tokenize=True, return_dict=False)  # type: ignore[attr-defined]
        return list(ids)
    if not isinstance(document, str):
        raise QtoolError(
            f"source: {options.source}: the field {options.field} holds no text; set chat_template: true for messages"
        )
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    ids = list(tokenizer(document, add_special_tokens=options.bos == "auto", verbose=False)["input_ids"])  # type: ignore[operator]
    if options.bos == "always":
        if bos is None:
            raise QtoolError("bos: the tokenizer has no BOS token; set bos: auto or never")
        ids = [bos, *ids]
    return ids


def _read_text(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return data.decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise QtoolError(f"source: {path} cannot be read as UTF-8 text: {error}") from error


def _parse(path: Path, text: str) -> list[object]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise QtoolError(f"source: {path}:{error.lineno}: no valid JSON: {error.msg}") from error
    if not isinstance(rows, list):
        raise QtoolError(f"source: {path} must hold a list of objects")
    return rows


def _read_json_lines(path: Path) -> list[object]:
    rows: list[object] = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise QtoolError(f"source: {path}:{number}: no valid JSON: {error.msg}") from error
    return rows


def _read_hub(options: TextOptions) -> list[object]:
    import datasets

    try:
        return list(datasets.load_dataset(options.source, options.config, split=options.split, revision=options.revision))
    except (ConnectionError, datasets.exceptions.DatasetNotFoundError, FileNotFoundError) as error:
        raise QtoolError(
            f"source: {options.source} is no local file, and the hub cannot give it (no network, or no such data set); "
            "name a local .jsonl/.json/.parquet/.txt or download it once with network"
        ) from error
    except ValueError as error:
        raise QtoolError(f"source: {options.source}: {error}") from error


def _field_of(rows: list[object], options: TextOptions) -> list[object]:
    documents: list[object] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or options.field not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise QtoolError(f'source: {options.source}: row {number} has no "{options.field}" (it has {keys}); set field')
        documents.append(row[options.field])
    return documents
