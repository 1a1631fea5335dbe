"""A page: one self-contained HTML file with tables and charts, readable without a network, on a phone, in light and dark.

Why nothing from elsewhere, and no script but our own: results hold text that others wrote. All of it is escaped, and the
page's own policy lets no other script run than the one whose SHA-256 it states, and loads nothing.
"""

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from qtool.model.store import write_text

Row = dict[str, Any]  # an entry of results.json
Cell = str | float | None | tuple[float, float]  # a pair: a number, and the one that would fill the cell with its bar

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "report"
SCRIPTS = ("d3.min.js", "plot.umd.min.js", "charts.js")
STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --text: #1c1c1a; --soft: #65635d; --line: #e2e1dc;
  --bar: #cfe0f6; --good: #11722f; --bad: #b3261e; --c0: #2a78d6; --c1: #eb6834; --c2: #1a9b6c; --c3: #c98a00;
  --c4: #8a3fc4; --c5: #d6457f; --c6: #3a8a1d; --c7: #7a6a5a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --text: #ecebe6; --soft: #a3a199;
  --line: #383733; --bar: #24446b; --good: #5fcf83; --bad: #ff8a80; --c0: #5b9df0; --c1: #f08a5d; --c2: #3fbf90;
  --c3: #dcae3c; --c4: #bb8be8; --c5: #ee7fab; --c6: #86c56a; --c7: #b8a795; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 68rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
h1 span { font-size: .9rem; border: 1px solid; border-radius: 1rem; padding: .15rem .7rem; white-space: nowrap; }
.soft { color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles, .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .75rem; }
.pair { grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.tiles div, .scroll, pre, figure, blockquote { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; }
.tiles div { padding: .75rem 1rem; color: var(--soft); font-size: .87rem; overflow-wrap: anywhere; }
.tiles b { display: block; color: var(--text); font-size: 1.4rem; font-weight: 600; }
.scroll { overflow: auto; max-height: 32rem; } pre { overflow-x: auto; padding: .75rem 1rem; font-size: .87rem; }
table { border-collapse: collapse; min-width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); color: var(--soft); font-weight: 600; }
tr:last-child td { border-bottom: 0; } .number { text-align: right; }
.bar { min-width: 9rem; background: linear-gradient(90deg, var(--bar) var(--share), transparent 0) content-box; }
figure { margin: .5rem 0 .75rem; padding: .6rem .75rem; min-width: 0; } figure figure { all: unset; display: block; }
figure svg { --plot-background: var(--card); font: 12px system-ui, sans-serif; overflow: visible; }
figcaption { font-size: .87rem; margin-bottom: .35rem; } figcaption > * { display: inline-block; margin-right: .8rem; }
i { display: inline-block; width: 1.2rem; margin-right: .35rem; vertical-align: middle; }
select { font: inherit; max-width: 100%; padding: .2rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: .3rem; }
blockquote { margin: 0; padding: .6rem .8rem; font-size: .9rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote b { display: block; color: var(--soft); font-size: .8rem; }
@media print { .scroll { max-height: none; } }
"""


@cache
def script() -> str:
    """What draws the charts: d3 and Plot as they are published, with their licence, and our own few lines."""
    licence = (ASSETS / "LICENSES").read_text(encoding="utf-8")
    parts = [(ASSETS / name).read_text(encoding="utf-8") for name in SCRIPTS]
    return "\n".join([f"/*\n{licence}*/", *parts])


def write_page(path: Path, name: str, body: str) -> None:
    """Write a page about what bears that name; body is markup, with charts of charts.py where it has any."""
    policy, last = "default-src 'none'; style-src 'unsafe-inline'", ""
    if "data-ch" in body:
        digest = base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'; img-src data:"  # the ramp of a heat map's legend is an image
        last = "<noscript><p class='soft'>The charts need JavaScript; the tables do not.</p></noscript>"
        last += f"<script>{script()}</script>"
    head = (
        f"<meta charset='utf-8'><meta http-equiv='Content-Security-Policy' content=\"{policy}\">"
        f"<meta name='viewport' content='width=device-width'><title>qtool: {escape(name)}</title><style>{STYLE}</style>"
    )
    write_text(path, f"<!doctype html><html lang='en'><head>{head}</head><body>{body}{last}</body></html>\n")


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Text to the left, numbers to the right; a column that is empty throughout is left out."""
    kept = [n for n in range(len(header)) if any(row[n] is not None for row in rows)]
    css = ["" if any(isinstance(row[n], str) for row in rows) else " class='number'" for n in kept]
    names = "".join(f"<th{c}>{escape(header[n])}</th>" for n, c in zip(kept, css, strict=True))
    lines = "".join(f"<tr>{''.join(_cell(row[n]) for n in kept)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{names}</tr>{lines}</table></div>"


def _cell(cell: Cell) -> str:
    if isinstance(cell, str):
        css = {"passed": " class='good'", "FAILED": " class='bad'"}.get(cell, "")
        return f"<td{css}>{escape(cell)}</td>"
    if not isinstance(cell, tuple):
        return f"<td class='number'>{'' if cell is None else number(cell)}</td>"
    value, full = cell
    share = min(max(value / full, 0), 1) if full > 0 else 0
    return f"<td class='number bar' style='--share:{share:.1%}'>{number(value)}</td>"


def number(value: float) -> str:
    """Four digits, from a thousand on whole numbers."""
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
