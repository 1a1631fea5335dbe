"""A package outside qtool's tree brings a method: pip installs it, the registry lists it, a recipe runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from qtool import registry
from qtool.cli.main import app

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


@pytest.fixture
def qtool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """A command of this process, which imported torch already, where recipes lie."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def plugged(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees the plugin as one that is installed."""
    monkeypatch.syspath_prepend(str(installed))


def test_an_installed_plugin_is_listed_with_its_summary(installed: Path, tmp_path: Path) -> None:
    search = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONWARNINGS": "default"}
    for arguments, words in (((), ["quantize/row_range"]), (("quantize/row_range",), ["candidates", "2210.17323"])):
        command = [sys.executable, "-m", "qtool.cli.main", "methods", *arguments]
        told = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert told.returncode == 0, told.stderr
        assert all(word in told.stdout for word in words)


@pytest.mark.usefixtures("plugged")
def test_a_recipe_runs_an_installed_plugin_and_its_error_is_measured(tmp_path: Path, qtool: Callable[..., Result]) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    done = qtool("run", "plugin.yaml", "--out", "out")
    assert done.exit_code == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["status"] == "done"
    perplexity = {metric["subject"]: metric["value"] for metric in results["metrics"] if metric["name"] == "perplexity"}
    assert perplexity["compressed"] != perplexity["original"]
    lines = {metric["subject"]: metric for metric in results["metrics"] if metric["name"] == "line_perplexity"}
    assert lines["original"]["value"] > 1 and lines["compressed"]["difference_stderr"] > 0  # paired without its doing
    assert results["gates"][0]["passed"] and results["gates"][0]["is_paired"]
    # 4 bits in groups of 32 cost far under a tenth of the perplexity; garbage would cost multiples of it.
    assert perplexity["compressed"] < 1.1 * perplexity["original"]


@pytest.mark.usefixtures("plugged")
def test_a_plugin_option_out_of_range_is_refused_like_a_built_in_one(tmp_path: Path, qtool: Callable[..., Result]) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE.replace("candidates: 3", "candidates: 0"))
    refused = qtool("validate", "plugin.yaml")
    assert refused.exit_code == 2
    assert "plugin.yaml:5" in refused.stderr and "candidates" in refused.stderr


@pytest.mark.usefixtures("plugged")
@pytest.mark.parametrize("key", ["quantize/row_range", "evaluate/line_perplexity"])
def test_the_laws_of_its_kind_hold_for_a_plugin(key: str) -> None:
    laws = registry.laws(key)
    assert laws
    for law in laws.values():
        law()


def test_without_the_package_there_is_no_such_method(tmp_path: Path, qtool: Callable[..., Result]) -> None:
    (tmp_path / "plugin.yaml").write_text(RECIPE)
    refused = qtool("validate", "plugin.yaml")
    assert refused.exit_code == 2
    assert "quantize/row_range" in refused.stderr
