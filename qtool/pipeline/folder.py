"""RunFolder: what `qtool run` keeps on disk, so that a killed run goes on where it stopped.

    recipe.yaml      the resolved recipe            events.jsonl   one line per event, appended
    state/           fingerprint.json; one folder per step: block files, done.json
    results.json     exports/<format>/              report.html
A step's block file is written whole or not at all; a block whose file stands is done. Activations are not kept: going on
computes them again through the finished blocks, which gives the same bits.
"""

import json
import shutil
import time
from pathlib import Path
from typing import Any

from qtool.errors import QtoolError
from qtool.model.store import write_text


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = path / "state"

    def open(self, fingerprint: dict[str, str], fresh: bool) -> None:
        """Begin or go on; raises QtoolError where the folder holds another run or cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".write_test").write_text("")
            (self.path / ".write_test").unlink()
            if fresh:
                for name in ("state", "exports"):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in ("results.json", "events.jsonl", "report.html", "recipe.yaml"):
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
        """Append one line to events.jsonl."""
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), "event": kind, **facts}) + "\n")


class StepFolder:
    """The state of one step."""

    def __init__(self, run: RunFolder, index: int, key: str) -> None:
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
