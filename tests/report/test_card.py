"""Model cards: what was measured stands in them, and they belong to what qtool verify looks at."""

import shutil
from pathlib import Path

import pytest
import yaml

from qtool.artifact import changed_files, read_manifest
from qtool.pipeline.run import export_run, run_recipe
from qtool.progress import Silent
from qtool.recipe import parse
from qtool.report.card import licence_of

RECIPE = """
model: {model}
pipeline:
  - quantize/rtn: {{scheme: w4a16g32}}
  - evaluate/perplexity: {{source: demo:test, samples: 2, length: 32}}
  - export/safetensors: {{}}
"""
DEMO = Path(__file__).parents[2] / "qtool" / "assets" / "demo" / "model"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a copy of the demo model that has a card and a licence of its own."""
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(DEMO, folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# A model\n")
    (folder / "model" / "LICENSE").write_text("Apache License\n")
    run_recipe(parse(RECIPE.format(model=folder / "model"), "recipe"), folder / "run", Silent())
    return folder / "run"


def test_the_card_tells_what_was_measured_of_the_original_and_of_the_exports_own_bytes(run: Path) -> None:
    front, _, text = (run / "exports/safetensors/README.md").read_text().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["license"] == "apache-2.0"
    assert yaml.safe_load(front)["tags"] == ["qtool", "quantized", "safetensors"]
    assert "| metric | original | compressed | this export |" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| perplexity (")]
    original, compressed, export = (cell.split(" ±")[0].strip() for cell in row.split("|")[2:5])
    assert float(original) > 1 and compressed == export != original
    assert (
        yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])["pipeline"][0]["quantize/rtn"]["scheme"]["weights"]["bits"]
        == 4
    )


def test_card_and_licence_are_in_the_manifest(run: Path) -> None:
    manifest = read_manifest(run / "exports/safetensors")
    assert {"README.md", "LICENSE", "model.safetensors"} <= manifest.keys()
    assert changed_files(run / "exports/safetensors", manifest) == {}


def test_one_more_export_of_a_finished_run_has_a_card_too(run: Path, tmp_path: Path) -> None:
    export_run(run, "export/gguf", tmp_path / "gguf", Silent())
    text = (tmp_path / "gguf/README.md").read_text()
    assert "| metric | original | compressed |\n" in text
    assert "README.md" in read_manifest(tmp_path / "gguf")


@pytest.mark.parametrize("text", ["", "# A model\n", "---\n: [\n---\n", "---\nlanguage: en\n---\n", "---\n- a\n---\n"])
def test_a_card_that_states_no_licence_gives_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == {}
