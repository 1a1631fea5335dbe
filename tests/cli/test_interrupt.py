"""Ctrl-C ends a run with 130, also where a library has turned the interrupt into an error of its own."""

import signal
import subprocess
import sys

import pytest
import typer

from qtool.cli.interrupt import interruptible


def test_an_interrupt_is_exit_130_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as caught, interruptible("go on"):
        signal.raise_signal(signal.SIGINT)
    assert caught.value.exit_code == 130
    assert capsys.readouterr().err == "interrupted; go on\n"


def test_an_interrupt_that_became_another_error_is_exit_130() -> None:
    with pytest.raises(typer.Exit) as caught, interruptible("go on"):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            raise ValueError("could not determine the shape") from error
    assert caught.value.exit_code == 130


def test_an_error_without_an_interrupt_stays_what_it_is_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="a fault"), interruptible("go on"):
        raise ValueError("a fault")
    assert signal.getsignal(signal.SIGINT) is before


def test_a_job_that_ignores_interrupts_goes_on() -> None:
    code = (
        "import signal\nfrom qtool.cli.interrupt import interruptible\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with interruptible('go on'):\n    signal.raise_signal(signal.SIGINT)\n    print('went on')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n")
