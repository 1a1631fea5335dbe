"""`qtool plan`: tables for people, JSON for scripts, exit code 2 for a recipe that could not run."""

import json
from pathlib import Path

from typer.testing import CliRunner

from qtool.cli.main import app
from qtool.cli.plan import duration, size

RECIPE = "model: demo\npipeline:\n  - quantize/rtn: {scheme: w4a16g128}\n  - export/gptq: {}\n"


def plan(tmp_path: Path, text: str, *arguments: str) -> tuple[int, str, str]:
    (tmp_path / "recipe.yaml").write_text(text)
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "recipe.yaml"), *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_tables_name_modules_sizes_runtimes_and_costs(tmp_path: Path) -> None:
    code, out, _ = plan(tmp_path, RECIPE)
    assert code == 0
    for words in ("model.layers.{0-5}.self_attn.q_proj", "w4a16g128", "export/gptq", "serves it, run here", "does not: "):
        assert words in out
    assert not list(tmp_path.glob("runs")) and sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_json_has_units_in_its_names_and_nothing_else_on_stdout(tmp_path: Path) -> None:
    code, out, _ = plan(tmp_path, RECIPE, "--json")
    made = json.loads(out)
    totals = {"seconds", "peak_memory_bytes", "disk_bytes", "parameters_before", "parameters_after"}
    assert code == 0 and {"modules", "cache", "cache_bytes_per_token", "attention", "exports", "steps"} | totals == made.keys()
    (export,) = made["exports"]
    refused = {row["runtime"]: row["reason"] for row in export["runtimes"] if not row["serves"]}
    assert export["bytes"] > 6_000_000 and any(name.startswith("tensorrt-llm") for name in refused)


def test_a_recipe_that_could_not_run_is_refused(tmp_path: Path) -> None:
    code, _, error = plan(tmp_path, RECIPE.replace("g128", "g96"))
    assert code == 2 and "do not divide into groups of 96" in error


def test_sizes_and_durations_read_well() -> None:
    assert [size(2**20), size(3 * 2**30)] == ["1.0 MiB", "3.0 GiB"]
    assert [duration(90), duration(600), duration(10_000)] == ["90 s", "10 min", "3 h"]
