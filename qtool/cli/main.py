"""The command `qtool`: every verb of this folder under one name, and what its exit code means.

    0 done    1 an internal fault, with a traceback    2 a user's mistake    3 a gate failed    130 interrupted
Verbs import torch inside their functions only, so that help and lists answer at once.
"""

import functools
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

import qtool
from qtool.cli import bench
from qtool.cli.compare import compare
from qtool.cli.doctor import doctor
from qtool.cli.evaluate import evaluate
from qtool.cli.export import export
from qtool.cli.init import init
from qtool.cli.inspect import inspect
from qtool.cli.methods import methods
from qtool.cli.plan import plan
from qtool.cli.run import run
from qtool.cli.schema import schema
from qtool.cli.search import search
from qtool.cli.stream import stream
from qtool.cli.sweep import sweep
from qtool.cli.top import top
from qtool.cli.validate import validate
from qtool.cli.verify import verify
from qtool.errors import QtoolError

VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "plan": plan,
    "inspect": inspect,
    "stream": stream,
    "top": top,
    "eval": evaluate,
    "compare": compare,
    "sweep": sweep,
    "search": search,
    "export": export,
    "methods": methods,
    "validate": validate,
    "verify": verify,
    "schema": schema,
    "init": init,
    "doctor": doctor,
}
ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",  # lm-eval forks no pool of all cores from a process that holds a model
    "THP_MEM_ALLOC_ENABLE": "1",  # torch takes large tensors in pages of 2 MiB, with half the page faults
}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=qtool.__doc__)


def guarded(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with a user's mistake as one message on stderr and exit code 2."""

    @functools.wraps(verb)
    def run_verb(*args: object, **options: object) -> None:
        try:
            verb(*args, **options)
        except QtoolError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(2) from error

    return run_verb


def show_version(wanted: bool) -> None:
    if wanted:
        print(f"qtool {qtool.__version__}")
        raise typer.Exit


@app.callback()
def prepare(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Libraries stay quiet: qtool shows its own progress."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


for name, verb in VERBS.items():
    app.command(name)(guarded(verb))
benches = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")
for name, measure in bench.VERBS.items():
    benches.command(name)(guarded(measure))
app.add_typer(benches, name="bench")

if __name__ == "__main__":
    app(prog_name="qtool")
