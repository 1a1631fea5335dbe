"""Inspection: what of a model is hard to quantize, read off it block by block, nothing changed.

After every block: massive activations and activation outliers, with their tokens and channels; sinks of its attention.
Of every linear: its input's outliers, kurtosis and QSUR; its weights' outliers, kurtosis, QSUR and generalised Gaussian.
The definitions stand in linalg/outliers.py, linalg/qsur.py and linalg/generalized_gaussian.py.
Memory: one block, the activations before and after it, one [in, in] matrix of each group of linears that share an input, one
window's attention weights, and one linear's weights in float32 a few times. Of activations only sums, the largest ones and a
mark per token stay.
QSUR is shown as its share of the most that as many channels can have: linears of any width compare, and 1 is the best.
"""

import heapq
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtool.calibration.statistics import LayerStats
from qtool.calibration.tokens import TextOptions, check_length, digest_tokens, read_tokens
from qtool.errors import QtoolError
from qtool.linalg import outliers
from qtool.linalg.generalized_gaussian import fit_shape, kurtosis_of_shape
from qtool.linalg.qsur import most, qsur
from qtool.model.attention import EagerAttention
from qtool.model.handle import Block, ModelHandle
from qtool.model.linear import shape_of, weight_of
from qtool.model.memory import large_pieces_returned
from qtool.model.store import write_text
from qtool.model.wiring import find_groups
from qtool.options import ModelOptions
from qtool.pipeline.blockwise import inputs_of_head
from qtool.pipeline.run import Stage
from qtool.pipeline.sensitivity import kind_of
from qtool.progress import Progress
from qtool.report.inspection import write_inspection
from qtool.report.results import versions

SCHEMA = 1
KEPT = 3  # of the largest of everything
Row = dict[str, Any]  # an entry of inspect.json
INPUT_FIELDS = (
    "input_largest",
    "input_channel",
    "input_channel_ratio",
    "input_crest",  # the largest over the root mean square
    "input_over_mean",  # the largest over the mean magnitude: above outliers.TIMES_MEAN it is an activation outlier
    "input_kurtosis",
    "input_channel_kurtosis",
    "input_qsur",
    "input_qsur_share",
)
# Field of a linear: what it is called, and whether the larger or the smaller value is the worse.
JUDGED: dict[str, tuple[str, Callable[[Iterable[float]], float]]] = {
    "input_channel_ratio": ("input: largest channel over the median one", max),
    "input_kurtosis": ("input: kurtosis", max),
    "input_qsur_share": ("input: QSUR, share of the best", min),
    "weight_reach": ("weights: largest row or column over the median one", max),
    "weight_kurtosis": ("weights: kurtosis", max),
    "weight_shape": ("weights: shape of the generalised Gaussian", min),
    "weight_qsur_share": ("weights: QSUR, share of the best", min),
}


@large_pieces_returned()
@torch.no_grad()
def inspect_model(options: ModelOptions, text: TextOptions, out: Path, progress: Progress) -> Row:
    """Inspect a model on the windows of a text; writes inspect.json and inspect.html into out, and returns the former."""
    model = ModelHandle(options)
    check_length("inspect", text, model.config.get_text_config())
    tokens = read_tokens(text, model.tokenizer, 0)  # [samples, length]
    check_writable(out)
    with Stage("inspect") as stage:
        progress.stage("inspect", model.n_blocks + 1)
        found = Inspection(model, tokens).carry_out(progress)
    results = {
        "schema": SCHEMA,
        "model": {"path": options.path, "blocks": model.n_blocks, "tied": model.is_tied, "parameters": model.n_parameters()},
        "text": {"source": text.source, "samples": len(tokens), "length": tokens.shape[1], "sha256": digest_tokens(tokens)},
        **found,
        "kinds": summarize(found["linears"]),
        "worst": worst(found),
        "stages": [stage.facts],
        "versions": versions(),
    }
    write_text(out / "inspect.json", json.dumps(results, indent=1, allow_nan=False))
    write_inspection(out / "inspect.html", results)
    return results


def check_writable(out: Path) -> None:
    """Make the folder; raises QtoolError where nothing can be written into it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".write_test").write_text("")
        (out / ".write_test").unlink()
    except OSError as error:
        raise QtoolError(f"--out: {out} cannot be written: {error.strerror}; choose another folder") from error


class Inspection:
    """One walk through the model with tokens [samples, length]."""

    def __init__(self, model: ModelHandle, tokens: Tensor) -> None:
        self._model = model
        self._tokens = tokens
        self._words: dict[int, str] = {}
        self._notes: list[str] = []

    def carry_out(self, progress: Progress) -> Row:
        """Everything that was measured, as plain values."""
        model = self._model
        attention = EagerAttention(model, self._tokens.shape[1])
        hidden = model.embed(self._tokens)  # [samples, length, hidden]
        embedding, _ = self._stream(hidden, "the embedding")
        blocks: list[Row] = []
        linears: list[Row] = []
        shares: list[Tensor] = []
        for block in model.blocks():
            stats, normed = input_stats(block, hidden)
            after = block.forward_observed(hidden, {names[0]: one for names, one in stats.items()})
            rows = [self._linear(name, block, stats[names]) for names in stats for name in names]
            row, marks = self._stream(after, block.name)
            sinks, marked = self._attention(attention, block, hidden)
            lines = {line for linear in rows for line in linear.pop("lines_of_the_stream")}
            row["outliers_meet"] = meetings(row, marks, marked, lines)
            shares += [stats[names].large_share() for names in normed]
            blocks.append({"name": block.name, **row, "attention": sinks})
            linears += rows
            hidden = after
            progress.advance(block.name)
        linears += self._head(hidden)
        progress.advance("output head")
        features = outliers.emergent_features(torch.stack(shares)).nonzero().flatten().tolist() if shares else None
        unreached = [row["name"] for row in linears if row["tokens"] == 0]
        if unreached:
            shown = ", ".join(unreached[:KEPT]) + (", ..." if len(unreached) > KEPT else "")
            self._notes.append(f"{len(unreached)} linears got no token of the text, so their inputs are not known: {shown}")
        found = {"emergent_features": features, "embedding": embedding, "blocks": blocks, "linears": linears}
        return {**found, "notes": self._notes}

    # ---- the residual stream ----

    def _stream(self, hidden: Tensor, name: str) -> tuple[Row, Tensor]:
        """Facts of hidden [samples, length, hidden], and which of its tokens [samples, length] have activation outliers."""
        moments, largest = outliers.Moments(), list[tuple[float, int]]()
        marks = torch.zeros(hidden.shape[:2], dtype=torch.bool)
        width = hidden.shape[2]
        n_massive, n_outliers = torch.zeros(2, width, dtype=torch.int64)  # [hidden] each
        mean_square, means, medians = torch.zeros(width), list[float](), list[float]()
        for window, raw in enumerate(hidden):
            x = raw.float()  # [length, hidden]
            magnitudes = x.abs()
            if not torch.isfinite(magnitudes).all():
                raise QtoolError(f"{name} gives NaN or infinity; check the model's weights, and load it with dtype: float32")
            outlying = outliers.activation_outliers(x)
            marks[window] = outlying.any(1)
            n_outliers += outlying.sum(0)
            n_massive += outliers.massive_activations(x).sum(0)
            means.append(float(magnitudes.mean()))
            medians.append(float(magnitudes.median()))
            mean_square += x.square().mean(0) / len(hidden)
            moments.update(x)
            values, places = magnitudes.flatten().topk(min(KEPT, magnitudes.numel()))
            found = zip(values.tolist(), (places + window * x.numel()).tolist(), strict=True)
            largest = heapq.nlargest(KEPT, [*largest, *found])
        row: Row = {
            "largest": [{"magnitude": value, **self._place(*divmod(place, width))} for value, place in largest],
            "mean_magnitude": statistics.fmean(means),
            "median_magnitude": statistics.fmean(medians),
            "massive": int(n_massive.sum()),
            "massive_channels": by_count(n_massive),
            "outliers": int(n_outliers.sum()),
            "outlier_channels": by_count(n_outliers),
            "outlier_tokens": int(marks.sum()),
            "kurtosis": moments.kurtosis(),
            "channel_kurtosis": outliers.channel_kurtosis(mean_square),
        }
        return row, marks

    def _place(self, token: int, channel: int) -> Row:
        return {**self._token(token), "channel": channel}

    def _token(self, token: int) -> Row:
        """Where the token of a number, counted through all windows, stands, and what it is."""
        window, position = divmod(token, self._tokens.shape[1])
        number = int(self._tokens[window, position])
        if number not in self._words:
            self._words[number] = str(self._model.tokenizer.decode([number]))
        return {"window": window, "position": position, "token": self._words[number]}

    # ---- attention ----

    def _attention(self, attention: EagerAttention, block: Block, hidden: Tensor) -> tuple[Row | None, Tensor]:
        """Sinks of a block that is fed hidden, and which tokens [samples, length] they are; None where it gives no weights."""
        received, ratios, per_head, n_heads = [], [], list[Tensor](), 0
        for window in hidden.split(1):
            maps = attention.weights(block, window)
            if isinstance(maps, str):
                self._notes.append(f"{block.name}: attention was not inspected: {maps}")
                return None, torch.zeros(hidden.shape[:2], dtype=torch.bool)
            A = torch.cat(maps)  # [heads, length, length]
            given, ratio = outliers.received_attention(A)
            received.append(given.cpu())
            ratios.append(ratio.cpu())
            n_heads = len(A)
            sinks = outliers.attention_outliers(given)
            per_head.append(A[:, :, sinks].sum((1, 2), dtype=torch.float32).cpu() / A.shape[1])  # [heads]
        given, ratio = torch.stack(received), torch.stack(ratios)  # [samples, length]
        marks = outliers.attention_outliers(given)
        values, places = given.flatten().topk(min(KEPT, given.numel()))
        top = [
            {"received": value, "times_uniform": float(ratio.flatten()[place]), **self._token(place)}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        heads = torch.stack(per_head).mean(0)  # [heads]
        row: Row = {
            "heads": n_heads,
            "sinks": int(marks.sum()),
            "sink_share": float(given[marks].sum()) / len(given),
            "sink_share_by_head": heads.tolist(),
            "first_token_share": float(given[:, 0].mean()),
            "largest": top,
        }
        return row, marks

    # ---- linears ----

    def _linear(self, name: str, block: Block, stats: "InputStats | None") -> Row:
        """Facts of one linear and its input."""
        linear = block.get(name)
        W = weight_of(linear)  # [out, in]
        out, n_in = shape_of(linear)
        kind = kind_of(name, block) if block.index >= 0 else name
        row: Row = {"name": name, "kind": kind, "block": block.index if block.index >= 0 else None, "shape": [out, n_in]}
        row |= {"tokens": 0 if stats is None else stats.n_tokens, **(stats or InputStats(n_in, W.device)).facts()}
        lines, facts = weight_facts(W)
        hidden = self._model.config.get_text_config().hidden_size
        sides = [lines[side] for side, width in (("rows", out), ("columns", n_in)) if width == hidden]
        return row | facts | {"lines_of_the_stream": {line for side in sides for line in side}}

    def _head(self, hidden: Tensor) -> list[Row]:
        """Linears outside the blocks: of a causal model the output head, which hidden [samples, length, hidden] goes to."""
        model, rows = self._model, list[Row]()
        for name in model.linear_names():
            if name.startswith(f"{model.blocks_name}."):
                continue
            stats = InputStats(model.linear_shape(name)[1], model.device)
            for x in inputs_of_head(model, name, hidden):
                stats.update(x)
            with model.outer():
                row = self._linear(name, Block(model, -1, model.model, ""), stats)
            row.pop("lines_of_the_stream")
            rows.append(row)
        return rows


class InputStats:
    """Running statistics of what linears that share an input are fed."""

    def __init__(self, n_features: int, device: torch.device) -> None:
        self._plain = LayerStats(n_features, ("amax", "mean_abs"), device)
        self._centred = LayerStats(n_features, ("hessian",), device)  # of x - shift: a mean far from zero would drown it
        self._shift: Tensor | None = None  # [in], the first tokens' mean
        self._sum = torch.zeros(n_features, dtype=torch.float64, device=device)  # [in], of x - shift
        self._n_large = torch.zeros(n_features, dtype=torch.int64, device=device)  # [in]
        self._moments = outliers.Moments()

    @property
    def n_tokens(self) -> int:
        return self._plain.n_tokens

    def update(self, x: Tensor) -> None:
        """Take in x [..., in]."""
        rows = x.detach().reshape(-1, x.shape[-1]).float().to(self._sum.device)  # [tokens, in]
        if len(rows) == 0:
            return
        if self._shift is None:
            self._shift = rows.mean(0)
        self._plain.update(rows)
        centred = rows - self._shift
        self._centred.update(centred)
        self._sum += centred.sum(0, dtype=torch.float64)
        self._n_large += (rows.abs() >= outliers.FEATURE).sum(0)
        self._moments.update(rows)

    def large_share(self) -> Tensor:
        """Share of the tokens [in] at which a channel is as large as an emergent feature is."""
        return self._n_large.cpu() / max(self.n_tokens, 1)

    def facts(self) -> Row:
        """By field; all None where no token came."""
        if self._shift is None:
            return dict.fromkeys(INPUT_FIELDS)
        amax, H = self._plain.amax(), self._centred.hessian()
        drift = self._sum / self.n_tokens  # [in], the mean's distance from the shift
        mean = self._shift.double() + drift
        mean_square = (H.diagonal().double() - drift.square() + mean.square()).clamp(min=0)  # [in]
        rms = float(mean_square.mean().sqrt())
        mean_abs = float(self._plain.mean_abs().mean())
        score = qsur(H.double().addr_(drift, drift, alpha=-1), mean)
        values = (
            float(amax.max()),
            int(amax.argmax()),
            outliers.channel_ratio(amax),
            float(amax.max()) / rms if rms > 0 else None,
            float(amax.max()) / mean_abs if mean_abs > 0 else None,
            self._moments.kurtosis(),
            outliers.channel_kurtosis(mean_square),
            score,
            None if score is None else score / most(len(amax)),
        )
        return dict(zip(INPUT_FIELDS, values, strict=True))


def input_stats(block: Block, hidden: Tensor) -> tuple[dict[tuple[str, ...], InputStats], list[tuple[str, ...]]]:
    """Empty statistics of a block's linears, one of those that share an input; and which of these a norm of the stream feeds.

    hidden [samples, length, hidden] enters the block.
    """
    found = find_groups(block, hidden[:1])
    known = {name for group in found for name in group.linears}
    groups = [group.linears for group in found] + [(name,) for name in block.linears() if name not in known]
    widths = {names: shape_of(block.get(names[0]))[1] for names in groups}
    normed = [group.linears for group in found if group.norm is not None and widths[group.linears] == hidden.shape[2]]
    return {names: InputStats(width, block.device) for names, width in widths.items()}, normed


def weight_facts(W: Tensor) -> tuple[dict[str, list[int]], Row]:
    """Rows and columns of W [out, in] that are weight outliers, and all facts of its weights."""
    lines: dict[str, list[int]] = {}
    row: Row = {"weight_largest": float(W.abs().max()), "weight_deviation": float(W.std(correction=0))}
    for side, reach, peak in zip(("rows", "columns"), outliers.reaches(W), outliers.peaks(W), strict=True):
        lines[side] = (reach > outliers.TIMES_MEDIAN_REACH).nonzero().flatten().tolist()
        values, places = reach.topk(min(KEPT, len(reach)))
        row[f"weight_outlier_{side}"] = len(lines[side])
        row[f"weight_largest_{side}"] = [
            {"index": place, "reach": value, "peak": float(peak[place])}
            for value, place in zip(values.tolist(), places.tolist(), strict=True)
        ]
        row[f"weight_peak_{side}"] = {"index": int(peak.argmax()), "peak": float(peak.max())}
    row["weight_reach"] = max(row[f"weight_largest_{side}"][0]["reach"] for side in lines)
    kurtosis = outliers.kurtosis(W)
    shape = fit_shape(W - W.mean()) if kurtosis is not None else None
    row |= {"weight_kurtosis": kurtosis, "weight_shape": shape}
    row["weight_kurtosis_of_shape"] = None if shape is None else kurtosis_of_shape(shape)
    score = None
    if W.shape[0] >= W.shape[1]:  # the rows are the samples; of fewer than the columns, shrinkage alone would speak
        mean = W.mean(0)  # [in]
        centred = W - mean
        score = qsur(centred.T @ centred / len(W), mean)
    return lines, row | {"weight_qsur": score, "weight_qsur_share": None if score is None else score / most(W.shape[1])}


def by_count(counts: Tensor) -> list[Row]:
    """Channels of counts [channels] that are not zero, the most frequent first, a few of them."""
    values, places = counts.topk(min(KEPT, len(counts)))
    found = zip(places.tolist(), values.tolist(), strict=True)
    return [{"channel": channel, "count": count} for channel, count in found if count]


def meetings(row: Row, marks: Tensor, marked: Tensor, lines: set[int]) -> Row:
    """Whether a block's three kinds of outliers are at the same places.

    Of the tokens with activation outliers, marks [samples, length], the share that are attention's, marked, too; of the
    channels with activation outliers those that are weight outliers' rows or columns, `lines`, too.
    """
    channels = [entry["channel"] for entry in row["outlier_channels"]]
    n_tokens = int(marks.sum())
    share = int((marks & marked).sum()) / n_tokens if n_tokens else None
    return {"tokens_share": share, "channels": [channel for channel in channels if channel in lines]}


# ---- what a person wants to know first ----


def summarize(linears: list[Row]) -> list[Row]:
    """One row for each kind of linear: for every judged field the median, the worst value, and whose it is."""
    kinds: dict[str, list[Row]] = {}
    for row in linears:
        kinds.setdefault(row["kind"], []).append(row)
    found: list[Row] = []
    for kind, rows in kinds.items():
        judged: Row = {}
        for field, (_, worse) in JUDGED.items():
            known = {row["name"]: row[field] for row in rows if row[field] is not None}
            extreme = worse(known.values()) if known else None
            where = next((name for name, value in known.items() if value == extreme), None)
            judged[field] = {"median": statistics.median(known.values()) if known else None, "worst": extreme, "where": where}
        found.append({"kind": kind, "count": len(rows), "reached": sum(row["tokens"] > 0 for row in rows), **judged})
    return found


def worst(found: Row) -> list[Row]:
    """The worst offender of every kind: {what, where, value}."""
    rows: list[Row] = []
    tops = [(entry["magnitude"], block["name"], entry) for block in found["blocks"] for entry in block["largest"]]
    value, name, entry = max(tops, key=lambda top: top[0])
    where = f"after {name}, channel {entry['channel']}, {spot(entry)}"
    rows.append({"what": "largest activation", "where": where, "value": value})
    sinks = [
        (entry["received"], block["name"], entry)
        for block in found["blocks"]
        if block["attention"] is not None
        for entry in block["attention"]["largest"]
    ]
    if sinks:
        value, name, entry = max(sinks, key=lambda top: top[0])
        rows.append({"what": "largest share of attention", "where": f"{name}, {spot(entry)}", "value": value})
    for field, (what, worse) in JUDGED.items():
        known = {row["name"]: row for row in found["linears"] if row[field] is not None}
        if known:
            name = worse_name(known, field, worse)
            rows.append({"what": what, "where": name + detail(known[name], field), "value": known[name][field]})
    return rows


def worse_name(rows: dict[str, Row], field: str, worse: Callable[[Iterable[float]], float]) -> str:
    """The name whose row has the worst value."""
    extreme = worse(row[field] for row in rows.values())
    return next(name for name, row in rows.items() if row[field] == extreme)


def spot(entry: Row) -> str:
    """A token in words."""
    return f"token {entry['token']!r} at {entry['position']} of window {entry['window']}"


def detail(row: Row, field: str) -> str:
    """Which channel it is, where a field is about one."""
    if field == "input_channel_ratio":
        return f", channel {row['input_channel']}"
    if field == "weight_reach":
        sides = {side: row[f"weight_largest_{side}s"][0] for side in ("row", "column")}
        side = max(sides, key=lambda one: float(sides[one]["reach"]))
        return f", {side} {sides[side]['index']}"
    return ""
