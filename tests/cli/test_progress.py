"""Progress: plain lines where stdout is no terminal, bars where it is one, nothing when silent."""

import io
import sys

import pytest

from qtool.cli import progress as module
from qtool.cli.progress import show_progress
from qtool.cli.summary import print_metrics
from qtool.progress import Progress


def work(progress: Progress) -> None:
    progress.stage("quantize/gptq", 2)
    progress.advance("layers.0")
    progress.note("layers.0: damping raised [twice]")
    progress.advance("layers.1")
    progress.stage("evaluate/perplexity", 1)
    progress.advance("original")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_tell_stages_notes_and_what_is_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SECONDS_BETWEEN_LINES", 0.0)
    with show_progress() as progress:
        work(progress)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "quantize/gptq: 2 steps"
    assert lines[1].startswith("quantize/gptq: 1/2 layers.0, about ") and lines[1].endswith(" s left")
    assert lines[2] == "note: layers.0: damping raised [twice]"
    assert lines[3].startswith("quantize/gptq: 2/2 layers.1, done in ")
    assert lines[4] == "evaluate/perplexity: 1 step"


def test_short_steps_get_no_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress() as progress:
        progress.stage("many", 1000)
        for _ in range(1000):
            progress.advance()
    # The beginning, the end, and at most a line or two from a machine that stalled in between.
    assert 2 <= len(capsys.readouterr().out.splitlines()) < 10


def test_a_terminal_gets_one_full_bar_per_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    with show_progress() as progress:
        work(progress)
    shown = terminal.getvalue()
    assert "quantize/gptq" in shown and "evaluate/perplexity" in shown
    assert "2/2" in shown and "1/1" in shown and "damping raised [twice]" in shown


def test_silent_progress_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(silent=True) as progress:
        work(progress)
    assert capsys.readouterr().out == ""


def test_metrics_stand_by_subject_with_their_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "perplexity", "dataset": "demo:test", "unit": "ppl", "stderr": 0.125}
    drift = {"name": "kl_divergence", "dataset": "demo:test", "unit": "nats/token", "stderr": None}
    before, after = {"subject": "original", "value": 8.25}, {"subject": "compressed", "value": 9.0}
    print_metrics([row | before, row | after, drift | after | {"value": 0.5}])
    lines = capsys.readouterr().out.splitlines()
    (perplexity,) = [line for line in lines if "perplexity" in line]
    assert perplexity.index("8.25 ± 0.125") < perplexity.index("9 ± 0.125")
    (kl,) = [line for line in lines if "kl_divergence" in line]
    assert "0.5" in kl and "±" not in kl


def test_a_change_says_how_sure_it_is_or_that_it_is_chance(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"name": "perplexity", "dataset": "demo:test", "unit": "ppl", "stderr": 0.125}
    before = row | {"subject": "original", "value": 8.25, "difference": None, "difference_stderr": None, "is_significant": None}
    after = row | {"subject": "compressed", "value": 9.0, "difference": 0.75, "difference_stderr": 0.01, "is_significant": True}
    same = after | {"subject": "export:gguf", "value": 8.26, "difference": 0.01, "is_significant": False}
    print_metrics([before, after, same])
    (change,) = [line for line in capsys.readouterr().out.splitlines() if "change from the original" in line]
    assert change.index("+0.75 ± 0.01") < change.index("no significant change")
