"""Windows of text to measure on: fixed or sliding, with the bytes of the text that they predict, domain by domain.

Fixed: the stream cut into windows of `length`; each predicts its length - 1 next tokens and stands alone.
Sliding: a window begins every `stride` tokens and counts only its last tokens, those that no window before it counted; the
last one ends where the text does. Every token but the first is predicted once, all but the first `length` of them from at
least length - stride tokens before it.
Bytes of a token: those of the text from the end of the token before it to its own end, so that their sum over a document is
its size in UTF-8, whatever the tokenizer.
Source: https://huggingface.co/docs/transformers/perplexity (sliding windows); Gao et al. 2020, arXiv:2101.00027, section 3.1
(bits per UTF-8 byte, which tokenizers do not change).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor

from qtool.calibration.preservation import PRESERVATION
from qtool.calibration.protocols import find_protocol
from qtool.calibration.tokens import TextOptions, encoding, field_of, read_rows, rendered
from qtool.errors import QtoolError


class WindowOptions(TextOptions):
    """The text and its windows, in file order."""

    shuffle: bool = Field(False, description="take documents in a seeded random order")
    stride: int | None = Field(
        None, ge=1, description="tokens from one window's beginning to the next, each counting only what is new; null: length"
    )
    domain: str | None = Field(
        None, description="the key or column that names a document's domain: windows keep to one, and each has its figures"
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> "WindowOptions":
        if self.stride is not None and (self.stride >= self.length or not self.pack):
            raise ValueError("stride must be less than length, and pack true; leave it away for windows that stand alone")
        if self.source == PRESERVATION and (self.stride, self.domain) != (None, None):
            raise ValueError("windows of a preservation set stand alone and have no domain; leave stride and domain away")
        return self


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and of each how many of its last tokens count, their bytes and its domain."""

    tokens: Tensor  # [samples, length] int64
    counted: list[int]
    n_bytes: list[int] | None  # None where the tokenizer does not tell what of the text a token is
    domains: list[str]  # empty where no domain was asked for

    def parts(self) -> Iterator[tuple[str | None, list[int]]]:
        """(None, every window), then (`domain: NAME`, its windows) of each domain."""
        yield None, list(range(len(self.counted)))
        for domain in dict.fromkeys(self.domains):
            yield f"domain: {domain}", [index for index, one in enumerate(self.domains) if one == domain]


def read_windows(options: WindowOptions, tokenizer: object, seed: int) -> Windows:
    """The windows that options ask for, `samples` of each domain; raises QtoolError where the text is too short."""
    rows = read_rows(options)
    documents = field_of(rows, options.field, options.source)
    names = [""] * len(rows) if options.domain is None else list(map(str, field_of(rows, options.domain, options.source)))
    order = list(range(len(documents)))
    if options.shuffle:
        random.Random(seed).shuffle(order)
    protocol = find_protocol(options.source)
    most = None if protocol is None else protocol[0].windows
    tokens: list[list[int]] = []
    counted: list[int] = []
    n_bytes: list[int] | None = [] if getattr(tokenizer, "is_fast", False) else None
    domains: list[str] = []
    for name in dict.fromkeys(names[index] for index in order):
        found = _cut((documents[index] for index in order if names[index] == name), options, tokenizer, most)
        if not found or (options.samples is not None and len(found) < options.samples):
            where = options.source if options.domain is None else f"{options.source}, {options.domain} {name},"
            need = f"{options.samples or 1} windows of {options.length} tokens"
            raise QtoolError(f"source: {where} gives {len(found)} windows, {need} are asked for; lower samples or length")
        tokens += [window for window, _, _ in found]
        counted += [count for _, count, _ in found]
        domains += [name] * len(found) if options.domain is not None else []
        if n_bytes is not None:
            n_bytes += [size for _, _, size in found]
    return Windows(torch.tensor(tokens, dtype=torch.int64), counted, n_bytes, domains)


def _cut(
    documents: Iterator[object], options: WindowOptions, tokenizer: object, most: int | None
) -> list[tuple[list[int], int, int]]:
    """(tokens, how many of the last ones count, their bytes) of each window of a stream of documents."""
    length, found = options.length, list[tuple[list[int], int, int]]()
    wanted = min(options.samples or 10**9, most or 10**9)
    stream: list[int] = []
    sizes: list[int] = []
    start = 0  # of the next window in the stream
    step = options.stride or length

    def add(first: int, count: int) -> None:
        end = first + length
        found.append((stream[first:end], count, sum(sizes[end - count : end])))

    for document in documents:
        ids, lengths = _encode_with_sizes(document, options, tokenizer)
        if not options.pack:
            stream, sizes, start = [], [], 0
        stream += ids
        sizes += lengths
        while start + length <= len(stream) and len(found) < wanted and (options.pack or start == 0):
            add(start, length - 1 if start == 0 or options.stride is None else step)
            start += step
        if len(found) == wanted:
            break
    rest = len(stream) - (start - step + length)  # after the latest window's end
    if options.stride is not None and found and rest > 0 and len(found) < wanted:
        add(len(stream) - length, rest)
    return found


def _encode_with_sizes(document: object, options: WindowOptions, tokenizer: object) -> tuple[list[int], list[int]]:
    """Ids, and the bytes of text that each one adds; zeros where the tokenizer cannot tell."""
    if not getattr(tokenizer, "is_fast", False):
        ids = list(encoding(document, options, tokenizer)["input_ids"])
        return ids, [0] * len(ids)
    text = rendered(document, options, tokenizer)
    found = encoding(document, options, tokenizer, offsets=True)
    sizes, reached = [], 0
    for _, end in found["offset_mapping"]:
        sizes.append(len(text[reached:end].encode()) if end > reached else 0)
        reached = max(reached, end)
    return list(found["input_ids"]), sizes
