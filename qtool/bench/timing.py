"""Timing: how long one call takes, repeated, with its spread, on weights that no cache holds any more.

    CPU    the wall clock around each call
    GPU    events around replays of a CUDA graph that holds all calls, so that launches from Python are not in it
Calls go round over copies of the weights that together exceed the last cache several times; the copies are the caller's.
A time is the median of at least FEWEST samples with its quartiles: machines that others share move the mean.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FEWEST, MOST = 7, 200  # samples
ROTATED = {"cpu": 96 << 20, "cuda": 256 << 20}  # bytes of weights that calls go round over
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes that the copy rate is measured with
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square product that the arithmetic rate is measured with

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Timed:
    """Seconds: the median and both quartiles of so many samples."""

    median: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Rates:
    """What the device does, measured: bytes copied a second, read and written both counted; bf16 operations a second."""

    copied: float
    computed: float

    def floor(self, n_bytes: int, n_operations: int) -> float:
        """Seconds that moving so many bytes and computing so many operations take at least, whichever takes longer."""
        return max(n_bytes / self.copied, n_operations / self.computed)


def summarize(seconds: Sequence[float]) -> Timed:
    """Median and quartiles of samples."""
    ordered = sorted(seconds)
    if len(ordered) == 1:
        return Timed(ordered[0], ordered[0], ordered[0], 1)
    low, median, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Timed(median, low, high, len(ordered))


def n_copies(n_bytes: int, device: torch.device) -> int:
    """Copies of a weight of so many bytes that no cache holds all of."""
    return max(2, -(-ROTATED[device.type] // max(n_bytes, 1)))


def time_calls(calls: Sequence[Call], device: torch.device, seconds: float) -> Timed:
    """One call of those, which differ in the copy of the weights alone; samples for about so many seconds."""
    return _time_on_gpu(calls, device, seconds) if device.type == "cuda" else _time_on_cpu(calls, seconds)


def _time_on_cpu(calls: Sequence[Call], seconds: float) -> Timed:
    for call in calls[:2]:
        call()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < FEWEST or (len(taken) < MOST and time.perf_counter() < until):
        begun = time.perf_counter()
        calls[len(taken) % len(calls)]()
        taken.append(time.perf_counter() - begun)
    return summarize(taken)


def _time_on_gpu(calls: Sequence[Call], device: torch.device, seconds: float) -> Timed:
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiling, tuning and growing workspaces happen before the recording
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        taken: list[float] = []
        until = time.perf_counter() + seconds
        while len(taken) < 3 * FEWEST or (len(taken) < MOST and time.perf_counter() < until):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1e3 / len(calls))
        return summarize(taken)


def measure_rates(device: torch.device, seconds: float) -> Rates:
    """The copy rate and the arithmetic rate of a device."""
    source = torch.empty(COPIED[device.type] // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device, seconds)
    side = SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))  # zeros would be faster than data
    product = time_calls([lambda: a @ b], device, seconds)
    return Rates(2 * source.nbytes / copy.median, 2 * side**3 / product.median)
