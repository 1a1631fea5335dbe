"""What the benchmarks share: rows and their file, the tables, and the study that has each tool run in a process of its own.

A study says which rows there are, {scheme: {method: tools}}. A scheme before its first "-" is a class, whose rows compete.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml
from safetensors.torch import save_file
from torch import Tensor

from qtool import __version__
from qtool.calibration.tokens import TextOptions, digest_tokens, read_tokens
from qtool.model.handle import ModelHandle
from qtool.options import ModelOptions
from qtool.pipeline.run import digest_model, finished_run, run_recipe
from qtool.progress import Silent
from qtool.recipe import CHANGING, load

REPO = Path(__file__).resolve().parent.parent
Study = dict[str, dict[str, str]]
Steps = list[dict[str, Any]]
PATHS = ("model", "tokens", "reference")  # of a job: a row depends on what these files hold, which the subject's digest tells


@dataclass
class Row:
    """One tool's one result; what was not measured is null, and the original has neither seconds nor bits."""

    scheme: str
    method: str
    tool: str
    digest: str  # of the model, the tokens and the text; of the settings
    version: str = ""
    note: str = ""
    bits_per_weight: float | None = None
    seconds: float | None = None
    peak_rss_gib: float | None = None
    losses: Sequence[float] = ()  # mean of every window, nats a token
    divergences: Sequence[float] = ()  # mean KL from the original of every window, nats a token
    error: str = ""

    @property
    def kl(self) -> float:
        return statistics.fmean(self.divergences)

    @property
    def perplexity(self) -> float:
        return math.exp(statistics.fmean(self.losses))

    @property
    def family(self) -> str:
        return self.scheme.split("-")[0]

    def to_json(self) -> str:
        """One line, with the means that follow from the windows, these in five digits."""
        windows = {"losses": self.losses, "divergences": self.divergences}
        means: dict[str, object] = {name: [float(f"{x:.5g}") for x in values] for name, values in windows.items()}
        if self.losses:
            means |= {"kl_divergence": self.kl, "kl_divergence_stderr": standard_error(self.divergences)}
            means |= {"perplexity": self.perplexity, "perplexity_stderr": self.perplexity * standard_error(self.losses)}
        return json.dumps(asdict(self) | means)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan for a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def read_rows(path: Path) -> list[Row]:
    names = [field.name for field in fields(Row)]
    return [Row(**{name: raw[name] for name in names}) for raw in json.loads(path.read_text())]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A JSON list, one row a line; the file is replaced whole, so that a killed study leaves the one before."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text("[\n" + ",\n".join(row.to_json() for row in rows) + "\n]\n")
    temporary.replace(path)


def recipe_steps(file: str) -> Steps | None:
    """The steps of a recipe that change the model or choose its schemes; None where the file does not exist."""
    path = REPO / "recipes" / file
    if not path.is_file():
        print(f"no {path.relative_to(REPO)}; its row is left out", file=sys.stderr)
        return None
    steps = [step for step in load(path).steps if step.method.kind in ("search", *CHANGING)]
    return [{step.key: step.options.model_dump(mode="json")} for step in steps]


def run_tool(row: Row, job: dict[str, Any], out: Path, venvs: Path, script: str) -> None:
    """Run one job in a process of its own, qtool's as `script --job`; fills in what its result tells, or the row's error."""
    shutil.rmtree(out, ignore_errors=True)
    job_file = out.with_suffix(".json")
    job_file.write_text(json.dumps(job | {"out": str(out)}))
    if row.tool == "qtool":
        command = [sys.executable, script, "--job", str(job_file)]
    else:
        runner = REPO / "scripts" / "peers" / f"run_{row.tool.replace('-', '_')}.py"
        command = [str(venvs / f"peer-{row.tool}" / "bin" / "python"), str(runner), str(job_file)]
        if not Path(command[0]).is_file():
            row.error = f"no {command[0]}; scripts/peers/setup_venvs.sh makes it"
            return
    # Large pages as the command line sets them, for every tool.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count()), **os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
    # in the work folder, because some tools leave logs where they run
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=out.parent)
    out.with_suffix(".log").write_text(done.stdout + done.stderr)
    if done.returncode:
        row.error = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
        return
    for name, value in json.loads((out / "result.json").read_text()).items():
        if name != "tool":
            setattr(row, name, value)


def table(rows: Sequence[Row]) -> str:
    """All rows as a Markdown table, each beside the peer of the lowest KL in its class and the original."""
    lines = [
        "| scheme | method | tool | bits | KL (nats/token) | less the best peer's | perplexity | change | seconds | GiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    original = next(row for row in rows if row.tool == "original")
    for row in rows:
        head = f"| {row.scheme} | {row.method} | {row.tool} {row.version} "
        if row.error:
            lines.append(f"{head}| failed: {row.error} | | | | | | |")
            continue
        ppl = f"{row.perplexity:.3f} ± {row.perplexity * standard_error(row.losses):.3f}"
        if row is original:
            lines.append(f"{head}| | 0 | | {ppl} | | | |")
            continue
        peer = best_peer(rows, row.family)
        less = ""
        if peer is not None and peer is not row:
            pairs = [a - b for a, b in zip(row.divergences, peer.divergences, strict=True)]
            less = f"{statistics.fmean(pairs):+.5f} ± {standard_error(pairs):.5f}"
        pairs = [a - b for a, b in zip(row.losses, original.losses, strict=True)]
        ratio = math.exp(statistics.fmean(pairs))
        change = f"{100 * (ratio - 1):+.2f} ± {100 * ratio * standard_error(pairs):.2f} %"
        kl = f"{row.kl:.5f} ± {standard_error(row.divergences):.5f}"
        cost = f"{row.seconds:.1f} | {row.peak_rss_gib:.2f}"
        lines.append(f"{head}| {row.bits_per_weight:.3f} | {kl} | {less} | {ppl} | {change} | {cost} |")
    return "\n".join(lines)


def best_peer(rows: Sequence[Row], family: str) -> Row | None:
    """The row of the lowest KL among other tools' of a class."""
    peers = [row for row in rows if row.family == family and row.tool not in ("qtool", "original") and not row.error]
    return min(peers, key=lambda row: row.kl, default=None)


def ratios(rows: Sequence[Row], own: Mapping[str, str] = MappingProxyType({})) -> str:
    """A Markdown table: qtool's rows against the best peer of the same method, and its best against the best peer of all.

    KL against the peer of the lowest KL; seconds and memory against the lowest of any peer with the row's method.
    own: schemes whose rows stand against qtool's own of another scheme, {scheme: other}.
    """
    lines = ["| scheme | method | against | KL ratio | seconds ratio | memory ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.tool != "qtool" or row.error:
            continue
        same = [other for other in rows if (other.scheme, other.method) == (row.scheme, row.method)]
        peers = [other for other in same if other.tool != "qtool" and not other.error]
        against = min(peers, key=lambda peer: peer.kl, default=None)
        if row.scheme in own:
            same = [other for other in rows if (other.scheme, other.method) == (own[row.scheme], row.method)]
            peers = [other for other in same if other.tool == "qtool" and not other.error]
            against = next(iter(peers), None)
        elif row.method == "best":
            against = best_peer(rows, row.family)
            peers = [] if against is None else [against]
        if against is None:
            continue
        ratio = row.kl / against.kl
        spread = standard_error([a - ratio * b for a, b in zip(row.divergences, against.divergences, strict=True)])
        seconds = row.seconds / min(peer.seconds for peer in peers)
        memory = row.peak_rss_gib / min(peer.peak_rss_gib for peer in peers)
        name = f"{against.tool} {against.method} {against.scheme if against.scheme != row.scheme else ''}".strip()
        kl = f"{ratio:.3f} ± {spread / against.kl:.3f}"
        lines.append(f"| {row.scheme} | {row.method} | {name} | {kl} | {seconds:.3g} | {memory:.3g} |")
    return "\n".join(lines)


def short_digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def study_parser(description: str, study: Study, work: Path) -> argparse.ArgumentParser:
    """A parser with what every study is told on the command line."""
    methods = sorted({method for row in study.values() for method in row})
    tools = sorted({tool for row in study.values() for names in row.values() for tool in names.split()})
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, or a local transformers checkpoint")
    parser.add_argument("--text", default="demo:test", help="what is measured; demo:validation for making choices")
    parser.add_argument("--venvs", type=Path, default=REPO.parent / "venvs", help="where setup_venvs.sh put the peers")
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--schemes", nargs="+", default=list(study), choices=list(study), metavar="SCHEME")
    parser.add_argument("--methods", nargs="+", default=methods, choices=methods, metavar="METHOD")
    parser.add_argument("--tools", nargs="+", default=tools, choices=tools, metavar="TOOL")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows of 512 tokens")
    parser.add_argument("--windows", type=int, default=None, help="windows of text to measure; all without it")
    parser.add_argument("--iterations", type=int, default=None, help="for trials: updates of AutoRound, not its 200 or 1000")
    parser.add_argument("--json", type=Path, default=None, help="file that keeps the rows, written after each")
    parser.add_argument("--append", action="store_true", help="keep the rows of --json, run only what is not in it")
    parser.add_argument("--redo", nargs="+", default=[], metavar="TOOL", help="with --append: tools to run again all the same")
    parser.add_argument("--job", type=Path, default=None, help=argparse.SUPPRESS)
    return parser


@dataclass(frozen=True)
class Subject:
    """What all tools are given and measured on."""

    original: ModelHandle  # in float32
    text: dict[str, Any]  # options of calibrate/text, whose tokens the file holds
    tokens: Path
    test: Tensor  # [windows, length], int64
    digest: str  # of all of these


def read_subject(arguments: argparse.Namespace) -> Subject:
    """The model and both texts that the command line names; writes the calibration tokens into its work folder."""
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    folder = Path(arguments.model)  # jobs run elsewhere, where a relative path leads to nothing
    model = str(folder.resolve()) if folder.is_dir() else arguments.model
    original = ModelHandle(ModelOptions(path=model, dtype="float32"))
    text = {"source": "demo:calibration", "samples": arguments.samples, "length": 512}
    tokens = read_tokens(TextOptions.model_validate(text), original.tokenizer, 0)  # [samples, length]
    save_file({"tokens": tokens}, work / "tokens.safetensors")
    measured = {"source": arguments.text, "samples": arguments.windows, "length": 512, "shuffle": False}
    test = read_tokens(TextOptions.model_validate(measured), original.tokenizer, 0)  # [windows, length]
    digest = short_digest([digest_model(original), digest_tokens(tokens), digest_tokens(test)])
    return Subject(original, text, work / "tokens.safetensors", test, digest)


# (scheme, method, tool) -> the job and what else its result depends on; None leaves the row out.
JobOf = Callable[[str, str, str], tuple[dict[str, Any], object] | None]


def run_study(
    arguments: argparse.Namespace,
    study: Study,
    script: str,
    subject: Subject,
    original: Row,
    job_of: JobOf,
    measure: Callable[[Row, Path], None],
) -> list[Row]:
    """Run all rows asked for that --json does not hold; `measure` fills in of a row what its result in a folder leaves open."""
    work: Path = arguments.work.resolve()
    rows = read_rows(arguments.json) if arguments.append and arguments.json.is_file() else []
    rows = [row for row in rows if row.tool not in ("original", *arguments.redo) and not row.error]
    if any(not row.digest.startswith(subject.digest) for row in rows):
        sys.exit(f"{Path(script).stem}: {arguments.json} holds rows of another model or other text; name another file")
    rows.insert(0, original)
    for scheme in arguments.schemes:
        for method, tools in study[scheme].items():
            for tool in tools.split():
                if method not in arguments.methods or tool not in arguments.tools:
                    continue
                found = job_of(scheme, method, tool)
                if found is None:
                    continue
                job, more = found
                settings = {name: value for name, value in job.items() if name not in PATHS}
                digest = f"{subject.digest}-{short_digest([settings, more] if more else settings)}"
                key = (scheme, method, tool)
                if any((row.scheme, row.method, row.tool) == key and row.digest == digest for row in rows):
                    continue
                rows = [row for row in rows if (row.scheme, row.method, row.tool) != key]
                row = Row(scheme, method, tool, digest)
                out = work / f"{tool}-{method}-{scheme}".replace(":", "-")
                run_tool(row, job, out, arguments.venvs, script)
                if not row.error:
                    measure(row, out)
                    shutil.rmtree(out)
                told = row.error or f"KL {row.kl:.5f}, {row.bits_per_weight:.3f} bits, {row.seconds:.1f} s; {row.note}"
                print(f"{scheme} {method} {tool}: {told}", file=sys.stderr, flush=True)
                rows.append(row)
                if arguments.json is not None:
                    write_rows(arguments.json, sort_rows(rows, study))
    rows = sort_rows(rows, study)
    if arguments.json is not None:
        write_rows(arguments.json, rows)
    return rows


def sort_rows(rows: Sequence[Row], study: Study) -> list[Row]:
    """In the order of the study, the original first."""
    order = [(scheme, method, tool) for scheme in study for method in study[scheme] for tool in study[scheme][method].split()]
    return sorted(rows, key=lambda row: order.index(key) if (key := (row.scheme, row.method, row.tool)) in order else -1)


def carry_out(job: dict[str, Any]) -> tuple[ModelHandle, dict[str, Any]]:
    """Run the steps of qtool's own job in its folder; gives the compressed model in float32, and what its result tells."""
    out = Path(job["out"])
    out.mkdir(parents=True, exist_ok=True)
    steps = [{"calibrate/text": job["text"]}, *job["steps"]]
    (out / "recipe.yaml").write_text(yaml.safe_dump({"model": job["model"], "pipeline": steps}, sort_keys=False))
    recipe = load(out / "recipe.yaml")
    results = run_recipe(recipe, out / "run", Silent(), fresh=True)
    _, changes = finished_run(out / "run")
    result = {
        "version": __version__,
        "bits_per_weight": results["model"]["bits_per_weight"],
        "seconds": sum(stage["seconds"] for stage in results["stages"][1:]),
        "peak_rss_gib": max(stage["peak_rss_gib"] for stage in results["stages"]),
        "note": f"{len(results['fallbacks'])} fallbacks",
    }
    return ModelHandle(recipe.model.model_copy(update={"dtype": "float32"}), changes), result
