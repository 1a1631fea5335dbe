"""report.html: one self-contained page per run, readable without a network, in light and dark."""

import html
from pathlib import Path
from typing import Any

from qtool.model.store import write_text

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c62828; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
pre { overflow-x: auto; padding: .75rem; border: 1px solid var(--line); border-radius: .4rem; }
.done { color: var(--good); } .gate-failed { color: var(--bad); }
"""


def write_report(path: Path, results: dict[str, Any], recipe: str) -> None:
    """Write the page of a finished run."""
    model = results["model"]
    ratio = model["bytes_original"] / max(model["bytes_compressed"], 1)
    summary = [
        ("model", model["path"]),
        ("parameters", f"{model['parameters']:,}"),
        ("size", f"{model['bytes_original']:,} to {model['bytes_compressed']:,} bytes ({ratio:.2f} times smaller)"),
        ("bits per quantized weight", f"{model['bits_per_weight']:.3f}"),
    ]
    parts = [
        f"<h1>qtool: <span class='{results['status']}'>{results['status']}</span></h1>",
        _table(("", "value"), summary),
        "<h2>Quality</h2>",
        _table(
            ("metric", "dataset", "subject", "value", "± standard error", "unit"),
            [(m["name"], m["dataset"], m["subject"], m["value"], m["stderr"], m["unit"]) for m in results["metrics"]],
        ),
    ]
    if results["gates"]:
        rows = [
            (g["metric"], g["subject"], g["limit"], g["value"], "passed" if g["passed"] else "FAILED") for g in results["gates"]
        ]
        parts += ["<h2>Gates</h2>", _table(("metric", "subject", "limit", "value", ""), rows)]
    if results["fallbacks"]:
        parts += [
            "<h2>Fallbacks</h2>",
            _table(("what quietly did less than asked",), [(text,) for text in results["fallbacks"]]),
        ]
    linears = [(b["name"], b["scheme"], b.get("sqnr_db"), b.get("relative_output_error")) for b in results["blocks"]]
    stages = [(s["name"], s["seconds"], s["peak_rss_gib"], s["peak_gpu_gib"]) for s in results["stages"]]
    exports = [
        (e["format"], e["path"], e["bytes"], "lossless" if e["lossless"] else "re-quantized") for e in results["exports"]
    ]
    parts += [
        "<h2>Linears</h2>",
        _table(("linear", "scheme", "SQNR (dB)", "relative output error"), linears),
        "<h2>Stages</h2>",
        _table(("stage", "seconds", "peak memory (GiB)", "peak GPU memory (GiB)"), stages),
        "<h2>Exports</h2>",
        _table(("format", "path", "bytes", ""), exports),
        "<h2>Versions</h2>",
        _table(("package", "version"), list(results["versions"].items())),
        f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre>",
    ]
    meta = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'>"
    head = f"{meta}<title>qtool run</title><style>{STYLE}</style>"
    write_text(path, f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n")


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    lines = "".join("<tr>" + "".join(f"<td>{_show(value)}</td>" for value in row) + "</tr>" for row in rows)
    return f"<table><tr>{cells}</tr>{lines}</table>"


def _show(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return html.escape(f"{value:,}" if isinstance(value, int) else str(value))
