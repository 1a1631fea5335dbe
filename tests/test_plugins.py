"""A package outside qtool's tree brings a method: pip installs it, the registry lists it, a recipe runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "plugin_package"
RECIPE = """\
model: demo
seed: 0
pipeline:
  - calibrate/text: {source: demo:calibration, samples: 2, length: 64}
  - quantize/row_range: {scheme: w4a16g32, candidates: 3}
  - evaluate/perplexity: {source: demo:test, samples: 2, length: 64}
  - evaluate/line_perplexity: {source: demo:test, samples: 3, length: 64}
gates:
  line_perplexity: {max_increase: 50%, significance: 1}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the plugin."""
    target = tmp_path_factory.mktemp("plugin")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, "--target", target, PACKAGE], check=True)
    return target


def run(plugin: Path, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of this environment that sees the plugin and else what this process sees."""
    search = [str(plugin), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONWARNINGS": "default"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment)


def qtool(plugin: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run(plugin, "-m", "qtool.cli.main", *arguments, cwd=cwd)


def test_an_installed_plugin_is_listed_with_its_summary(installed: Path, tmp_path: Path) -> None:
    listing = qtool(installed, "methods", cwd=tmp_path)
    assert listing.returncode == 0, listing.stderr
    assert "quantize/row_range" in listing.stdout
    described = qtool(installed, "methods", "quantize/row_range", cwd=tmp_path)
    assert described.returncode == 0, described.stderr
    assert "candidates" in described.stdout and "2210.17323" in described.stdout


def test_a_recipe_runs_an_installed_plugin_and_its_error_is_measured(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    done = qtool(installed, "run", "plugin.yaml", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["status"] == "done"
    perplexity = {metric["subject"]: metric["value"] for metric in results["metrics"] if metric["name"] == "perplexity"}
    assert perplexity["compressed"] != perplexity["original"]
    lines = {metric["subject"]: metric for metric in results["metrics"] if metric["name"] == "line_perplexity"}
    assert lines["original"]["value"] > 1 and lines["compressed"]["difference_stderr"] > 0  # paired without its doing
    assert results["gates"][0]["passed"] and results["gates"][0]["is_paired"]
    # 4 bits in groups of 32 cost far under a tenth of the perplexity; garbage would cost multiples of it.
    assert perplexity["compressed"] < 1.1 * perplexity["original"]


def test_a_plugin_option_out_of_range_is_refused_like_a_built_in_one(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE.replace("candidates: 3", "candidates: 0"))
    refused = qtool(installed, "validate", "plugin.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "plugin.yaml:5" in refused.stderr and "candidates" in refused.stderr


def test_the_laws_of_its_kind_hold_for_a_plugin(installed: Path, tmp_path: Path) -> None:
    code = (
        "from qtool import registry\n"
        "for key in ('quantize/row_range', 'evaluate/line_perplexity'):\n"
        "    for law in registry.laws(key).values(): law()\nprint('held')"
    )
    laws = run(installed, "-c", code, cwd=tmp_path)
    assert laws.stdout == "held\n", laws.stderr


def test_without_the_package_there_is_no_such_method(tmp_path: Path) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    refused = qtool(tmp_path, "validate", "plugin.yaml", cwd=tmp_path)
    assert refused.returncode == 2
    assert "quantize/row_range" in refused.stderr
