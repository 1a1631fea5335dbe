"""Draw the benchmark's rows: perplexity and KL against bits per weight, one SVG for light and dark backgrounds.

    python scripts/plot_quality.py rows.json quality.svg      # rows.json: what bench_quality.py --json wrote

Bits are those of the quantized linears, with scales and zero points. The color tells the tool, the mark the method; qtool's
marks are filled and lie on top. Grey text and lines, with nothing behind them, are readable on white and on black.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

GREY = "#808080"
COLORS = {  # Okabe and Ito's, told apart by all kinds of sight
    "qtool": "#D55E00",
    "llmcompressor": "#0072B2",
    "gptqmodel": "#009E73",
    "auto-round": "#CC79A7",
    "hqq": "#E69F00",
    "modelopt": "#56B4E9",
    "torchao": "#8C8C2E",
    "bitsandbytes": "#808080",
}
MARKS = {
    "rtn": "o",
    "rtn-double": "h",
    "hqq": "p",
    "awq": "s",
    "gptq": "^",
    "gptaq": "v",
    "autoround": "D",
    "autoround-best": "P",
    "autoround-v2": "X",
    "yaqa": "H",
    "best": "*",
}
RECIPE = "."  # of qtool's other methods, as their recipes run them
Row = Mapping[str, object]


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write the SVG; rows as in the benchmark's JSON, the original among them."""
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "qtool", "font.size": 9})
    measured = [row for row in rows if not row["error"] and row["tool"] != "original"]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw(left, measured, "perplexity", "perplexity")
    draw(right, measured, "kl_divergence", "KL from the original, nats per token")
    original = next(row for row in rows if row["tool"] == "original")
    left.axhline(original["perplexity"], color=GREY, linewidth=0.8, linestyle="--")
    left.text(1, original["perplexity"], "original ", transform=left.get_yaxis_transform(), ha="right", va="bottom", color=GREY)
    tools = [tool for tool in COLORS if any(row["tool"] == tool for row in measured)]
    methods = [method for method in MARKS if any(row["method"] == method for row in measured)]
    entries = [Line2D([], [], color=COLORS[tool], marker="o", linestyle="", label=tool) for tool in tools]
    entries += [
        Line2D([], [], color=GREY, marker=MARKS[method], linestyle="", fillstyle="none", label=method) for method in methods
    ]
    if any(row["scheme"] == "recipe" for row in measured):
        entries.append(Line2D([], [], color=GREY, marker=RECIPE, linestyle="", label="other recipes"))
    figure.legend(handles=entries, loc="outside right upper", frameon=False, labelcolor=GREY)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def draw(axes: Axes, rows: Sequence[Row], field: str, label: str) -> None:
    """One panel, both what is lost and its unit on a log scale; qtool's marks last, so that they lie on top."""
    for row in sorted(rows, key=lambda row: row["tool"] == "qtool"):
        color, own = COLORS[row["tool"]], row["tool"] == "qtool"
        size = 9 if row["method"] == "best" else 6
        axes.plot(
            row["bits_per_weight"], row[field], marker=MARKS.get(row["method"], RECIPE), markersize=size, color=color,
            alpha=0.9, markerfacecolor=color if own else "none", linestyle="", label="_",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight", color=GREY)
    axes.set_ylabel(label, color=GREY)
    axes.tick_params(which="both", colors=GREY)
    if field == "perplexity":
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter() if axes.get_ylim()[1] > 100 else "{x:g}")
    axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
    for spine in axes.spines.values():
        spine.set_color(GREY)


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
