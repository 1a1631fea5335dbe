"""Data sets by the names that papers use: how their text becomes the one stream that perplexities are quoted on.

    wikitext2:test, :validation    the lines of WikiText-2 raw, joined by two newlines
    ptb:test, :validation          the sentences of Penn Treebank, joined by a space, with its <unk> and N for numbers
    c4:validation                  the first 1100 documents of C4's first English validation file, joined by a space, and of
                                   these at most 256 windows
Each stream is one document: the tokenizer begins it once. Windows of 2048 are those of the papers.
Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ), the data loaders of its code, https://github.com/IST-DASLab/gptq,
datautils.py (its wikitext2, ptb_new and c4_new); AWQ, OmniQuant and SpinQuant quote the same streams of WikiText-2 and C4.
"""

from dataclasses import dataclass

from qtool.errors import QtoolError, nearest


@dataclass(frozen=True)
class Protocol:
    """Where a data set is on the hub, and how its rows are joined."""

    path: str
    config: str | None
    field: str
    joint: str
    splits: tuple[str, ...]
    files: str | None = None  # of the split, where the whole is too large; `{split}` stands for its name
    revision: str | None = None
    documents: int | None = None  # taken from the beginning
    windows: int | None = None  # at most


PROTOCOLS = {
    "wikitext2": Protocol("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n", ("test", "validation")),
    # The repository holds a script, which datasets no longer runs; the hub keeps its rows in this branch.
    "ptb": Protocol(
        "ptb-text-only/ptb_text_only", None, "sentence", " ", ("test", "validation"),
        files="penn_treebank/{split}/*.parquet", revision="refs/convert/parquet",
    ),
    "c4": Protocol(
        "allenai/c4", None, "text", " ", ("validation",),
        files="en/c4-{split}.00000-of-00008.json.gz", documents=1100, windows=256,
    ),
}  # fmt: skip


def find_protocol(source: str) -> tuple[Protocol, str] | None:
    """The protocol and split of a source such as `wikitext2:test`; None where it names none; raises QtoolError for a split.

    Training splits are no streams to be quoted on: for calibration their rows are documents of their own.
    """
    name, colon, split = source.partition(":")
    if name not in PROTOCOLS or not colon:
        return None
    found = PROTOCOLS[name]
    if split not in found.splits:
        raise QtoolError(
            f"source: {name} has no protocol for the split {split}{nearest(split, found.splits)}; for other text of it name "
            f"the data set: source: {found.path}, split: train"
        )
    return found, split
