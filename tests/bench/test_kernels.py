"""bench kernels: what is wrong is not timed, every subject of a cell is there or says why not, losses are said."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.bench import kernels, peers, timing
from qtool.bench.kernels import BOUND, Sweep, bench_kernels, make_subjects, measure, relative_errors, verdicts
from qtool.bench.timing import Rates
from qtool.errors import QtoolError
from qtool.formats.scheme import Scheme
from qtool.formats.tensor import quantize
from qtool.progress import Silent

CPU = torch.device("cpu")
RATES = Rates(1e9, 1e12)


@pytest.fixture(autouse=True)
def few_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests measure for moments only."""
    monkeypatch.setitem(timing.ROTATED, "cpu", 1 << 16)
    monkeypatch.setitem(timing.COPIED, "cpu", 1 << 20)
    monkeypatch.setitem(timing.SIDE, "cpu", 64)


def scheme_of(word: str) -> Scheme:
    return Scheme.model_validate(word)


def test_every_cell_has_every_subject_or_the_reason_why_not() -> None:
    sweep = Sweep((scheme_of("w4a16g32"), scheme_of("nf4g64")), ((64, 128),), (1, 5), 0.0)
    rows = bench_kernels(sweep, CPU, Silent())["rows"]
    assert {(row["format"], row["tokens"]) for row in rows} == {(f, t) for f in ("w4a16g32", "nf4g64") for t in (1, 5)}
    for cell in ([r for r in rows if (r["format"], r["tokens"]) == (f, 5)] for f in ("w4a16g32", "nf4g64")):
        assert len(cell) == 3 + len(peers.PEERS)  # qtool, bf16, decoded
        assert all(("seconds" in row) != ("absent" in row) for row in cell)
    (own,) = [row for row in rows if row["subject"] == "qtool (torch int4)" and row["tokens"] == 5]
    assert own["errors"]["all"] <= own["errors"]["worst_output"] < BOUND
    assert own["share_of_floor"] == pytest.approx(own["floor_seconds"] / own["seconds"]["median"])
    assert own["bytes"] > 64 * 128 / 2 + 2 * 5 * (64 + 128)


@pytest.mark.parametrize("fault", ["nan", "tile", "scale"])
def test_what_is_wrong_is_not_timed(fault: str) -> None:
    subjects, _ = make_subjects(scheme_of("w4a16g32"), (64, 128), CPU)
    right = subjects["qtool (torch int4)"]
    x = kernels.inputs(40, 128, CPU)

    def spoil(inputs: Tensor) -> Tensor:
        y = right.calls[0](inputs).clone()
        if fault == "nan":
            y[3, 7] = torch.nan
        elif fault == "tile":
            y[:, 16:24] = y[:, 24:32].clone()
        else:
            y[:, 5] *= 1.1
        return y

    assert "seconds" in measure(right, x, scheme_of("w4a16g32"), RATES, 0.0)
    found = measure(replace(right, calls=[spoil]), x, scheme_of("w4a16g32"), RATES, 0.0)
    assert found["wrong"] and "seconds" not in found


def test_a_product_that_fails_says_so() -> None:
    subjects, _ = make_subjects(scheme_of("w4a16g32"), (64, 128), CPU)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nand more")

    found = measure(replace(subjects["bf16"], calls=[fail]), kernels.inputs(2, 128, CPU), scheme_of("w4a16g32"), RATES, 0.0)
    assert found == {"failed": "RuntimeError: no kernel image"}


def test_errors_are_of_all_of_the_worst_token_and_of_the_worst_output() -> None:
    expected = torch.full((2, 4), 10.0, dtype=torch.float64)
    y = expected.clone()
    y[1, 2] += 1
    errors = relative_errors(y, expected)
    assert errors["all"] == pytest.approx(1 / (10 * 8**0.5))
    assert errors["worst_token"] == pytest.approx(1 / 20)
    assert errors["worst_output"] == pytest.approx(1 / (10 * 2**0.5))


def row(subject: str, median: float, spread: float = 0.0, tokens: int = 1) -> dict[str, Any]:
    seconds = {"median": median, "low": median - spread, "high": median + spread, "samples": 9}
    return {"format": "w4a16g32", "shape": [64, 128], "tokens": tokens, "subject": subject, "seconds": seconds}


def test_losses_are_said_as_plainly_as_wins() -> None:
    assert verdicts([row("qtool (a)", 1.0), row("bf16", 3.0), row("peer", 2.0)]) == [
        "w4a16g32 64×128, 1 token: ahead of peer, 2.00× its speed"
    ]
    assert verdicts([row("qtool (a)", 2.0, tokens=4), row("bf16", 1.0, tokens=4)]) == [
        "w4a16g32 64×128, 4 tokens: BEHIND bf16, 0.50× its speed"
    ]
    assert verdicts([row("qtool (a)", 2.0, 1.5), row("bf16", 1.0)]) == [
        "w4a16g32 64×128, 1 token: level with bf16, 0.50× its speed"
    ]
    assert verdicts([row("bf16", 1.0)]) == ["w4a16g32 64×128, 1 token: nothing to compare"]


def test_a_peers_fault_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> peers.Peer:
        raise AttributeError("no such layout")

    def miss(*_: object) -> peers.Peer:
        raise ImportError("No module named 'x'")

    monkeypatch.setattr(peers, "PEERS", {"one": fail, "two": miss})
    tensor = quantize(torch.randn(64, 128, generator=torch.Generator().manual_seed(0)), scheme_of("w4a16g32").weights)
    assert peers.make_peers(tensor, scheme_of("w4a16g32"), CPU) == {
        "one": "failed: AttributeError: no such layout",
        "two": "does not load: No module named 'x'",
    }


def test_torchs_int8_is_a_peer_of_w8a8_and_right() -> None:
    subjects, absent = make_subjects(scheme_of("w8a8"), (64, 128), CPU)
    assert "torch int8" in subjects and absent["gemlite"] == "CUDA alone"
    found = measure(subjects["torch int8"], kernels.inputs(20, 128, CPU), scheme_of("w8a8"), RATES, 0.0)
    assert found["errors"]["all"] < 2**-8  # one rounding of bfloat16


def test_a_shape_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(QtoolError, match="--format w4a16g128 --shape 64x96: 96 columns do not divide"):
        make_subjects(scheme_of("w4a16g128"), (64, 96), CPU)


