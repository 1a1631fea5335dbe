"""`qtool top`: a snapshot where stdout is no terminal, live where it is, and the truth about a run that was killed."""

import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from qtool.cli.main import app

RECIPE = """\
model: demo
pipeline:
  - calibrate/text: {source: demo:calibration, samples: 64, length: 128}
  - quantize/sign_round: {scheme: w4a16g32, steps: 1000}
"""


def test_a_killed_run_is_told_from_a_live_one(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    out = tmp_path / "out"
    events = out / "events.jsonl"
    command = [sys.executable, "-m", "qtool", "run", "r.yaml", "--out", "out"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        while not events.exists() or '"name": "quantize/sign_round"' not in events.read_text():
            assert run.poll() is None
            time.sleep(0.1)
        live = CliRunner().invoke(app, ["top", str(out)])
        assert live.exit_code == 0, live.stderr
        assert "running" in live.stdout and re.search(r"▶ +quantize/sign_round", live.stdout)
        assert re.search(r"✓ +calibrate/text", live.stdout)
        parent, child = pty.openpty()
        top = subprocess.Popen([sys.executable, "-m", "qtool", "top", "out"], cwd=tmp_path, stdout=child, stdin=child)
        os.close(child)
        shown = b""
        while b"quantize/sign_round" not in shown:
            shown += os.read(parent, 1 << 16)
        assert top.poll() is None  # it follows
    finally:
        run.kill()
        run.wait()
    while select.select([parent], [], [], 20)[0]:
        try:
            shown += os.read(parent, 1 << 16)
        except OSError:  # the other end is closed
            break
    assert top.wait(20) == 0 and b"stopped" in shown and b"its process is gone" in shown
    os.close(parent)
    dead = CliRunner().invoke(app, ["top", str(out)])
    assert "stopped" in dead.stdout and "the same qtool run command goes on from here" in dead.stdout


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    refused = CliRunner().invoke(app, ["top", str(tmp_path)])
    assert refused.exit_code == 2 and "has no events.jsonl" in refused.stderr
