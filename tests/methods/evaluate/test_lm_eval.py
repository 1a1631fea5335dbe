"""lm-eval: its score of demo_cloze is the one counted by hand; local tasks; mistyped names; nothing is left behind."""

import json
import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from qtool.artifact import Metric, Record
from qtool.assets.demo.tasks import demo_cloze
from qtool.errors import QtoolError
from qtool.methods.evaluate.lm_eval import METHOD, LmEvalOptions, lm_eval, read_metrics
from qtool.model.handle import ModelHandle
from qtool.model.kept import Kept
from qtool.options import ModelOptions
from qtool.report.results import compare, metric_row

DEMO = ModelOptions(path="demo")
TASK = """
task: my_task
custom_dataset: !function my_task.load
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""
LOADER = """
import datasets

def load(**metadata):
    return {"test": datasets.Dataset.from_list([{"question": "import", "choices": ["os", "@@"], "answer": 0}] * 3)}
"""


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def score_by_hand(count: int) -> float:
    """Share of items whose true line the model finds likeliest, from the definition."""
    model = ModelHandle(DEMO)
    plain = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    right = 0
    for item in demo_cloze.load()["test"].select(range(count)):
        scores = []
        for choice in item["choices"]:
            ids = model.tokenizer(item["context"] + choice)["input_ids"]
            begun = len(model.tokenizer(item["context"].rstrip())["input_ids"])  # a blank end is scored too
            with torch.no_grad():
                log_p = plain(torch.tensor([ids[:-1]])).logits[0].float().log_softmax(-1)
            scores.append(sum(float(log_p[t - 1, ids[t]]) for t in range(begun, len(ids))))
        right += scores.index(max(scores)) == item["label"]
    return right / count


def test_demo_cloze_scores_as_counted_by_hand_and_needs_no_network(no_network: None) -> None:
    model = ModelHandle(DEMO)
    *metrics, record = lm_eval(model, model, LmEvalOptions(tasks=("demo_cloze",), limit=12), seed=0)
    assert isinstance(record, Record) and all(isinstance(metric, Metric) for metric in metrics)
    assert [metric.name for metric in metrics] == ["demo_cloze/acc", "demo_cloze/acc_norm"]
    accuracy = metrics[0]
    assert accuracy.higher_is_better is True and accuracy.parts is not None
    assert set(accuracy.parts) <= {0.0, 1.0} and sum(accuracy.parts) / 12 == pytest.approx(accuracy.value)
    assert json.loads(record.text)["results"]["demo_cloze"]["acc,none"] == accuracy.value  # as lm-eval's own files have it
    assert (accuracy.dataset, accuracy.unit) == ("demo_cloze", "fraction")
    assert accuracy.value == pytest.approx(score_by_hand(12))
    p = accuracy.value  # the standard error of a share, with n - 1
    assert accuracy.stderr == pytest.approx((p * (1 - p) / 11) ** 0.5)


def test_demo_cloze_asks_for_the_line_that_follows() -> None:
    rows = demo_cloze.load()["test"]
    items = demo_cloze.read_lines(demo_cloze.HERE / "demo_cloze.jsonl.gz")
    texts = {
        row["file"]: row["text"].split("\n") for row in demo_cloze.read_lines(demo_cloze.HERE.parent / "text" / "test.jsonl.gz")
    }
    assert len(rows) == len(items) == 400
    for row, item in zip(rows, items, strict=True):
        lines = texts[item["file"]]
        assert item["choices"][item["label"]] == item["line"]
        assert row["choices"][row["label"]] == lines[item["line"]]
        assert len(set(row["choices"])) == 4
        assert row["context"].endswith(lines[item["line"] - 1] + "\n")
        assert row["context"].count("\n") == min(14, item["line"])


def test_a_task_from_a_local_folder_runs(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "my_task.yaml").write_text(TASK)
    (tmp_path / "my_task.py").write_text(LOADER)
    model = ModelHandle(DEMO)
    options = LmEvalOptions(tasks=("my_task",), include_path=(str(tmp_path),), batch_size=2, num_fewshot=0)
    [metric, record] = lm_eval(model, model, options, seed=0)
    assert isinstance(metric, Metric) and isinstance(record, Record)
    assert (metric.name, metric.value) == ("my_task/acc", 1.0)


@pytest.mark.no_cover  # lm-eval reads thousands of files
def test_a_mistyped_task_is_refused_before_any_work_with_the_nearest_name() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match='there is no task "demo_clozze"; did you mean demo_cloze'):
        METHOD.check(ModelHandle(DEMO), LmEvalOptions(tasks=("demo_clozze",)))


def test_a_missing_task_folder_is_refused() -> None:
    model = ModelHandle(DEMO)
    with pytest.raises(QtoolError, match="the folder nowhere does not exist"):
        lm_eval(model, model, LmEvalOptions(tasks=("demo_cloze",), include_path=("nowhere",)), seed=0)


def test_a_task_whose_data_cannot_be_had_is_a_clear_error(tmp_path: Path) -> None:
    text = TASK.replace("custom_dataset: !function my_task.load", f"dataset_path: json\ndataset_name: null\n"
                        f"dataset_kwargs: {{data_files: {tmp_path}/missing.json}}")  # fmt: skip
    (tmp_path / "my_task.yaml").write_text(text)
    model = ModelHandle(DEMO)
    with pytest.raises(QtoolError, match="evaluate/lm_eval: my_task: .*missing.json"):
        lm_eval(model, model, LmEvalOptions(tasks=("my_task",), include_path=(str(tmp_path),)), seed=0)


def test_nothing_is_printed_and_nothing_stays_changed(capfd: pytest.CaptureFixture[str]) -> None:
    from tqdm import tqdm

    model = ModelHandle(DEMO)
    model.tokenizer.pad_token = None
    begin, level = tqdm.__init__, logging.getLogger("lm_eval").level
    lm_eval(model, model, LmEvalOptions(tasks=("demo_cloze",), limit=1), seed=0)
    assert capfd.readouterr() == ("", "")
    assert tqdm.__init__ is begin
    assert logging.getLogger("lm_eval").level == level
    assert model.tokenizer.pad_token is None
    assert all(parameter.is_meta for parameter in model.model.parameters())


def test_every_filter_of_a_metric_is_told_apart() -> None:
    results = {
        "alias": "gsm8k", "exact_match,strict-match": 0.5, "exact_match_stderr,strict-match": 0.1,
        "exact_match,flexible-extract": 0.75, "exact_match_stderr,flexible-extract": "N/A", "word_perplexity,none": 9.0,
    }  # fmt: skip
    found = [(metric.name, metric.value, metric.unit, metric.stderr) for metric in read_metrics("gsm8k", results, {}, {}, {})]
    assert found == [
        ("gsm8k/exact_match/strict-match", 0.5, "fraction", 0.1),
        ("gsm8k/exact_match/flexible-extract", 0.75, "fraction", None),
        ("gsm8k/word_perplexity", 9.0, "ppl", None),
    ]


GROUP = "group: both\ntask: [my_task, other_task]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"


def test_a_group_has_its_mean_its_members_and_the_documents_of_both(tmp_path: Path, no_network: None) -> None:
    (tmp_path / "my_task.yaml").write_text(TASK)
    (tmp_path / "other.yaml").write_text(TASK.replace("my_task.load", "other.load").replace("my_task", "other_task"))
    (tmp_path / "my_task.py").write_text(LOADER)
    (tmp_path / "other.py").write_text(LOADER.replace('"answer": 0}] * 3', '"answer": 1}] * 2'))
    (tmp_path / "both.yaml").write_text(GROUP)
    model = ModelHandle(DEMO)
    options = LmEvalOptions(tasks=("both",), include_path=(str(tmp_path),), num_fewshot=0, log_samples=True)
    found = lm_eval(model, model, options, seed=0)
    metrics = {one.name: one for one in found if isinstance(one, Metric)}
    assert {name: one.value for name, one in metrics.items()} == {"both/acc": 0.6, "my_task/acc": 1.0, "other_task/acc": 0.0}
    assert metrics["both/acc"].parts == (1.0, 1.0, 1.0, 0.0, 0.0)
    assert [one.name for one in found if isinstance(one, Record)] == [
        "results.json", "samples_my_task.jsonl", "samples_other_task.jsonl",
    ]  # fmt: skip


def test_answers_are_kept_by_the_text_of_the_requests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = LmEvalOptions(tasks=("demo_cloze",), limit=3)

    def measured() -> list[Metric]:
        model = ModelHandle(DEMO)
        model.kept = Kept(tmp_path / "kept", 2**30)
        found = lm_eval(model, model, options, seed=0)
        assert model.kept.notes == []
        return [one for one in found if isinstance(one, Metric)]

    first = measured()
    monkeypatch.setattr("lm_eval.models.huggingface.HFLM._model_call", None)  # the model cannot be asked again
    assert measured() == first
    options = options.model_copy(update={"limit": 4})
    with pytest.raises(TypeError):
        measured()


def test_a_chat_template_that_is_not_there_is_refused() -> None:
    assert METHOD.check is not None
    with pytest.raises(QtoolError, match="apply_chat_template: the tokenizer has no chat template"):
        METHOD.check(ModelHandle(DEMO), LmEvalOptions(tasks=("demo_cloze",), apply_chat_template=True))


def test_a_mean_that_documents_do_not_give_is_not_paired() -> None:
    [metric] = read_metrics("t", {"f1,none": 0.4}, {"f1,none": [0.0, 1.0]}, {"f1": True}, {})
    assert metric.parts is None and metric.higher_is_better is True and metric.n_units == 2


CORPUS_TASK = """
task: corpus_task
custom_dataset: !function corpus_task.load
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
process_results: !function corpus_task.answers
metric_list:
  - {metric: f1, aggregation: f1, higher_is_better: true}
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
CORPUS_LOADER = """
import datasets

def load(**metadata):
    words = ["import", "def", "class", "for", "while", "return"]
    rows = [{"question": words[i % 6] * (1 + i % 3), "choices": [" x", " self"], "answer": i % 2} for i in range(24)]
    return {"test": datasets.Dataset.from_list(rows)}

def answers(doc, results):
    scores = [loss for loss, _ in results]
    return {"f1": (doc["answer"], scores.index(max(scores))), "perplexity": scores[doc["answer"]]}
"""


def test_a_metric_of_all_documents_together_and_its_change_have_the_errors_of_the_same_resamples(
    tmp_path: Path, no_network: None, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[..., Path]
) -> None:
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    (tmp_path / "corpus_task.yaml").write_text(CORPUS_TASK)
    (tmp_path / "corpus_task.py").write_text(CORPUS_LOADER)
    options = LmEvalOptions(tasks=("corpus_task",), include_path=(str(tmp_path),), log_samples=True, num_fewshot=0)
    rows, items = list[dict[str, dict[str, Any]]](), list[list[tuple[Any, Any]]]()
    for path in ("demo", str(tiny_model("llama"))):
        model = ModelHandle(ModelOptions(path=path))
        found = lm_eval(model, model, options, seed=len(rows))  # of any seed
        stated = next(json.loads(one.text) for one in found if isinstance(one, Record) and one.name == "results.json")
        metrics = [one for one in found if isinstance(one, Metric)]
        assert [one.n_units for one in metrics] == [24, 24]
        for one in metrics:  # lm-eval draws by the same seed, and alone
            metric = one.name.split("/")[1]
            assert one.stderr == pytest.approx(stated["results"]["corpus_task"][f"{metric}_stderr,none"])
        rows.append({one.name: metric_row(one, "compressed" if rows else "original") for one in metrics})
        text = next(one.text for one in found if isinstance(one, Record) and one.name.startswith("samples"))
        items.append([(line["f1"], line["perplexity"]) for line in map(json.loads, text.splitlines())])
    resampled = np.random.default_rng(5).integers(24, size=(4000, 24))  # other draws, and the figures by their definitions

    def f1(pairs: np.ndarray) -> np.ndarray:  # [resamples, documents, 2]
        true, said = pairs[..., 0] == 1, pairs[..., 1] == 1
        return np.asarray(2 * (true & said).sum(1) / (true.sum(1) + said.sum(1)))

    def perplexity(losses: np.ndarray) -> np.ndarray:  # [resamples, documents]
        return np.asarray(np.exp(-losses.mean(1)))

    for at, (name, figure) in enumerate((("f1", f1), ("perplexity", perplexity))):
        before, after = (figure(np.array([one[at] for one in of_model])[resampled]) for of_model in items)
        row = compare(rows[1][f"corpus_task/{name}"], list(rows[0].values()))
        # 200 resamples know a standard error to 5 %: three times that.
        assert row["difference_stderr"] == pytest.approx(float(np.std(after - before)), rel=0.15), name
        assert row["difference"] == pytest.approx(row["value"] - rows[0][f"corpus_task/{name}"]["value"])
