"""The figure of `qtool bench kernels`: microseconds over tokens, a panel for each format and shape, and the floor."""

from pathlib import Path
from typing import Any

from qtool.errors import QtoolError

GREY = "#808080"
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C2E", "#000000")


def plot(results: dict[str, Any], path: Path) -> None:
    """Write the SVG; raises QtoolError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise QtoolError("--svg needs matplotlib; pip install 'qtool[bench]'") from error
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "qtool", "font.size": 9})
    timed = [row for row in results["rows"] if "seconds" in row]
    panels = list(dict.fromkeys((row["format"], tuple(row["shape"])) for row in timed))
    names = list(dict.fromkeys(row["subject"] for row in timed))
    figure = Figure(figsize=(4.2 * min(3, len(panels)), 3.4 * -(-len(panels) // 3)), layout="constrained")
    all_axes = figure.subplots(-(-len(panels) // 3), min(3, len(panels)), squeeze=False).flatten()
    for axes, (format, shape) in zip(all_axes, panels, strict=False):
        rows = [row for row in timed if (row["format"], tuple(row["shape"])) == (format, shape)]
        for name in names:
            line = sorted((row["tokens"], row["seconds"]["median"] * 1e6) for row in rows if row["subject"] == name)
            if line:
                color = COLORS[names.index(name) % len(COLORS)]
                axes.plot(*zip(*line, strict=True), marker="o", markersize=3, linewidth=1.2, color=color, label=name)
        own = [row for row in rows if row["subject"].startswith("qtool")]
        floor = sorted((row["tokens"], row["floor_seconds"] * 1e6) for row in own)
        if floor:
            axes.plot(*zip(*floor, strict=True), color=GREY, linewidth=0.8, linestyle="--", label="floor")
        axes.set(xscale="log", yscale="log", title=f"{format}, {shape[0]}×{shape[1]}", xlabel="tokens", ylabel="µs")
        axes.grid(True, color=GREY, alpha=0.25, linewidth=0.6)
        axes.legend(frameon=False, fontsize=7)
    for axes in all_axes[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, format="svg", metadata={"Date": None})
