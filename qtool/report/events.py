"""events.jsonl, read back: where a run is, what each stage took, what it noted.

    begun {steps}    step {key, done_before}    stage {name, total}    advance {done, detail}    note {text}
    step_done {key, seconds, peak_rss_gib, peak_gpu_gib}    stopped {why}    finished {status}        each with its time
A run that was stopped and goes on begins anew in the same file; what counts is what stands after the last `begun`.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class StageState:
    """One line of what is shown; `seconds` is None while nothing of the stage was timed."""

    name: str
    state: str  # waiting, running, done, or "done before": taken up from an earlier run
    begun: float = 0.0
    total: int = 0
    done: int = 0
    detail: str = ""
    seconds: float | None = None
    peak_gib: float | None = None


@dataclass
class RunState:
    """What the events so far come to; `status` is running, stopped, done or gate-failed."""

    stages: list[StageState] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    status: str = "running"
    why: str = ""
    begun: float = 0.0
    last: float = 0.0

    def follow(self, events: Iterable[dict[str, Any]]) -> None:
        """Take in more events, in their order."""
        for event in events:
            self.last = event["time"]
            take = getattr(self, f"_{event['event']}", None)  # the handler of that name; later versions may write more kinds
            if take is not None:
                take(event)

    @property
    def current(self) -> StageState | None:
        return next((stage for stage in self.stages if stage.state == "running"), None)

    def _begun(self, event: dict[str, Any]) -> None:
        self.stages = [StageState(key, "waiting") for key in event["steps"]]
        self.notes, self.status, self.why, self.begun = [], "running", "", event["time"]

    def _step(self, event: dict[str, Any]) -> None:
        self._end(event["time"])
        stage = self._waiting(event["key"])
        stage.state, stage.begun = ("done before" if event["done_before"] else "running"), event["time"]

    def _stage(self, event: dict[str, Any]) -> None:
        current = self.current
        if current is None or current.name != event["name"]:
            self._end(event["time"])
            current = self._waiting(event["name"])
            current.state, current.begun = "running", event["time"]
        current.total, current.done = event["total"], 0

    def _advance(self, event: dict[str, Any]) -> None:
        if (current := self.current) is not None:
            current.done, current.detail = event["done"], event["detail"]

    def _note(self, event: dict[str, Any]) -> None:
        self.notes.append(event["text"])

    def _step_done(self, event: dict[str, Any]) -> None:
        self._end(event["time"], event["seconds"], event["peak_rss_gib"])

    def _stopped(self, event: dict[str, Any]) -> None:
        self.status, self.why = "stopped", event["why"]

    def _finished(self, event: dict[str, Any]) -> None:
        self._end(event["time"])
        self.status = event["status"]

    def _waiting(self, name: str) -> StageState:
        """The first stage of that name that waits; a new one where none does, such as of what exports are measured by."""
        found = next((stage for stage in self.stages if stage.name == name and stage.state == "waiting"), None)
        if found is None:
            found = StageState(name, "waiting")
            self.stages.append(found)
        return found

    def _end(self, time: float, seconds: float | None = None, peak_gib: float | None = None) -> None:
        if (current := self.current) is not None:
            current.state, current.detail = "done", ""
            current.seconds = time - current.begun if seconds is None else seconds
            current.peak_gib = peak_gib


def read_events(text: str) -> Iterator[dict[str, Any]]:
    """Every whole line of a text; the end of a line that is being written is left for later."""
    for line in text[: text.rfind("\n") + 1].splitlines():
        yield json.loads(line)
