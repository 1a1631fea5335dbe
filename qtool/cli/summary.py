"""What a run came to, as tables: metrics by subject, size, exports, gates, fallbacks."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qtool.cli.console import make_console
from qtool.report.results import parameters_in_words

Row = dict[str, Any]  # an entry of results.json


def print_summary(results: Row, folder: Path) -> None:
    """Everything a user wants to know at once; the rest is in results.json and report.html."""
    console = make_console()
    print_metrics(results["metrics"], console)
    model = results["model"]
    before, after = model["bytes_original"], model["bytes_compressed"]
    console.print(
        f"[bold]size[/bold]  {before / 2**20:,.1f} → {after / 2**20:,.1f} MiB ({before / after:.2f}×), "
        f"{model['bits_per_weight']:.2f} bits per weight, {parameters_in_words(model)}"
        + ("" if model.get("cache") is None else f", cache {model['cache']}")
        + ("" if model.get("attention") is None else f", attention: {model['attention']}")
    )
    for export in results["exports"]:
        kept = "" if export["lossless"] else ", not lossless"
        path = escape(str(folder / export["path"]))
        console.print(f"[bold]export[/bold]  {path}, {export['bytes'] / 2**20:,.1f} MiB{kept}")
    for gate in results["gates"]:
        said = "[green]passed[/green]" if gate["passed"] else "[red]FAILED[/red]"
        against = "" if gate["against"] in (None, "original") else f" over {gate['against']}"
        of = gate["dataset"] if gate["part"] is None else f"{gate['dataset']}, {gate['part']}"
        what = f"{gate['metric']} {gate['limit']}{against}, {gate['subject']} has {number(gate['value'])} on {of}"
        room = ""
        if gate["significance"] is not None:
            room = f" within {gate['significance']:g} standard errors of {number(gate['margin_stderr'])}"
        console.print(f"[bold]gate[/bold]  {said}  {escape(what)}, allowed {number(gate['allowed'])}{room}")
    for text in results["fallbacks"]:
        console.print(f"[yellow]fallback[/yellow]  {escape(text)}")
    seconds = sum(stage["seconds"] for stage in results["stages"])
    console.print(f"[bold]{results['status']}[/bold] in {seconds:.0f} s; {escape(str(folder / 'report.html'))}")


def print_metrics(metrics: list[Row], console: Console | None = None) -> None:
    """A table of subjects by metrics, each value with its standard error where it has one, and its change from the original."""
    names = list(dict.fromkeys((row["name"], row["dataset"]) for row in metrics))
    subjects = list(dict.fromkeys(row["subject"] for row in metrics))
    table = Table()
    table.add_column("metric")
    for subject in subjects:
        table.add_column(subject, justify="right")
    for name, dataset in names:
        rows = {row["subject"]: row for row in metrics if (row["name"], row["dataset"]) == (name, dataset)}
        unit = next(iter(rows.values()))["unit"]
        cells = [value_with_error(rows[subject]) if subject in rows else "" for subject in subjects]
        table.add_row(f"{escape(name)} [dim]{escape(unit)}, {escape(dataset)}[/dim]", *cells)
        changes = [change_in_words(rows[subject]) if subject in rows else "" for subject in subjects]
        if any(changes):
            table.add_row("  [dim]change from the original[/dim]", *changes)
    if names:
        (console or make_console()).print(table)


def value_with_error(row: Row) -> str:
    return number(row["value"]) + ("" if row["stderr"] is None else f" ± {number(row['stderr'])}")


def change_in_words(row: Row) -> str:
    """`+0.12 ± 0.01`, or that it is within chance; empty where the row is not compared."""
    if row.get("difference") is None:
        return ""
    if row["is_significant"] is False:
        return "no significant change"
    error = "" if row["difference_stderr"] is None else f" ± {number(row['difference_stderr'])}"
    return f"{row['difference']:+.4g}{error}"


def number(value: float) -> str:
    return f"{value:.4g}"
