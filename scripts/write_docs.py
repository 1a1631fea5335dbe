#!/usr/bin/env python3
"""Write the generated parts of README.md: the table of methods, and the picture of a run.

    python scripts/write_docs.py            the table, from the methods' own docstrings, between its markers
    python scripts/write_docs.py --picture  and scripts/terminal.svg, from a real run of recipes/quickstart.yaml
A test compares the README with `method_table()`, so a method whose docstring changes asks for this script.
"""

import io
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

from qtool.registry import MethodInfo, list_methods

REPOSITORY = Path(__file__).resolve().parent.parent
PICTURE = REPOSITORY / "scripts" / "terminal.svg"
BEGIN, END = "<!-- methods: written by scripts/write_docs.py -->", "<!-- end of methods -->"
COLUMNS, LINES = 118, 60  # of the terminal in the picture


def method_table() -> str:
    """The built-in methods as one Markdown table, by kind; plugins that happen to be installed stay out."""
    methods = [method for method in list_methods().values() if method.module.startswith("qtool.methods.")]
    rows = [f"| `{method.key}` | {_cell(method.summary)} | {_cell(_linked(method))} |" for method in methods]
    return "\n".join(["| method | what it does | source |", "|---|---|---|", *rows])


def between_markers(readme: str) -> str:
    """What stands between the markers now; raises ValueError where one is missing."""
    return readme[readme.index(BEGIN) + len(BEGIN) : readme.index(END)].strip()


def write_table() -> None:
    path = REPOSITORY / "README.md"
    readme = path.read_text(encoding="utf-8")
    old = readme[readme.index(BEGIN) : readme.index(END)]
    path.write_text(readme.replace(old, f"{BEGIN}\n{method_table()}\n"), encoding="utf-8")


def _linked(method: MethodInfo) -> str:
    paper = method.paper.split(" Differs")[0].rstrip(".,;")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def draw_picture() -> None:
    """Run the quickstart recipe on a terminal of its own and draw what stands on it at the end."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["qtool", "run", "recipes/quickstart.yaml", "--out", "runs/quickstart"]
        os.symlink(REPOSITORY / "recipes", Path(folder) / "recipes")
        shown = screen(run_on_terminal([sys.executable, "-m", "qtool.cli.main", *command[1:]], folder))
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ {' '.join(command)}", style="bold"))
    for line in shown:
        console.print(Text.from_ansi(line), soft_wrap=True)
    console.save_svg(str(PICTURE), title="qtool")


def run_on_terminal(command: list[str], folder: str) -> str:
    """Everything a command writes to a terminal of COLUMNS x LINES; raises CalledProcessError where it fails."""
    ours, theirs = pty.openpty()
    size = {"COLUMNS": str(COLUMNS), "LINES": str(LINES), "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | size)
    os.close(theirs)
    written = b""
    while chunk := read_some(ours):
        written += chunk
    os.close(ours)
    if process.wait():
        raise subprocess.CalledProcessError(process.returncode, command, written.decode())
    return written.decode()


def read_some(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux says that the other side has closed its terminal
        return b""


def screen(written: str) -> list[str]:
    """The lines, colours kept, that stand after all moves: Rich moves up, erases a whole line and writes it anew."""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[[\d;?]*[A-Za-ln-z]|\r|\n)", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif move := re.fullmatch(r"\x1b\[(\d*)A", part):
            row = max(0, row - int(move[1] or 1))
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part != "\r" and not part.startswith("\x1b[?"):
            lines[row] += part
    return lines


if __name__ == "__main__":
    write_table()
    if "--picture" in sys.argv[1:]:
        draw_picture()
