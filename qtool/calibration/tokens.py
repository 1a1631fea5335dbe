"""From text to token windows: `demo:SPLIT`, a local file, a protocol's name, or a data set; packed or one document a window.

    tokens [samples, length] int64
Protocol of `pack`: documents in a seeded order, each begun by the tokenizer's own special tokens (BOS where it has one and
`bos` is auto), joined into one stream and cut into windows. Without packing: each document that is long enough gives one
window from its beginning. Nothing is padded, so every token counts in every statistic.
A preservation set is not cut anew: its windows are read as the run that chose them wrote them (preservation.py).
"""

import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.preservation import PRESERVATION, Preserved, check_window, read_preservation
from qtool.calibration.protocols import Protocol, find_protocol
from qtool.errors import QtoolError, nearest
from qtool.options import Options

ASSETS = Path(__file__).resolve().parent.parent / "assets"


class TextSource(Options):
    """Which text."""

    source: str = Field(
        description="demo:calibration, demo:validation, demo:test, a local .jsonl/.json/.parquet/.txt, wikitext2:test, "
        "ptb:test, c4:validation (as papers quote perplexity on them), preservation (windows that a run chose), or a hub data "
        "set id"
    )
    folder: str | None = Field(
        None,
        description="local copy of that data set instead of the hub: a clone of it, or what datasets' save_to_disk wrote; of "
        "preservation: the folder of the run that chose it",
    )
    config: str | None = Field(None, description="configuration name of a hub data set, such as wikitext-2-raw-v1")
    split: str = Field("train", description="split of a hub data set")
    field: str = Field("text", description="the key or column that holds the text, or chat messages")
    chat_template: bool = Field(False, description="render the field's messages through the tokenizer's chat template")
    revision: str | None = Field(None, description="revision of a hub data set")


class TextOptions(TextSource):
    """Which text, and how it becomes windows of tokens."""

    samples: int | None = Field(None, ge=1, description="windows to take; null: all the text gives")
    length: int = Field(512, ge=2, description="tokens in a window")
    pack: bool = Field(True, description="join documents into one stream; false: one document, one window")
    bos: Literal["auto", "always", "never"] = Field(
        "auto", description="begin each document with BOS; auto: as the tokenizer does"
    )
    shuffle: bool = Field(True, description="take documents in a seeded random order")


class PoolOptions(TextOptions):
    """A pool of windows, and how many of them are chosen."""

    samples: int = Field(128, ge=1, description="windows to choose")
    candidates: int | None = Field(4096, ge=1, description="windows of the pool to choose from; null: all the text gives")


class PreservationPool(PoolOptions):
    """A pool, and how many of the windows chosen from it are a preservation set."""

    preserved: int | None = Field(
        None, ge=1, description="windows of the preservation set; the other samples are the pool's at random; null: all samples"
    )

    @property
    def n_preserved(self) -> int:
        return self.preserved or self.samples

    def places(self) -> Tensor:
        """Where among the samples the preservation set stands [preserved]: evenly, so that the first windows are of both."""
        return torch.arange(self.n_preserved) * self.samples // self.n_preserved

    @model_validator(mode="after")
    def _set_fits(self) -> "PreservationPool":
        if self.n_preserved > self.samples:
            raise ValueError(f"preserved is {self.preserved}, must be no more than samples, {self.samples}")
        return self


class WrittenOptions(Options):
    """Windows that are no cuttings of one text."""

    samples: int = Field(128, ge=1, description="windows to take")
    length: int = Field(512, ge=2, description="tokens in a window")


def read_documents(options: TextOptions) -> list[object]:
    """The field of every row, in file order; raises QtoolError where the source cannot be read."""
    return field_of(read_rows(options), options.field, options.source)


def read_rows(options: TextOptions) -> list[object]:
    """Every row, in file order; a text file is one row, and so is the stream of a protocol."""
    source = options.source
    if source == PRESERVATION:
        _refuse_stated(options, "leave them away")
        return [{options.field: window} for window in read_preservation(options.folder)]
    if options.folder is not None and not Path(options.folder).is_dir():
        raise QtoolError(f"source: folder: {options.folder} is no folder; name a local copy of {source}")
    if source.startswith("demo:"):
        path = ASSETS / "demo" / "text" / f"{source.removeprefix('demo:')}.jsonl.gz"
        if not path.is_file():
            raise QtoolError(f"source: there is no {source}; valid: demo:calibration, demo:validation, demo:test")
        return _read_json_lines(path)
    if (protocol := find_protocol(source)) is not None:
        return [{options.field: _read_stream(*protocol, options)}]
    path = Path(source)
    name = path.name.removesuffix(".gz")
    if not path.exists() and (name.endswith((".jsonl", ".json", ".parquet", ".txt")) or source.startswith((".", "/"))):
        raise QtoolError(f"source: the file {source} does not exist")
    if path.is_file():
        if name.endswith(".jsonl"):
            return _read_json_lines(path)
        if name.endswith(".json"):
            return _parse(path, _read_text(path))
        if name.endswith(".parquet"):
            import pyarrow.parquet

            return list(pyarrow.parquet.read_table(path).to_pylist())
        if name.endswith(".txt"):
            return [{options.field: _read_text(path)}]
        raise QtoolError(f"source: {source} is no .jsonl, .json, .parquet or .txt file")
    return _read_data_set(source, options.config, options.split, options.revision, options.folder, None)


def _refuse_stated(options: TextOptions, advice: str) -> None:
    """Raise QtoolError where options say what the source says itself."""
    if (options.config, options.split, options.field, options.revision) != (None, "train", "text", None):
        raise QtoolError(f"source: {options.source} says its config, split, field and revision itself; {advice}")


def _read_stream(protocol: Protocol, split: str, options: TextOptions) -> str:
    """The one stream of a protocol's split."""
    _refuse_stated(options, f"leave them away, or name the data set: source: {protocol.path}")
    files = None if protocol.files is None else protocol.files.format(split=split)
    revision = None if options.folder else protocol.revision
    rows = _read_data_set(protocol.path, protocol.config, split, revision, options.folder, files)
    return protocol.joint.join(map(str, field_of(rows[: protocol.documents], protocol.field, options.source)))


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


def read_pool(options: PoolOptions, tokenizer: object, seed: int) -> Tensor:
    """At most `candidates` windows [candidates, length]; raises QtoolError where they are fewer than are to be chosen."""
    stated = options.model_dump(include=set(TextOptions.model_fields)) | {"samples": None}
    pool = read_tokens(TextOptions.model_validate(stated), tokenizer, seed)[: options.candidates]
    if len(pool) < options.samples:
        raise QtoolError(
            f"source: {options.source} gives a pool of {len(pool)} windows of {options.length} tokens, {options.samples} are "
            "to be chosen from it; lower samples, raise candidates, or give more text"
        )
    return pool


def check_length(where: str, options: TextOptions | WrittenOptions, config: object) -> None:
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
    return list(encoding(document, options, tokenizer)["input_ids"])


def rendered(document: object, options: TextOptions, tokenizer: object) -> str:
    """The text of a document, its chat messages rendered through the tokenizer's template."""
    if isinstance(document, Preserved):
        return document.text
    if options.chat_template:
        if not getattr(tokenizer, "chat_template", None):
            raise QtoolError("chat_template: the tokenizer has no chat template; set chat_template: false")
        return str(tokenizer.apply_chat_template(document, tokenize=False))  # type: ignore[attr-defined]
    if not isinstance(document, str):
        raise QtoolError(
            f"source: {options.source}: the field {options.field} holds no text; set chat_template: true for messages"
        )
    return document


def encoding(document: object, options: TextOptions, tokenizer: object, offsets: bool = False) -> dict[str, list[Any]]:
    """What the tokenizer makes of a document, begun as the options say; a template writes its own special tokens.

    A window of a preservation set is the ids that it has, of which none tells where in the text it ends.
    """
    if isinstance(document, Preserved):
        check_window(document, options.length, tokenizer)
        return {"input_ids": document.ids, "offset_mapping": [(0, 0)] * len(document.ids)}
    text = rendered(document, options, tokenizer)
    bos = tokenizer.bos_token_id  # type: ignore[attr-defined]
    begins = options.bos == "auto" and not options.chat_template
    found = dict(
        tokenizer(text, add_special_tokens=begins, verbose=False, return_offsets_mapping=offsets)  # type: ignore[operator]
    )
    if options.bos == "always" and not options.chat_template:
        if bos is None:
            raise QtoolError("bos: the tokenizer has no BOS token; set bos: auto or never")
        found["input_ids"] = [bos, *found["input_ids"]]
        if offsets:
            found["offset_mapping"] = [(0, 0), *found["offset_mapping"]]
    return found


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


def _read_data_set(
    path: str, config: str | None, split: str, revision: str | None, folder: str | None, files: str | None
) -> list[object]:
    """The rows of a split, from the hub or, where there is a folder, from there."""
    import datasets

    kept = Path(folder or path)
    try:
        if (kept / "dataset_dict.json").is_file() or (kept / "state.json").is_file():  # what save_to_disk writes
            held = datasets.load_from_disk(str(kept))
            if isinstance(held, datasets.DatasetDict):
                if split not in held:
                    raise QtoolError(f"source: {kept} has no split {split}{nearest(split, held)}")
                held = held[split]
            return list(held)
        data_files = None if files is None else {split: files}
        return list(datasets.load_dataset(folder or path, config, split=split, revision=revision, data_files=data_files))
    except RuntimeError as error:  # a script, which datasets runs no longer
        raise QtoolError(
            f"source: {folder or path}: {error}; where the hub keeps its rows as Parquet, take them: set revision: "
            "refs/convert/parquet"
        ) from error
    except (ValueError, datasets.exceptions.DatasetBuildError) as error:
        raise QtoolError(f"source: {folder or path}: {error}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if folder is not None:
            raise QtoolError(f"source: {folder} holds no copy of {path}: {reason}") from error
        raise QtoolError(
            f"source: {path} is no local file, and the hub cannot give it ({reason}); name a local .jsonl/.json/.parquet/.txt, "
            "a folder with a copy of it, or download it once with network"
        ) from error


def field_of(rows: list[object], field: str, source: str) -> list[object]:
    """One field of every row; raises QtoolError for a row without it."""
    documents: list[object] = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or field not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise QtoolError(f'source: {source}: row {number} has no "{field}" (it has {keys}); set field')
        documents.append(row[field])
    return documents
