"""`qtool methods`: every method by kind, or one with its docstring, options and paper."""

import itertools
import json
from typing import Annotated

import typer
from rich.table import Table

from qtool.cli.console import make_console
from qtool.errors import QtoolError, nearest
from qtool.options import valid_values
from qtool.registry import GUIDES, list_methods, load


def methods(name: Annotated[str | None, typer.Argument(help="One method, such as quantize/gptq.")] = None) -> None:
    """List every method, plugins included, or describe one."""
    if name is None:
        print_list()
    else:
        print_one(name)


def print_list() -> None:
    console = make_console()
    for kind, of_kind in itertools.groupby(list_methods().values(), key=lambda method: method.kind):
        console.print(f"[bold]{kind}[/bold]  {GUIDES[kind]}", highlight=False)
        table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 2))
        table.add_column(no_wrap=True)
        table.add_column()
        for method in of_kind:
            table.add_row(f"[bold]{method.key}[/bold]", method.summary)
            for name, text in (("for", method.purpose), ("costs", method.cost)):
                if text:  # a plugin may leave them out
                    table.add_row("", f"[dim]{name}: {text}[/dim]")
        console.print(table)
        console.print()
    print("One method, its options and its paper: qtool methods NAME")


def print_one(name: str) -> None:
    known = list_methods()
    if name not in known:
        raise QtoolError(f'there is no method "{name}"{nearest(name, known)}')
    info, method = known[name], load(name)
    needs = "depends on the options" if callable(method.needs) else ", ".join(method.needs) or "none"
    console = make_console()
    console.print(f"[bold]{name}[/bold]   scope: {method.scope}   statistics: {needs}\n")
    console.print(info.docstring, markup=False, soft_wrap=True)
    if not method.options.model_fields:
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("option", "default", "valid", "meaning"):
        table.add_column(heading, no_wrap=heading == "option")
    for option, field in method.options.model_fields.items():
        default = "(required)" if field.is_required() else json.dumps(field.default, default=str)
        table.add_row(option, default, valid_values(method.options, option), field.description or "")
    console.print()
    console.print(table)
