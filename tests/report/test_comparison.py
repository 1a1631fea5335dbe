"""Comparing runs: what is refused, paired differences by hand, the Pareto front by its definition, the page in a browser."""

import copy
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from qtool.cli.main import app
from qtool.errors import QtoolError
from qtool.pipeline.run import run_recipe
from qtool.progress import Silent
from qtool.recipe import load
from qtool.report.comparison import choose_metric, compare_runs, read_runs, write_comparison

RECIPE = """\
model: {model}
pipeline:
  - quantize/rtn: {{scheme: {scheme}}}
  - evaluate/perplexity: {{source: demo:test, samples: 6, length: {length}}}
  - evaluate/kl_divergence: {{source: demo:test, samples: 6, length: {length}}}
"""
Rows = dict[str, dict[str, Any]]


@pytest.fixture
def finished(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """`finished("a", "w4a16g32")`: the folder of a finished run."""
    model = tiny_model("llama")

    def run(name: str, scheme: str, length: int = 16, of: Path = model) -> Path:
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(RECIPE.format(model=of, scheme=scheme, length=length))
        run_recipe(load(recipe), tmp_path / name, Silent())
        return tmp_path / name

    return run


def test_runs_stand_beside_each_other_with_paired_differences(
    finished: Callable[..., Path], tmp_path: Path, browser: Any
) -> None:
    folders = [finished(name, scheme) for name, scheme in (("w3", "w3a16g32"), ("w4", "w4a16g32"), ("w8", "w8a16g32"))]
    folders.append(finished("again", "w3a16g32"))
    runs = read_runs(folders)
    key = choose_metric(runs, None)
    assert key == ("kl_divergence", "demo:test")
    compared = compare_runs(runs, key)
    rows: Rows = {row["name"]: row for row in compared["runs"]}
    assert rows["w3"]["difference"] is None and rows["again"]["difference"] == 0
    parts = {}
    for folder in folders:
        for one in json.loads((folder / "paired.json").read_text()):
            if (one["name"], one["subject"]) == ("kl_divergence", "compressed"):
                parts[folder.name] = one["parts"]
    changes = [a - b for a, b in zip(parts["w4"], parts["w3"], strict=True)]
    assert len(changes) == 6
    # paired.json keeps eight digits of what results.json has in full.
    assert rows["w4"]["difference"] == pytest.approx(statistics.fmean(changes), rel=1e-5)
    assert rows["w4"]["difference_stderr"] == pytest.approx(statistics.stdev(changes) / math.sqrt(6), rel=1e-5)
    assert rows["w4"]["is_significant"] is True and rows["again"]["is_significant"] is False
    assert all("bits_per_weight" in row["front"] for row in rows.values())  # equals do not beat each other

    said = CliRunner().invoke(
        app, ["compare", *map(str, folders), "--html", str(tmp_path / "c.html"), "--json", str(tmp_path / "c.json")]
    )
    assert said.exit_code == 0, said.stderr
    assert "no significant difference" in said.stdout and "Δ from w3" in said.stdout
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(compared))
    browser.open(tmp_path / "c.html", 390, "dark")
    assert browser.value("[...document.querySelectorAll('figure')].map((f) => f.querySelectorAll('circle').length)") == [
        4,
        4,
        4,
    ]
    assert browser.value("document.documentElement.scrollWidth") <= 390 and browser.complaints == []


def test_what_measured_another_text_or_another_original_is_refused(
    finished: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    one, longer = finished("one", "w4a16g32"), finished("longer", "w4a16g32", length=24)
    elsewhere = finished("elsewhere", "w4a16g32", of=tiny_model("llama", seed=1, name="other"))
    larger = finished("larger", "w4a16g32", of=tiny_model("llama", num_hidden_layers=3, name="larger-model"))
    with pytest.raises(QtoolError) as refused:
        read_runs([one, longer, elsewhere, larger])
    text = str(refused.value)
    for name in ("longer", "elsewhere", "larger"):
        assert f"{name}: perplexity of the original on demo:test is " in text
    assert "larger: its original has" in text and "only runs of one model and the same evaluate steps" in text


def test_runs_that_measured_more_beside_the_same_are_compared_by_what_both_have(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = finished("one", "w4a16g32"), finished("two", "w8a16g32")
    assert choose_metric(read_runs([one, two]), None) == ("kl_divergence", "demo:test")
    recipe = yaml.safe_load((two / "recipe.yaml").read_text())
    loss, divergence = recipe["pipeline"][1:]
    more = {"evaluate/perplexity": {**loss["evaluate/perplexity"], "source": "demo:validation"}}
    recipe["pipeline"][2:] = [{"evaluate/kl_divergence": {**divergence["evaluate/kl_divergence"], "top_k": 7}}, more]
    (two / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert choose_metric(read_runs([one, two]), "perplexity") == ("perplexity", "demo:test")
    loss["evaluate/perplexity"]["stride"] = 4
    (two / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(QtoolError, match="two: evaluate/perplexity has other options in one: stride is None, here 4"):
        read_runs([one, two])


def with_costs(results: dict[str, Any], bits: float, loss: float) -> dict[str, Any]:
    """The results of a run of so many bits and such a KL divergence."""
    changed = copy.deepcopy(results)
    changed["model"]["bits_per_weight"] = bits
    for row in changed["metrics"]:
        if (row["name"], row["subject"]) == ("kl_divergence", "compressed"):
            row["value"] = loss
    return changed


def test_the_front_is_what_no_other_run_beats(finished: Callable[..., Path], tmp_path: Path) -> None:
    results = json.loads((finished("one", "w4a16g32") / "results.json").read_text())
    given = {"a": (2, 0.5), "b": (3, 0.2), "c": (3, 0.3), "d": (4, 0.2), "e": (5, 0.1), "f": (5, 0.1)}
    files = []
    for name, (bits, loss) in given.items():
        files.append(tmp_path / f"{name}.json")
        files[-1].write_text(json.dumps(with_costs(results, bits, loss)))
    compared = compare_runs(read_runs(files), ("kl_divergence", "demo:test"))
    front = [row["name"] for row in compared["runs"] if "bits_per_weight" in row["front"]]
    assert front == ["a", "b", "e", "f"]
    assert [row["difference_stderr"] for row in compared["runs"]] == [None] * 6  # no paired.json beside these files
    upward = compare_runs(read_runs(files), ("top1_agreement", "demo:test"))  # the same for all, so that fewer bits win
    assert [row["name"] for row in upward["runs"] if "bits_per_weight" in row["front"]] == ["a"]
    assert "ms_per_token" not in upward["costs"]
    for at, file in enumerate(files):  # as evaluate/generation measures it
        results = json.loads(file.read_text())
        speed = {"name": "tokens_per_second", "dataset": "demo:test", "subject": "compressed", "value": 10.0 * (at + 1)}
        file.write_text(json.dumps(results | {"metrics": [*results["metrics"], speed]}))
    fast = compare_runs(read_runs(files), ("kl_divergence", "demo:test"))
    assert [row["ms_per_token"] for row in fast["runs"]] == [1000 / (10 * n) for n in range(1, 7)]
    assert [row["name"] for row in fast["runs"] if "ms_per_token" in row["front"]] == ["f"]
    write_comparison(tmp_path / "c.html", compared)
    page = (tmp_path / "c.html").read_text()
    assert "filled: the Pareto front" in page
    spreads = [float(number) for number in re.findall(r'"spread":([\d.e-]+)', page)]
    t = 2.570582  # of Student's distribution of five degrees of freedom, for six windows
    assert spreads == pytest.approx(3 * [t * compared["runs"][0]["stderr"]] * 6, rel=1e-6)


def test_mistakes_are_told_together(finished: Callable[..., Path], tmp_path: Path) -> None:
    one = finished("one", "w4a16g32")
    (tmp_path / "odd.json").write_text('{"metrics": 3}')
    said = CliRunner().invoke(app, ["compare", str(one), str(tmp_path / "none"), str(tmp_path / "odd.json"), str(tmp_path)])
    assert said.exit_code == 2
    assert "none does not exist" in said.stderr and "odd.json is not what qtool run writes" in said.stderr
    assert f"{tmp_path} has no results.json" in said.stderr
    said = CliRunner().invoke(app, ["compare", str(one), str(one), "--metric", "perplexty"])
    assert said.exit_code == 2 and 'no "perplexty" in common; did you mean "perplexity"' in said.stderr
    assert CliRunner().invoke(app, ["compare", str(one)]).exit_code == 2
