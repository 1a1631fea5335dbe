"""Products of codes: first whether they are right, then how fast they are, beside 16 bits and every peer that loads.

    error    ‖y - y64‖ / ‖y64‖, and the same of the worst token and the worst output; y64: x and decoded weights in float64
    floor    the longer of bytes / copy rate and operations / arithmetic rate, both rates measured in the same run
    bytes    of packed weights, of x and of y, each once
Inputs are normal with one channel 20 times as large; every subject of a cell sees the same ones. A result that is not
finite, or further off than its bound, is marked wrong and not timed. Where a scheme rounds inputs, y64 is of inputs rounded
as qtool does; of a peer that rounds them in its own way, y64 is of inputs as they are, and the bound that of eight bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qtool.bench.generate import decoded
from qtool.bench.peers import Peer, loading, make_peers
from qtool.bench.timing import Rates, Timed, measure_rates, n_copies, time_calls
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import QuantizedTensor, quantize
from qtool.layers.fast_linear import fast
from qtool.layers.quant_linear import QuantLinear, snap_inputs
from qtool.model.acceleration import stored_bytes
from qtool.pipeline.machine import describe_machine
from qtool.progress import Progress
from qtool.report.results import versions

DENSE, DECODED = "bf16", "decoded"
BOUND = 2**-6  # of a relative error: 8 roundings of bfloat16
BOUND_OF_ROUNDING = 2**-3  # where inputs are rounded to eight bits in another way: an outlier leaves the others 12 levels
OUTLIER = 20.0


@dataclass(frozen=True)
class Sweep:
    """Every format at every shape (out, in) and number of tokens; so many seconds of samples for each."""

    formats: tuple[Scheme, ...]
    shapes: tuple[tuple[int, int], ...]
    tokens: tuple[int, ...]
    seconds: float


@dataclass(frozen=True)
class Subject:
    """What is timed: calls that differ in their copy of the weights, bytes of one copy, and the weights that it holds.

    rounds: whether it rounds inputs as the scheme says; bound: of its errors.
    """

    calls: list[Callable[[Tensor], Tensor]]
    n_bytes: int
    weights: Tensor
    rounds: bool
    bound: float = BOUND


def bench_kernels(sweep: Sweep, device: torch.device, progress: Progress) -> dict[str, Any]:
    """Rows of all cells; see the module's docstring. Raises QtoolError for a shape that a format's groups do not divide."""
    rates = measure_rates(device, sweep.seconds)
    rows: list[dict[str, Any]] = []
    progress.stage("bench kernels", len(sweep.formats) * len(sweep.shapes) * len(sweep.tokens))
    for shape, scheme in product(sweep.shapes, sweep.formats):
        subjects, absent = make_subjects(scheme, shape, device)
        for tokens in sweep.tokens:
            cell = {"format": str(scheme), "shape": list(shape), "tokens": tokens}
            x = inputs(tokens, shape[1], device)
            for name, one in subjects.items():
                rows.append({**cell, "subject": name, **measure(one, x, scheme, rates, sweep.seconds)})
            rows += [{**cell, "subject": name, "absent": why} for name, why in absent.items()]
            progress.advance(f"{scheme}, {shape[0]}×{shape[1]}, {tokens} tokens")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine(Path.cwd())["processor"],
        "threads": torch.get_num_threads(),
        "copied_bytes_per_second": rates.copied,
        "computed_operations_per_second": rates.computed,
        "peers": loading(),
        "rows": rows,
        "versions": versions(),
    }


def inputs(tokens: int, n_in: int, device: torch.device) -> Tensor:
    """x [tokens, in] bfloat16."""
    x = torch.randn(tokens, n_in, generator=torch.Generator().manual_seed(tokens))
    x[:, n_in // 3] *= OUTLIER
    return x.to(device, torch.bfloat16)


def make_subjects(
    scheme: Scheme, shape: tuple[int, int], device: torch.device
) -> tuple[dict[str, Subject], dict[str, str]]:
    """What can be timed by its name, qtool's product first, and why the others cannot."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / shape[1] ** 0.5
    try:
        tensor = quantize(W.to(device), scheme.weights)
    except QtoolError as error:
        raise QtoolError(f"--format {scheme} --shape {shape[0]}x{shape[1]}: {error}") from error
    layer = QuantLinear(tensor, None, scheme.activations).to(device).eval()
    tensor = layer.qt
    exact = tensor.dequantize()
    found: dict[str, Subject] = {}
    absent: dict[str, str] = {}
    made = fast(layer, torch.bfloat16)
    if isinstance(made, str):
        absent["qtool"] = made
    else:
        found[f"qtool ({made.product.name})"] = _module(made, lambda: fast(layer, torch.bfloat16), device, exact)
    found[DENSE] = _module(decoded(layer, torch.bfloat16), lambda: decoded(layer, torch.bfloat16), device, exact, rounds=False)
    found[DECODED] = Subject([layer], layer.qt.codes.nbytes + layer.scale.nbytes, exact, True)
    for name, peer in make_peers(tensor, scheme, device).items():
        if isinstance(peer, str):
            absent[name] = peer
        else:
            found[name] = _peer(name, peer, tensor, scheme, device)
    return found, absent


def _module(
    first: nn.Module, again: Callable[[], nn.Module | str], device: torch.device, exact: Tensor, rounds: bool = True
) -> Subject:
    n_bytes = stored_bytes(first)
    copies: list[Callable[[Tensor], Tensor]] = [first]
    for _ in range(n_copies(n_bytes, device) - 1):
        copy = again()
        assert isinstance(copy, nn.Module), copy
        copies.append(copy)
    return Subject(copies, n_bytes, exact, rounds)


def _peer(name: str, first: Peer, tensor: QuantizedTensor, scheme: Scheme, device: torch.device) -> Subject:
    from qtool.bench.peers import PEERS

    copies = [first.call]
    for _ in range(n_copies(first.n_bytes, device) - 1):
        copy = PEERS[name](tensor, scheme, device)
        assert isinstance(copy, Peer), copy
        copies.append(copy.call)
    own = first.rounds_in_its_own_way
    return Subject(copies, first.n_bytes, first.weights, not own, BOUND_OF_ROUNDING if own else BOUND)


@torch.no_grad()
def measure(subject: Subject, x: Tensor, scheme: Scheme, rates: Rates, seconds: float) -> dict[str, Any]:
    """Errors of a subject at x [tokens, in], then its time; a failure in words."""
    rounded = snap_inputs(x.float(), scheme.activations) if subject.rounds and scheme.activations is not None else x
    expected = rounded.double() @ subject.weights.double().T  # [tokens, out]
    try:
        errors = relative_errors(subject.calls[0](x), expected)
        if not max(errors.values()) <= subject.bound:  # so that NaN is wrong too
            return {"errors": errors, "wrong": True}
        calls = [lambda call=call: call(x) for call in subject.calls]
        timed = time_calls(calls, x.device, seconds)
    except RuntimeError as error:
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    n_bytes = subject.n_bytes + x.nbytes + 2 * expected.numel()
    floor = rates.floor(n_bytes, 2 * x.numel() * expected.shape[1])
    return {
        "errors": errors,
        "seconds": asdict(timed),
        "bytes": n_bytes,
        "share_of_copy_rate": n_bytes / timed.median / rates.copied,
        "floor_seconds": floor,
        "share_of_floor": floor / timed.median,
    }


def relative_errors(y: Tensor, expected: Tensor) -> dict[str, float]:
    """Of all of y [tokens, out], of its worst token and of its worst output."""
    difference = y.double() - expected
    of_row = difference.norm(dim=1) / expected.norm(dim=1)
    of_column = difference.norm(dim=0) / expected.norm(dim=0).clamp(min=float(expected.norm()) / expected.shape[1] ** 0.5)
    worst = {"all": difference.norm() / expected.norm(), "worst_token": of_row.max(), "worst_output": of_column.max()}
    return {name: float(value) for name, value in worst.items()}


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For every cell, where qtool's product stands beside the fastest other: a loss as plainly as a win."""
    cells: dict[tuple[str, str, int], dict[str, Timed]] = {}
    for row in rows:
        cell = cells.setdefault((row["format"], "×".join(map(str, row["shape"])), row["tokens"]), {})
        if "seconds" in row:
            cell[row["subject"]] = Timed(**row["seconds"])
    said = []
    for (format, shape, tokens), times in cells.items():
        where = f"{format} {shape}, {tokens} token{'s' * (tokens > 1)}"
        own = next((name for name in times if name.startswith("qtool")), None)
        others = {name: time for name, time in times.items() if name != own}
        if own is None or not others:
            said.append(f"{where}: nothing to compare")
            continue
        best = min(others, key=lambda name: others[name].median)
        ratio = others[best].median / times[own].median
        apart = times[own].high < others[best].low or others[best].high < times[own].low
        word = ("ahead of" if ratio > 1 else "BEHIND") if apart else "level with"
        said.append(f"{where}: {word} {best}, {ratio:.2f}× its speed")
    return said


def default_sweep(device: torch.device) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Formats, shapes and tokens that are measured where none are named."""
    formats = ("w4a16g128", "w3a16g128", "w2a16g64", "w8a16", "nf4g64", "w8a8")
    if device.type == "cuda":
        return formats, ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192)), (1, 4, 16, 64, 256, 1024, 4096)
    return formats, ((2048, 2048),), (1, 4, 16, 64, 256)
