"""What a CI job shows of a run: JUnit XML, Markdown fit for a pull request, and annotations of GitHub Actions.

One JUnit test case for each row of `gates`, and one, `fallbacks`, for what did less than asked.
Sources: https://github.com/testmoapp/junitxml (the form of JUnit that CI servers read);
https://docs.github.com/actions, "Workflow commands".
"""

from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

Row = dict[str, Any]


def junit_xml(results: Row, name: str) -> str:
    """The gates of a run called `name` as a test suite."""
    seconds = f"{sum(stage['seconds'] for stage in results['stages']):.3f}"
    gates, fallbacks = results["gates"], results["fallbacks"]
    failed = sum(not gate["passed"] for gate in gates)
    counts = {"tests": str(len(gates) + 1), "failures": str(failed), "errors": "0", "skipped": str(int(bool(fallbacks)))}
    suites = ElementTree.Element("testsuites", {"name": "qtool", **counts, "time": seconds})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": name, **counts, "time": seconds})
    for gate in gates:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"{name}.gates", "name": gate_name(gate), "time": "0"})
        if not gate["passed"]:
            failure = ElementTree.SubElement(case, "failure", {"type": "gate", "message": gate_outcome(gate)})
            failure.text = gate_outcome(gate)
    case = ElementTree.SubElement(suite, "testcase", {"classname": name, "name": "fallbacks", "time": "0"})
    if fallbacks:
        ElementTree.SubElement(case, "skipped", {"message": f"{len(fallbacks)} fallbacks"})
        ElementTree.SubElement(case, "system-out").text = "\n".join(fallbacks)
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def markdown(results: Row, name: str) -> str:
    """Gates first, then what was measured, size and fallbacks."""
    return "\n".join(_markdown(results, name)) + "\n"


def _markdown(results: Row, name: str) -> Iterator[str]:
    gates, model = results["gates"], results["model"]
    failed = sum(not gate["passed"] for gate in gates)
    verdict = f"{failed} of {len(gates)} gates failed" if failed else f"{len(gates)} gates passed" if gates else "no gates"
    yield f"### qtool {cell(name)}: {verdict}\n"
    if gates:
        yield "| gate | of | value | allowed | |\n|---|---|---|---|---|"
        for gate in gates:
            against = "" if gate["against"] in (None, "original") else f" over {gate['against']}"
            said = "passed" if gate["passed"] else "**FAILED**"
            what = cell(f"{gate['metric']} {gate['limit']}{against}")
            yield f"| {what} | {cell(_subject(gate))} | {_number(gate['value'])} | {_number(gate['allowed'])} | {said} |"
        yield ""
    subjects = list(dict.fromkeys(row["subject"] for row in results["metrics"]))
    if subjects:
        yield f"| metric | {' | '.join(map(cell, subjects))} |\n|---|{'---|' * len(subjects)}"
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in results["metrics"]:
        found.setdefault((row["name"], row["dataset"], row["unit"]), {})[row["subject"]] = row
    for (metric, dataset, unit), rows in found.items():
        cells = [_figure(rows[subject]) if subject in rows else "" for subject in subjects]
        yield f"| {cell(metric)} ({cell(unit)}, {cell(dataset)}) | {' | '.join(cells)} |"
    before, after = model["bytes_original"], model["bytes_compressed"]
    yield (
        f"\n{before / 2**20:,.1f} → {after / 2**20:,.1f} MiB ({before / after:.2f}×), {model['bits_per_weight']:.2f} bits per "
        f"weight, {sum(stage['seconds'] for stage in results['stages']):.0f} s. ± is one standard error."
    )
    if results["fallbacks"]:
        yield f"\n**{len(results['fallbacks'])} fallbacks**\n"
        yield from (f"- {cell(text)}" for text in results["fallbacks"])


def github_annotations(results: Row) -> list[str]:
    """Workflow commands: an error for each gate that failed, a warning for each fallback."""
    errors = [("error", f"gate {gate_name(gate)}", gate_outcome(gate)) for gate in results["gates"] if not gate["passed"]]
    warnings = [("warning", "fallback", text) for text in results["fallbacks"]]
    return [f"::{kind} title={_escape(title, is_property=True)}::{_escape(text)}" for kind, title, text in errors + warnings]


def gate_name(gate: Row) -> str:
    """Which gate, of what: the same text for the same gate in every run."""
    against = "" if gate["against"] in (None, "original") else f" over {gate['against']}"
    return f"{gate['metric']} {gate['limit']}{against}, {_subject(gate)}"


def gate_outcome(gate: Row) -> str:
    """The value beside what was allowed."""
    text = f"{gate['metric']} is {_number(gate['value'])}, allowed {_number(gate['allowed'])}"
    if gate["significance"] is not None:
        text += f" within {gate['significance']:g} standard errors of {_number(gate['margin_stderr'])}"
    return text


def _subject(gate: Row) -> str:
    part = "" if gate["part"] is None else f", {gate['part']}"
    return f"{gate['subject']} on {gate['dataset']}{part}"


def _figure(row: Row) -> str:
    error = "" if row["stderr"] is None else f" ± {_number(row['stderr'])}"
    if row["difference"] is None:
        return _number(row["value"]) + error
    if row["is_significant"] is False:
        return f"{_number(row['value'])}{error} (no significant change)"
    spread = "" if row["difference_stderr"] is None else f" ± {_number(row['difference_stderr'])}"
    return f"{_number(row['value'])}{error} ({row['difference']:+.4g}{spread})"


def _number(value: float) -> str:
    return f"{value:.4g}"


def cell(text: str) -> str:
    """Text inside a Markdown table: no pipe ends its cell, no mark-up begins."""
    for sign in "\\`*_<>[]|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _escape(text: str, is_property: bool = False) -> str:
    """As the runner reads it: a line is a command, and in properties commas and colons end them."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if is_property else text
