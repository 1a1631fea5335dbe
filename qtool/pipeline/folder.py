"""RunFolder: what `qtool run` keeps on disk, so that a killed run goes on where it stopped.

    recipe.yaml      the resolved recipe            events.jsonl   one line per event, appended
    state/           fingerprint.json; one folder per step: block files, done.json
    results.json     exports/<format>/              report.html    distributions.json, what the report plots
    paired.json, evaluations/: what else was measured, see report/results.py
    preservation.jsonl: windows that calibrate/preservation chose
A step's block file is written whole or not at all; a block whose file stands is done. Activations are not kept: going on
computes them again through the finished blocks, which gives the same bits.
"""

import fcntl
import json
import shutil
import time
from pathlib import Path
from typing import Any, TextIO

from qtool.calibration.preservation import PRESERVATION
from qtool.errors import QtoolError
from qtool.model.store import write_text
from qtool.progress import Progress

EVENTS = "events.jsonl"
CHOSEN = f"{PRESERVATION}.jsonl"
SECONDS_BETWEEN_EVENTS = 1.0  # of the steps of one stage


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"
        self._events: TextIO | None = None

    def open(self, fingerprint: dict[str, str], fresh: bool) -> None:
        """Begin or go on; raises QtoolError where the folder holds another run or cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".write_test").write_text("")
            (self.path / ".write_test").unlink()
            if fresh:
                for name in ("state", "exports", "evaluations"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in ("results.json", "paired.json", "distributions.json", EVENTS, "report.html", "recipe.yaml", CHOSEN):
                    (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise QtoolError(f"--out: {self.path} cannot be written: {error.strerror}; choose another folder") from error
        self.record(fingerprint)

    def check(self, fingerprint: dict[str, str]) -> None:
        """Raise QtoolError where steps were done with another recipe, model or text; before the first, nothing can mix."""
        known = self._fingerprint() if any(path.is_dir() for path in self.state.glob("*")) else {}
        changed = [part for part, digest in fingerprint.items() if known.get(part, digest) != digest]
        if changed:
            raise QtoolError(
                f"--out: {self.path} holds a run with another {' and '.join(changed)}; "
                "use --fresh to start anew, or another --out"
            )

    def record(self, fingerprint: dict[str, str]) -> None:
        """Check and remember one more part of the fingerprint, such as the calibration text."""
        self.check(fingerprint)
        write_text(self.state / "fingerprint.json", json.dumps({**self._fingerprint(), **fingerprint}, indent=1))

    def _fingerprint(self) -> dict[str, str]:
        path = self.state / "fingerprint.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to events.jsonl, which stays locked until `close`, so that `is_at_work` can tell."""
        if self._events is None:
            self.path.mkdir(parents=True, exist_ok=True)
            self._events = (self.path / EVENTS).open("a", encoding="utf-8")
            fcntl.flock(self._events, fcntl.LOCK_SH)
        self._events.write(json.dumps({"time": round(time.time(), 3), "event": kind, **facts}) + "\n")
        self._events.flush()

    def close(self) -> None:
        """No more events come from this process."""
        if self._events is not None:
            self._events.close()
            self._events = None


def is_at_work(path: Path) -> bool:
    """Whether a process is carrying out the run of this folder; the system drops a lock with its process, killed or not."""
    with (path / EVENTS).open(encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


class RecordedProgress:
    """Progress that goes on to another one, and into events.jsonl: every stage and note, steps at most once a second."""

    def __init__(self, folder: RunFolder, shown: Progress) -> None:
        self._folder = folder
        self._shown = shown
        self._done, self._total, self._written = 0, 0, 0.0

    def stage(self, name: str, total: int) -> None:
        self._done, self._total = 0, total
        self._folder.event("stage", name=name, total=total)
        self._shown.stage(name, total)

    def advance(self, detail: str = "") -> None:
        self._done += 1
        if self._done >= self._total or time.monotonic() - self._written >= SECONDS_BETWEEN_EVENTS:
            self._written = time.monotonic()
            self._folder.event("advance", done=self._done, detail=detail)
        self._shown.advance(detail)

    def note(self, text: str) -> None:
        self._folder.event("note", text=text)
        self._shown.note(text)


class StepFolder:
    """The state of one step."""

    def __init__(self, run: RunFolder, index: int, key: str) -> None:
        self.run = run
        self.path = run.state / f"{index:02d}-{key.replace('/', '-')}"

    def result(self) -> dict[str, Any] | None:
        """What the finished step recorded; None where it is not finished."""
        path = self.path / "done.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def finish(self, result: dict[str, Any]) -> None:
        write_text(self.path / "done.json", json.dumps(result, indent=1))

    def unit(self, name: str) -> Path:
        """The block file of `block_000` or `outer`; it stands if and only if the unit is done."""
        return self.path / f"{name}.safetensors"

    def has_records(self, name: str) -> bool:
        return (self.path / f"{name}.json").is_file()

    def records(self, name: str) -> dict[str, Any]:
        """What was measured while the unit was worked on."""
        return dict(json.loads((self.path / f"{name}.json").read_text(encoding="utf-8")))

    def write_records(self, name: str, records: dict[str, Any]) -> None:
        """Before the block file, so that the block file says that both stand."""
        write_text(self.path / f"{name}.json", json.dumps(records))
