"""Data sets by the names of papers: the stream of GPTQ's loaders, read from local folders in the hub's own form."""

import gzip
import json
from pathlib import Path

import datasets
import pytest

from qtool.calibration.tokens import TextOptions, read_documents, read_tokens
from qtool.calibration.windows import WindowOptions, read_windows
from qtool.errors import QtoolError
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions

LINES = ["", " = A heading = \n", "", " Some words of the sea . \n"]


@pytest.fixture
def wikitext(tmp_path: Path) -> Path:
    """A clone of the hub's repository, as small as it can be: parquet files by config, a card that names them."""
    folder = tmp_path / "wikitext"
    (folder / "wikitext-2-raw-v1").mkdir(parents=True)
    datasets.Dataset.from_dict({"text": LINES}).to_parquet(folder / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet")
    files = "  - split: test\n    path: wikitext-2-raw-v1/test-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: wikitext-2-raw-v1\n  data_files:\n{files}---\n")
    return folder


def test_wikitext2_is_its_lines_joined_by_two_newlines(wikitext: Path) -> None:
    found = read_documents(TextOptions(source="wikitext2:test", folder=str(wikitext)))
    assert found == ["\n\n".join(LINES)]


def test_what_save_to_disk_wrote_is_read_too(tmp_path: Path) -> None:
    held = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": LINES})})
    held.save_to_disk(tmp_path / "saved")
    assert read_documents(TextOptions(source="wikitext2:test", folder=str(tmp_path / "saved"))) == ["\n\n".join(LINES)]
    rows = TextOptions(source="Salesforce/wikitext", split="test", folder=str(tmp_path / "saved"))
    assert read_documents(rows) == LINES
    with pytest.raises(QtoolError, match="has no split validation; valid: test"):
        read_documents(TextOptions(source="wikitext2:validation", folder=str(tmp_path / "saved")))


def test_ptb_is_its_sentences_joined_by_spaces(tmp_path: Path) -> None:
    (tmp_path / "penn_treebank" / "test").mkdir(parents=True)
    data = datasets.Dataset.from_dict({"sentence": ["no it was n't", "black monday"]})
    data.to_parquet(tmp_path / "penn_treebank" / "test" / "0000.parquet")
    assert read_documents(TextOptions(source="ptb:test", folder=str(tmp_path))) == ["no it was n't black monday"]


def test_c4_is_1100_documents_and_at_most_256_windows(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    lines = (json.dumps({"text": f"document {n} of the web", "url": "u", "timestamp": "t"}) for n in range(1200))
    (tmp_path / "en" / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    options = WindowOptions(source="c4:validation", folder=str(tmp_path), length=8)
    [text] = read_documents(options)
    assert str(text).startswith("document 0 of the web document 1 of") and str(text).endswith("document 1099 of the web")
    assert len(read_windows(options, ModelHandle(ModelOptions(path="demo")).tokenizer, 0).tokens) == 256


def test_a_data_set_that_is_a_script_tells_where_its_rows_are(tmp_path: Path) -> None:
    (tmp_path / "scripted").mkdir()
    (tmp_path / "scripted" / "scripted.py").write_text("raise SystemExit\n")
    with pytest.raises(QtoolError, match="scripts are no longer supported, .*; .* set revision: refs/convert/parquet"):
        read_documents(TextOptions(source="any/set", folder=str(tmp_path / "scripted"), split="test"))


def test_files_that_are_broken_are_a_mistake_and_no_fault(tmp_path: Path) -> None:
    (tmp_path / "en").mkdir()
    (tmp_path / "en" / "c4-validation.00000-of-00008.json.gz").write_bytes(gzip.compress(b'{"text": "cut off'))
    with pytest.raises(QtoolError, match=f"source: {tmp_path}: "):
        read_documents(TextOptions(source="c4:validation", folder=str(tmp_path)))


def test_the_hub_is_asked_for_the_names_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As its pages state them; what a call of datasets would fetch is what is asked here."""
    asked: list[tuple[str, str | None, str, str | None, dict[str, str] | None]] = []

    def load(path: str, config: str | None, *, split: str, revision: str | None, data_files: dict[str, str] | None) -> object:
        asked.append((path, config, split, revision, data_files))
        raise ConnectionError(f"Couldn't reach '{path}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for source in ("wikitext2:test", "ptb:validation", "c4:validation"):
        with pytest.raises(QtoolError, match=r"the hub cannot give it \(Couldn't reach"):
            read_documents(TextOptions(source=source))
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", None, None),
        ("ptb-text-only/ptb_text_only", None, "validation", "refs/convert/parquet",
         {"validation": "penn_treebank/validation/*.parquet"}),
        ("allenai/c4", None, "validation", None, {"validation": "en/c4-validation.00000-of-00008.json.gz"}),
    ]  # fmt: skip


def test_without_network_the_error_says_what_to_do() -> None:
    with pytest.raises(QtoolError, match="Salesforce/wikitext is no local file, .* a folder with a copy"):
        read_documents(TextOptions(source="wikitext2:test"))


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"source": "wikitext2:train"}, "no protocol for the split train; valid: test, validation; for other text of it"),
        ({"source": "wikitext2:test", "split": "test"}, "says its config, split, field and revision itself"),
        ({"source": "wikitext2:test", "folder": "nowhere"}, "folder: nowhere is no folder"),
    ],
)
def test_what_a_protocol_does_not_take_is_refused(options: dict[str, str], refused: str) -> None:
    with pytest.raises(QtoolError, match=refused):
        read_documents(TextOptions.model_validate(options))


def test_an_empty_folder_is_no_copy(tmp_path: Path) -> None:
    with pytest.raises(QtoolError, match="source: "):
        read_documents(TextOptions(source="wikitext2:test", folder=str(tmp_path)))


def test_fixed_windows_are_those_of_calibration() -> None:
    tokenizer = ModelHandle(ModelOptions(path="demo")).tokenizer
    options = WindowOptions(source="demo:test", length=64, samples=40)
    windows = read_windows(options, tokenizer, 0)
    assert windows.tokens.tolist() == read_tokens(options, tokenizer, 0).tolist()
    assert windows.counted == [63] * 40


def test_a_stride_as_long_as_the_window_is_refused() -> None:
    with pytest.raises(ValueError, match="stride must be less than length"):
        WindowOptions(source="demo:test", length=64, stride=64)
