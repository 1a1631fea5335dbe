"""Text becomes the windows that the options describe, and every wrong source says what is wrong."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from qtool.calibration.tokens import ASSETS, TextOptions, digest_tokens, read_documents, read_tokens
from qtool.errors import QtoolError

TEXTS = [f"def function_{n}(x):\n    return x * {n}\n" * 6 for n in range(12)]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(ASSETS / "demo" / "model")


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text, "other": text.upper()}) + "\n" for text in TEXTS))
    return path


def test_every_kind_of_local_file_gives_the_same_documents(jsonl: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(jsonl.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("text.jsonl", "a.json", "a.jsonl.gz", "a.parquet"):
        assert read_documents(TextOptions(source=str(tmp_path / name))) == TEXTS, name
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    assert read_documents(TextOptions(source=str(tmp_path / "a.txt"))) == ["".join(TEXTS)]
    assert read_documents(TextOptions(source=str(jsonl), field="other"))[0] == TEXTS[0].upper()


def test_packing_joins_documents_each_begun_by_bos(jsonl: Path, tokenizer: object) -> None:
    tokens = read_tokens(TextOptions(source=str(jsonl), length=16, shuffle=False), tokenizer, 0)
    stream = [i for text in TEXTS for i in tokenizer(text)["input_ids"]]  # type: ignore[operator]
    assert tokens.flatten().tolist() == stream[: tokens.numel()]
    assert len(stream) - tokens.numel() < 16
    assert (tokens == 0).sum() > 6


def test_without_packing_each_long_document_gives_one_window(jsonl: Path, tokenizer: object) -> None:
    tokens = read_tokens(TextOptions(source=str(jsonl), length=32, shuffle=False, pack=False), tokenizer, 0)
    assert len(tokens) == len(TEXTS) and (tokens[:, 0] == 0).all()


def test_bos_is_left_out_or_put_in_as_asked(jsonl: Path, tokenizer: object) -> None:
    never = read_tokens(TextOptions(source=str(jsonl), length=16, bos="never"), tokenizer, 0)
    assert not (never == 0).any()
    always = read_tokens(TextOptions(source=str(jsonl), length=16, bos="always"), tokenizer, 0)
    assert torch.equal(always, read_tokens(TextOptions(source=str(jsonl), length=16), tokenizer, 0))


def test_the_seed_decides_the_order_and_nothing_else(jsonl: Path, tokenizer: object) -> None:
    options = TextOptions(source=str(jsonl), length=16, samples=10)
    first, again, other = (read_tokens(options, tokenizer, seed) for seed in (1, 1, 2))
    assert digest_tokens(first) == digest_tokens(again) != digest_tokens(other)


def test_no_shipped_file_is_in_two_splits() -> None:
    splits = [
        set(map(str, read_documents(TextOptions(source=f"demo:{name}")))) for name in ("calibration", "validation", "test")
    ]
    assert all(splits) and len(set.union(*splits)) == sum(map(len, splits))


def test_chat_messages_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "demo" / "model")
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "print(1)\n" * 30}]}) + "\n")
    options = TextOptions(source=str(path), field="messages", chat_template=True, length=16)
    with pytest.raises(QtoolError, match="no chat template"):
        read_tokens(options, tokenizer, 0)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tokenizer.decode(read_tokens(options, tokenizer, 0)[0]).startswith("<user>print(1)")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("demo:nothing", "there is no demo:nothing; valid: demo:calibration"),
        ("missing.jsonl", "missing.jsonl does not exist"),
        ("wrong.jsonl", r"wrong.jsonl:2: no valid JSON"),
        ("field.jsonl", r'row 1 has no "text" \(it has body\)'),
        ("binary.txt", "cannot be read as UTF-8"),
        ("table.csv", "is no .jsonl, .json, .parquet or .txt file"),
        ("object.json", "must hold a list"),
        ("someone/no-such-data", "the hub cannot give it"),
    ],
)
def test_a_wrong_source_says_what_is_wrong(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "field.jsonl").write_text('{"body": "a"}\n')
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "object.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QtoolError, match=message):
        read_documents(TextOptions(source=source))
