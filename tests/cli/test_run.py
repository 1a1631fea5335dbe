"""qtool as a real process: exit codes, streams, going on after Ctrl-C; and eval and export of a finished run."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from qtool.calibration.tokens import TextOptions, read_tokens
from qtool.cli.main import app

RECIPE = """\
model: demo
pipeline:
  - calibrate/text: {source: demo:calibration, samples: 8, length: 64}
  - quantize/gptq: {scheme: w4a16g128}
  - evaluate/perplexity: {source: demo:test, samples: 2, length: 64}
  - export/safetensors: {}
gates:
  perplexity: {max_increase: 90%}
"""


# A shell that starts its jobs in the background lets them ignore Ctrl-C, and they hand that on to their children.
LISTENING = (
    "import runpy, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "runpy.run_module('qtool', run_name='__main__', alter_sys=True)"
)


def call(cwd: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    done = subprocess.run([sys.executable, "-m", "qtool", *arguments], cwd=cwd, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `qtool run r.yaml --out out` has been interrupted in its quantize step, and then went on to the end."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "r.yaml").write_text(RECIPE)
    command = [sys.executable, "-c", LISTENING, "run", "r.yaml", "--out", "out"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("quantize/gptq"):
            process.send_signal(signal.SIGINT)
            break
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (130, "interrupted; the same command goes on from here")
    assert not (folder / "out" / "results.json").exists()
    code, out, err = call(folder, "run", "r.yaml", "--out", "out", "--json")
    assert code == 0, err
    (folder / "stdout.json").write_text(out)
    return folder


@pytest.mark.parametrize("arguments", [("--help",), ("methods",), ("run", "--help"), ("init", "--help")])
def test_help_and_lists_do_not_import_torch(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom qtool.cli.main import app\n"
        f"app({list(arguments)!r}, standalone_mode=False)\n"
        "print('torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout and done.stderr == "False False\n"


def test_an_interrupted_run_exits_130_and_the_same_command_ends_it_with_json_alone_on_stdout(folder: Path) -> None:
    results = json.loads((folder / "out" / "results.json").read_text())
    assert results["status"] == "done"
    assert json.loads((folder / "stdout.json").read_text()) == results
    assert (folder / "out" / "exports" / "safetensors" / "model.safetensors").is_file()


def test_a_failed_gate_exits_3_and_names_the_gate(folder: Path) -> None:
    (folder / "strict.yaml").write_text("extends: r.yaml\ngates:\n  perplexity: {max: 1}\n")
    code, out, err = call(folder, "run", "strict.yaml", "--device", "cpu")
    assert code == 3, err
    assert "gate  FAILED  perplexity max: 1" in out and "bits per weight" in out and "\x1b" not in out
    assert json.loads((folder / "runs" / "strict" / "results.json").read_text())["status"] == "gate-failed"


def test_a_failed_gate_leaves_junit_markdown_and_annotations(folder: Path) -> None:
    baseline = {"results": str(folder / "out" / "results.json"), "max_increase": "0%"}
    (folder / "keeps.yaml").write_text(
        f"extends: r.yaml\ngates:\n  perplexity: {{significance: 2, max: 1, baseline: {json.dumps(baseline)}}}\n"
    )
    wanted = ("--junit", "ci/junit.xml", "--markdown", "ci/summary.md", "--github", "--json")
    code, out, err = call(folder, "run", "keeps.yaml", *wanted)
    assert code == 3, err
    gates = json.loads(out)["gates"]
    kept = [gate["passed"] for gate in gates if gate["limit"] == "max_increase: 0%"]
    assert kept == [True, True]  # the compressed model and the export are those of the stored run
    failures = ElementTree.parse(folder / "ci" / "junit.xml").getroot().findall(".//failure")
    assert len(failures) == sum(not gate["passed"] for gate in gates) == 2
    assert "2 of 4 gates failed" in (folder / "ci" / "summary.md").read_text()
    assert sum(line.startswith("::error title=gate perplexity max%3A 1.0") for line in err.splitlines()) == 2


# ---- inside this process, which has imported torch already ----


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_finished_run_is_shown_again_without_doing_anything_twice(folder: Path) -> None:
    shown = invoke("run", folder / "r.yaml", "--out", folder / "out")
    assert shown.exit_code == 0
    assert "gate  passed" in shown.stdout and "quantize/gptq: " not in shown.stdout


def test_another_recipe_in_the_same_folder_exits_2(folder: Path) -> None:
    refused = invoke("run", folder / "r.yaml", "--out", folder / "out", "--set", "seed=5")
    assert refused.exit_code == 2
    assert "holds a run with another recipe" in refused.stderr and "--fresh" in refused.stderr


def test_eval_measures_a_run_by_its_own_steps_and_by_stated_ones(folder: Path) -> None:
    measured = invoke("eval", folder / "out", "--json")
    assert measured.exit_code == 0, measured.stderr
    recorded = json.loads((folder / "out" / "results.json").read_text())["metrics"]
    for row in json.loads(measured.stdout)["metrics"]:
        (same,) = [r for r in recorded if (r["name"], r["subject"]) == (row["name"], row["subject"])]
        # The same protocol on the same weights: only the order of float32 sums may differ.
        assert row["value"] == pytest.approx(same["value"], rel=1e-5)
    windows = ("--length", "32", "--samples", "2")
    measured = invoke("eval", folder / "out", "--source", "demo:validation", *windows)
    assert measured.exit_code == 0, measured.stderr
    assert "demo:validation" in measured.stdout and "compressed" in measured.stdout


def test_eval_on_the_cpus_products_is_near_the_reference_and_says_what_ran(folder: Path) -> None:
    measured = invoke("eval", folder / "out", "--json", "--runtime", "cpu")
    assert measured.exit_code == 0, measured.stderr
    results = json.loads(measured.stdout)
    recorded = json.loads((folder / "out" / "results.json").read_text())["metrics"]
    for name in ("original", "compressed"):
        (row, same) = (
            next(r["value"] for r in rows if (r["name"], r["subject"]) == ("perplexity", name))
            for rows in (results["metrics"], recorded)
        )
        assert row == pytest.approx(same, rel=1e-5 if name == "original" else 1e-2)  # bfloat16, in another order
    assert results["runtime"] == ["42 of 42 linears: torch int4"]
    refused = invoke("eval", "demo", "--source", "demo:test", "--samples", "2", "--runtime", "cpu")
    assert refused.exit_code == 2 and "demo on cpu: no linear has a fast product" in refused.stderr


def test_eval_checks_every_step_before_it_measures() -> None:
    refused = invoke("eval", "demo", "--source", "demo:test", "--length", "600", "--tasks", "demo_cloze")
    assert refused.exit_code == 2
    assert "evaluate/perplexity: length 600 is more than the model's 512 positions" in refused.stderr
    assert "evaluate/" not in refused.stdout  # no stage began


def test_export_writes_another_format_of_a_finished_run(folder: Path) -> None:
    written = invoke("export", folder / "out", "--format", "compressed_tensors", "--out", folder / "packed")
    assert written.exit_code == 0, written.stderr
    assert "exactly the run's weights" in written.stdout
    assert (folder / "packed" / "config.json").is_file()


def test_eval_measures_what_transformers_loads_and_qtool_does_not_read(folder: Path, tmp_path: Path) -> None:
    """An export told to round its linears' outputs too: compressed-tensors does so, qtool reads no such scheme."""
    written = invoke("export", folder / "out", "--format", "compressed_tensors", "--out", tmp_path / "other")
    assert written.exit_code == 0, written.stderr
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    outputs = {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    config["quantization_config"]["config_groups"]["group_0"]["output_activations"] = outputs
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    windows = ("--source", "demo:test", "--length", "32", "--samples", "2")
    measured = invoke("eval", tmp_path / "other", *windows, "--json", "--out", tmp_path / "measured")
    assert measured.exit_code == 0, measured.stderr
    results = json.loads(measured.stdout)
    (fallback,) = results["fallbacks"]
    assert "(output_activations) cannot be read" in fallback and "transformers loads the whole model" in fallback
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokens = read_tokens(TextOptions(source="demo:test", length=32, samples=2, shuffle=False), tokenizer, 0)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "other")(tokens).logits[:, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert results["metrics"][0]["value"] == pytest.approx(float(loss.exp()), rel=1e-3)  # bfloat16, in batches of other shapes
    assert json.loads((tmp_path / "measured" / "results.json").read_text()) == results
    assert (tmp_path / "measured" / "report.html").is_file() and (tmp_path / "measured" / "paired.json").is_file()
    of_a_run = json.loads((folder / "out" / "results.json").read_text())
    assert set(results) - {"runtime"} == set(of_a_run)  # so that what reads one reads the other


def test_eval_measures_a_checkpoint_against_what_it_was_made_from_and_compares_it(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "out" / "exports" / "safetensors"
    windows = ("--source", "demo:test", "--length", "32", "--samples", "3")
    measured = invoke("eval", checkpoint, "--original", "demo", *windows, "--out", tmp_path / "one")
    assert measured.exit_code == 0, measured.stderr
    of_the_run = invoke("eval", folder / "out", *windows, "--json")
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    rows = {(row["name"], row["subject"]): row for row in results["metrics"]}
    for row in json.loads(of_the_run.stdout)["metrics"]:  # the export holds the run's very weights
        same = rows[row["name"], row["subject"]]
        assert same["value"] == pytest.approx(row["value"], rel=1e-5)
        assert same["difference"] == (None if row["difference"] is None else pytest.approx(row["difference"], rel=1e-3))
    assert rows["kl_divergence", "original"]["value"] == 0 < rows["kl_divergence", "compressed"]["value"]
    again = invoke("eval", "demo", "--original", "demo", *windows, "--out", tmp_path / "same")
    assert again.exit_code == 0, again.stderr
    compared = invoke("compare", tmp_path / "one", tmp_path / "same")
    assert compared.exit_code == 0, compared.stderr
    assert "Δ from one" in compared.stdout and "kl_divergence" in compared.stdout
    for arguments, says in (
        ((folder / "out", "--original", "demo"), "is a run, and is measured against the original of its recipe"),
        ((checkpoint, "--original", "nowhere/at-all.gguf", *windows), "nowhere"),
        (("demo", *windows, "--out", folder / "out"), "is a run's folder, whose results would be lost"),
    ):
        refused = invoke("eval", *arguments)
        assert refused.exit_code == 2 and says in refused.stderr, refused.stderr
