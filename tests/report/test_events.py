"""events.jsonl read back: a run's state from hand-written events."""

from typing import Any

from qtool.report.events import RunState, read_events


def state_of(*events: dict[str, Any]) -> RunState:
    state = RunState()
    state.follow({"time": float(at), **event} for at, event in enumerate(events))
    return state


BEGUN = [
    {"event": "begun", "steps": ["calibrate/text", "quantize/gptq", "evaluate/perplexity"]},
    {"event": "step", "key": "calibrate/text", "done_before": False},
    {"event": "stage", "name": "calibrate/text", "total": 1},
    {"event": "step_done", "key": "calibrate/text", "seconds": 0.5, "peak_rss_gib": 1.5, "peak_gpu_gib": None},
    {"event": "step", "key": "quantize/gptq", "done_before": False},
    {"event": "stage", "name": "quantize/gptq", "total": 8},
    {"event": "advance", "done": 3, "detail": "layers.2"},
    {"event": "note", "text": "a fallback"},
]


def test_the_running_stage_is_the_one_that_has_begun_and_not_ended() -> None:
    state = state_of(*BEGUN)
    assert [(stage.name, stage.state) for stage in state.stages] == [
        ("calibrate/text", "done"),
        ("quantize/gptq", "running"),
        ("evaluate/perplexity", "waiting"),
    ]
    current = state.current
    assert current is not None and (current.done, current.total, current.detail) == (3, 8, "layers.2")
    assert (state.stages[0].seconds, state.stages[0].peak_gib) == (0.5, 1.5)
    assert state.notes == ["a fallback"] and state.status == "running"


def test_going_on_begins_anew_and_what_was_done_is_told() -> None:
    again = [BEGUN[0], BEGUN[1], {"event": "step", "key": "quantize/gptq", "done_before": True}]
    extra = {"event": "stage", "name": "evaluate/perplexity of export:gguf", "total": 1}
    state = state_of(*BEGUN, {"event": "stopped", "why": "KeyboardInterrupt"}, *again, extra)
    assert [stage.state for stage in state.stages] == ["done", "done before", "waiting", "running"]
    assert state.notes == [] and (state.status, state.why) == ("running", "")
    state.follow([{"time": 99.0, "event": "finished", "status": "gate-failed"}, {"time": 99.5, "event": "of a later version"}])
    assert state.status == "gate-failed" and state.stages[-1].state == "done" and state.stages[-1].seconds == 87.0


def test_half_a_line_is_left_for_later() -> None:
    assert list(read_events('{"a": 1}\n{"b": 2}\n{"c"')) == [{"a": 1}, {"b": 2}]
    assert list(read_events('{"c"')) == []
