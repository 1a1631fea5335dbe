"""The main path: one recipe, carried out step by step, each step kept so that a killed run goes on.

calibrate -> transform -> search -> quantize / prune / factorize / distill -> evaluate -> export -> evaluate exports' own
bytes -> gates
"""

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from qtool.artifact import Artifact, changed_files, write_manifest
from qtool.calibration.preservation import write_preservation
from qtool.calibration.tokens import PreservationPool, digest_tokens
from qtool.errors import QtoolError, nearest
from qtool.formats.allocation import SearchOptions
from qtool.formats.scheme import Scheme, SchemeSelection
from qtool.model.acceleration import Acceleration, device_of_runtime
from qtool.model.handle import ModelHandle
from qtool.model.kept import kept_results
from qtool.model.store import LOW_RANK, write_text
from qtool.model.submodels import cutter_of
from qtool.options import ModelOptions, Submodels, TrainingOptions
from qtool.pipeline.blockwise import run_blockwise
from qtool.pipeline.checks import check_additions, check_cache, check_recipe, check_rounding, check_step, located
from qtool.pipeline.distributions import measure_distributions
from qtool.pipeline.folder import RecordedProgress, RunFolder, StepFolder
from qtool.pipeline.measuring import Measurement, as_results, joined, measure, of_subject, with_preservation, write_beside
from qtool.pipeline.ranks import Ranks, together
from qtool.pipeline.rotation import run_rotation
from qtool.pipeline.search import found_schemes, run_search
from qtool.pipeline.shaping import run_shaping, write_cut
from qtool.pipeline.training import run_training
from qtool.progress import Progress, Silent
from qtool.recipe import CHANGING, Recipe, Step, load
from qtool.report.card import write_card
from qtool.report.gates import check_gates
from qtool.report.html import write_report
from qtool.report.results import SCHEMA, export_row, versions


def run_recipe(recipe: Recipe, out: Path, progress: Progress, fresh: bool = False) -> dict[str, Any]:
    """Carry out a recipe in the folder `out`; returns what results.json holds.

    Of processes that torchrun started all train, and measure what is shared; the first does all the rest.
    """
    original = check_recipe(recipe)
    original.kept = kept_results()
    folder = RunFolder(out)
    with together() as ranks:
        if ranks.is_first:
            folder.open({"recipe": recipe.work_digest, "model": digest_model(original)}, fresh)
            write_text(out / "recipe.yaml", recipe.to_yaml())
            folder.event("begun", steps=[step.key for step in recipe.steps])
        ranks.wait()
        try:
            run = Run(recipe, folder, original, RecordedProgress(folder, progress) if ranks.is_first else Silent(), ranks)
            for index, step in enumerate(recipe.steps):
                run.carry_out(index, step)
            for row in run.exports:
                run.evaluate_export(row)
            if ranks.is_first:
                run.measure_distributions()
                results = run.finish()
        except BaseException as error:
            with contextlib.suppress(OSError):  # such as the full disk that stopped it
                if ranks.is_first:
                    folder.event("stopped", why=str(error) or type(error).__name__)
            raise
        finally:
            folder.close()
        ranks.wait()
    return results if ranks.is_first else dict(json.loads((out / "results.json").read_text(encoding="utf-8")))


class Run:
    """What the steps of one run share: the tokens, the folders with changes, and what was measured."""

    def __init__(self, recipe: Recipe, folder: RunFolder, original: ModelHandle, progress: Progress, ranks: Ranks) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.folder = folder
        self.original = original
        self.progress = progress
        self.tokens: Tensor | None = None
        self.changes: tuple[Path, ...] = ()
        self.measured: dict[str, Measurement] = {}  # by step and, of an export, its format; in the order of the run
        self.stages: list[dict[str, Any]] = []
        self.linears: dict[str, dict[str, Any]] = {}
        self.searches: list[dict[str, Any]] = []
        self.exports: list[dict[str, Any]] = []
        self.fallbacks: list[str] = []
        self.distributions: list[dict[str, Any]] = []
        self._compressed = original
        self._unquantized = original  # as the model was before the latest quantize steps that follow one another
        self._unrounded: ModelHandle | None = None  # as the model was before the first quantize step
        self._schemes: dict[str, Scheme] = {}  # of every linear, as the latest search found them
        self._changed: str | None = None  # kind of the latest step that changed the model

    def carry_out(self, index: int, step: Step) -> None:
        """Do one step, or take up what it recorded when it was done before."""
        state = StepFolder(self.folder, index, step.key)
        result = self._recorded(step, state) if self.ranks.is_first else None
        is_done = self.ranks.agree(result is not None)
        if self.ranks.is_first:
            self.folder.event("step", key=step.key, done_before=is_done)
        if step.method.kind in CHANGING:
            if step.method.kind == "quantize" and self._changed != "quantize":
                self._unquantized = self._compressed
                self._unrounded = self._unrounded or self._compressed
            self._changed = step.method.kind
            self.changes = (*self.changes, state.path)
            self._compressed = ModelHandle(self.recipe.model, self.changes)
        is_shared = step.method.is_shared or step.method.kind == "calibrate" or step.method.scope in ("training", "course")
        if (not is_done and (is_shared or self.ranks.is_first)) or step.method.kind == "calibrate":
            with located(step), Stage(step.key) as stage:
                result = self._work(step, state)
            result["stage"] = stage.facts | result.get("learned", {})
            if self.ranks.is_first:
                if step.method.kind != "calibrate":
                    state.finish(result)
                self.folder.event("step_done", key=step.key, **stage.facts)
        self.ranks.wait()
        result = state.result() if result is None else result
        assert result is not None, f"{step.key}: the first process has finished it"
        if step.method.scope == "shape" and not is_done:
            self._compressed = ModelHandle(self.recipe.model, self.changes)  # of other sizes, now that the step is done
        self.stages.append(result["stage"])
        if step.method.kind == "evaluate":
            self.measured[state.path.name] = result
        self.fallbacks += [f"{step.key}: {text}" for text in result.get("fallbacks", [])]
        for linear in result.get("linears", []):
            self.linears[linear["name"]] = {**self.linears.get(linear["name"], {}), **linear}
        if isinstance(step.options, SearchOptions):
            self.searches.append(result["search"])
            self._schemes = found_schemes(step.options, result["search"])
        self.exports += result.get("exports", [])
        for text in result.get("fallbacks", []):
            self.progress.note(f"{step.key}: {text}")

    def _recorded(self, step: Step, state: StepFolder) -> dict[str, Any] | None:
        """What the step recorded when it was done; None where it is not, or where its export is not as it was written."""
        result = state.result()
        for row in (result or {}).get("exports", []):
            if changed_files(self.folder.path / row["path"], row["sha256"]):
                self.progress.note(f"{step.key}: {row['path']} is not as it was written; it is written again")
                return None
        return result

    def _work(self, step: Step, state: StepFolder) -> dict[str, Any]:
        """One step's own work, by kind."""
        method, options = step.method, step.options
        if method.kind == "calibrate":
            self.progress.stage(step.key, 1)
            self.tokens = method.run(self.original, options, self.recipe.seed)
            if self.ranks.is_first:
                self.folder.record({"text": digest_tokens(self.tokens)})
                if isinstance(options, PreservationPool):
                    write_preservation(self.folder.path, self.tokens[options.places()], self.original.tokenizer)
            self.progress.advance(f"{len(self.tokens)} windows of {self.tokens.shape[1]} tokens")
            return {}
        if isinstance(options, SchemeSelection) and options.scheme == "search":
            options = options.model_copy(update={"modules": {**options.modules, **self._schemes}})
        if method.scope in ("training", "course"):
            assert self.tokens is not None, "the recipe check asks for a calibrate step before training"
            assert isinstance(options, TrainingOptions), f"{step.key}: options of scope {method.scope} are TrainingOptions"
            model, seed = self._compressed, self.recipe.seed
            return run_training(model, self.original, method, options, self.tokens, seed, state, self.progress)
        if method.scope == "shape":
            assert self.tokens is not None, "the recipe check asks for a calibrate step before what needs inputs"
            return run_shaping(self._compressed, method, options, self.tokens, self.recipe.seed, state, self.progress)
        if method.kind == "search":
            assert self.tokens is not None, "the recipe check asks for a calibrate step before search"
            assert isinstance(options, SearchOptions), f"{step.key}: options of a search are SearchOptions"
            return run_search(self._compressed, method, options, self.tokens, self.recipe.seed, state, self.progress)
        if method.kind in CHANGING:
            if (method.kind, method.scope) == ("transform", "model"):
                return run_rotation(self._compressed, method, options, self.tokens, self.recipe.seed, state, self.progress)
            unquantized = self._unquantized if method.kind == "factorize" else None
            return run_blockwise(
                self._compressed, method, options, self.tokens, self.recipe.seed, state, self.progress, unquantized
            )
        if method.kind == "evaluate":
            step = with_preservation(step, self.folder.path)
            subjects = [("original", self.original)]
            if self._compressed is not self.original:
                subjects.append(("compressed", self._compressed))
            self.progress.stage(step.key, len(subjects))
            found: list[Measurement] = []
            for name, model in subjects:
                found.append(measure(step, name, model, self.original, self.recipe.seed, found[0] if found else None))
                self.progress.advance(name)
            tell_of_kept(self.original, self.progress)
            return joined(found)
        return {"exports": [self._export(step)]}

    def _export(self, step: Step) -> dict[str, Any]:
        name = step.key.split("/")[1]
        self.progress.stage(step.key, 1)
        artifact = write_export(self._compressed, step, self.folder.path / "exports" / name)
        self.progress.advance(str(artifact.path))
        return export_row(artifact, f"exports/{name}")

    def evaluate_export(self, row: dict[str, Any]) -> None:
        """Run every evaluate step on an export's own bytes, read back from disk; what was measured counts for those bytes."""
        subject = f"export:{row['format']}"
        path = self.folder.path / row["path"]
        options = self.recipe.model.model_copy(update={"path": str(path), "revision": None})
        for index, step in enumerate(self.recipe.steps):
            if step.method.kind != "evaluate":
                continue
            state = StepFolder(self.folder, index, f"{step.key}@{row['format']}")
            result = state.result()
            is_done = self.ranks.agree(result is not None and result.get("sha256") == row["sha256"])
            if not is_done and (self.ranks.is_first or step.method.is_shared):
                self.progress.stage(f"{step.key} of {subject}", 1)
                with located(step), Stage(f"{step.key} of {subject}") as stage:
                    before = of_subject(self.measured[StepFolder(self.folder, index, step.key).path.name], "original")
                    told = with_preservation(step, self.folder.path)
                    result = measure(told, subject, ModelHandle(options), self.original, self.recipe.seed, before)
                    self.progress.advance(subject)
                result |= {"stage": stage.facts, "sha256": row["sha256"]}
                if self.ranks.is_first:
                    state.finish(result)
            if self.ranks.is_first:
                assert result is not None, "the first process measures what is not recorded"
                self.measured[state.path.name] = result
                self.stages.append(result["stage"])

    def measure_distributions(self) -> None:
        """What the report plots of weights and inputs, into distributions.json; nothing of a run that changes no model."""
        if self._compressed is self.original:
            return
        state = StepFolder(self.folder, len(self.recipe.steps), "report/distributions")
        result = state.result()
        if result is None:
            with Stage("distributions") as stage:
                unrounded = self._unrounded or self._compressed
                found = measure_distributions(self.original, unrounded, self._compressed, self.tokens, self.progress)
            result = {"linears": found, "stage": stage.facts}
            state.finish(result)
        self.stages.append(result["stage"])
        self.distributions = result["linears"]

    def finish(self) -> dict[str, Any]:
        """Check the gates; write results.json with what stands beside it, and report.html."""
        found = as_results(self.measured)
        gates = check_gates(self.recipe.gates, joined(list(self.measured.values()))["metrics"])
        results = {
            "schema": SCHEMA,
            "status": "done" if all(gate["passed"] for gate in gates) else "gate-failed",
            "digest": self.recipe.digest,
            **found,
            "model": {
                "path": self.recipe.model.path,
                "revision": self.original.revision,
                **describe_model(self.original, self._compressed),
            },
            "blocks": [{"scheme": None, **linear} for linear in self.linears.values()],
            "searches": self.searches,
            "stages": self.stages,
            "exports": self.exports,
            "gates": gates,
            "fallbacks": self.fallbacks,
            "versions": versions(),
        }
        for row in self.exports:
            write_card(self.folder.path / row["path"], self.recipe, self.original.folder, results, row)
        write_beside(self.folder.path, self.measured)
        write_text(self.folder.path / "results.json", json.dumps(results, indent=1) + "\n")
        if self.distributions:
            plotted = {"schema": SCHEMA, "linears": self.distributions}
            write_text(self.folder.path / "distributions.json", json.dumps(plotted, separators=(",", ":")) + "\n")
        write_report(self.folder.path / "report.html", results, self.recipe.to_yaml(), self.distributions)
        self.folder.event("finished", status=results["status"])
        return results


def write_export(model: ModelHandle, step: Step, out: Path) -> Artifact:
    """Export into a temporary folder, then give it its name: an interrupted export leaves nothing that looks finished."""
    check_additions(step, model)
    check_cache(step, model)
    check_rounding(step, model)
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        artifact = step.method.export(model, temporary, step.options)
        write_manifest(temporary, artifact.sha256)
        if out.exists():
            shutil.rmtree(out)
        temporary.replace(out)
    except OSError as error:
        raise QtoolError(f"{step.key}: cannot write {out}: {error.strerror}; free space or choose another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Artifact(artifact.format, out, artifact.bytes, artifact.lossless, artifact.sha256)


def evaluate_target(
    target: str,
    steps: Sequence[Step],
    progress: Progress,
    device: str = "auto",
    allow_pickle: bool = False,
    runtime: str = "reference",
    out: Path | None = None,
    beside: str | None = None,
) -> dict[str, Any]:
    """Measure a run's compressed model against its original, or a checkpoint; checks all steps before the first.

    beside: the original that a checkpoint was made from, by path or hub id, to measure it against; null: it is measured alone
    runtime: cpu or cuda, on whose fast products quantized linears run; reference: as in a run.
    Returns what results.json of a run holds, and writes it with its report into `out`, where that is given. Processes that
    torchrun started measure together what is shared; the first does the rest, and alone has results and writes them.
    """
    with together() as ranks:
        progress = progress if ranks.is_first else Silent()
        return _evaluate_target(target, steps, progress, device, allow_pickle, runtime, out, beside, ranks)


def _evaluate_target(
    target: str,
    steps: Sequence[Step],
    progress: Progress,
    device: str,
    allow_pickle: bool,
    runtime: str,
    out: Path | None,
    beside: str | None,
    ranks: Ranks,
) -> dict[str, Any]:
    if out is not None and (out / "state").is_dir():
        raise QtoolError(f"--out: {out} is a run's folder, whose results would be lost; choose another one")
    path, notes = Path(target), list[str]()
    acceleration = None if runtime == "reference" else Acceleration()
    device = device if acceleration is None else device_of_runtime(runtime, device)
    if (path / "state").is_dir():
        recipe, changes = finished_run(path)
        steps = [with_preservation(step, path) for step in steps]
        original = ModelHandle(recipe.model.model_copy(update={"device": device}))
        subjects = [("original", original), ("compressed", ModelHandle(original.options, changes, acceleration))]
        seed = recipe.seed
        facts = describe_model(original, subjects[1][1])
    else:
        options = ModelOptions(path=target, device=device, allow_pickle=allow_pickle)
        original = checkpoint = ModelHandle(options, acceleration=acceleration)
        subjects, seed = [("original", original)], 0
        facts = describe_checkpoint(checkpoint)
        if beside is not None:
            original = ModelHandle(options.model_copy(update={"path": beside}))
            if original.tokenizer.get_vocab() != checkpoint.tokenizer.get_vocab():
                raise QtoolError(f"--original: {beside} has another tokenizer than {target}; measure each alone")
            subjects = [("original", original), ("compressed", checkpoint)]
            before = describe_checkpoint(original)
            facts |= {"parameters": before["parameters"], "parameters_compressed": facts["parameters"]}
            facts |= {"bytes_original": before["bytes_original"]}
        for _, model in subjects:
            try:
                model.schemes()
            except QtoolError as error:  # a layout, or a part of one, that qtool does not read
                notes.append(f"{error}; transformers loads the whole model instead")
                progress.note(notes[-1])
                model.load_by_transformers(str(error))
    for step in steps:
        check_step(step, original)
        if beside is not None:
            check_step(step, subjects[-1][1])
    if acceleration is not None:  # one block tells whether there is anything to measure
        subjects[-1][1].block(0)
        subjects[-1][1].release(0)
        acceleration.require(f"{target} on {device}")
    elif not notes:  # other products, and other tools' quantizers, give other bits than those that are kept
        original.kept = kept_results()
    measured: dict[str, Measurement] = {}
    stages = []
    for index, step in enumerate(steps):
        if not (ranks.is_first or step.method.is_shared):
            continue
        progress.stage(step.key, len(subjects))
        found: list[Measurement] = []
        with Stage(step.key) as stage:
            for name, model in subjects:
                found.append(measure(step, name, model, original, seed, found[0] if found else None))
                progress.advance(name)
        tell_of_kept(original, progress)
        stages.append(stage.facts)
        measured[f"{index:02d}-{step.key.replace('/', '-')}"] = joined(found)
    pipeline = [{step.key: step.options.model_dump(mode="json")} for step in steps]
    results = {
        "schema": SCHEMA,
        "status": "done",
        "digest": hashlib.sha256(json.dumps(pipeline).encode()).hexdigest(),
        **as_results(measured),
        "model": {"path": target, "revision": original.revision, **facts},
        **{name: [] for name in ("blocks", "searches", "exports", "gates")},
        "stages": stages,
        "fallbacks": notes,
        "runtime": [] if acceleration is None else acceleration.lines(),
        "versions": versions(),
    }
    if out is not None and ranks.is_first:
        write_beside(out, measured)
        write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
        asked = yaml.safe_dump({"model": target, "pipeline": pipeline}, sort_keys=False, allow_unicode=True)
        write_report(out / "report.html", results, asked)
    return results


def describe_checkpoint(model: ModelHandle) -> dict[str, Any]:
    """As `describe_model`, of a checkpoint that any tool wrote: bytes of its files, and bits for each of all parameters."""
    size = sum(path.stat().st_size for path in model.checkpoint.files)
    n_parameters = model.n_parameters()
    return {
        "parameters": n_parameters,
        "bytes_original": size,
        "bytes_compressed": size,
        "bits_per_weight": 8 * size / n_parameters,
        "cache": None,
        "attention": None,
    }


def tell_of_kept(original: ModelHandle, progress: Progress) -> None:
    """Note what happened to the results that are kept of the original."""
    while original.kept is not None and original.kept.notes:
        progress.note(original.kept.notes.pop(0))


def export_run(run: Path, key: str, out: Path | None, progress: Progress, submodel: str | None = None) -> Artifact:
    """Write one more export of a finished run; key is `export/<format>` or the format alone.

    submodel: the name of one that the run's last step with sub-models trained; the export is of that, as the step left it.
    """
    from qtool import registry

    key = key if key.startswith("export/") else f"export/{key}"
    valid = [name for name in registry.list_methods() if name.startswith("export/")]
    if key not in valid:
        raise QtoolError(f'--format: there is no "{key.removeprefix("export/")}"{nearest(key, valid)}')
    recipe, changes = finished_run(run)
    method = registry.load(key)
    step = Step(key=key, method=method, options=method.options(), where="qtool export")
    format = key.removeprefix("export/")
    out = out or run / "exports" / (format if submodel is None else f"{format}-{submodel}")
    original = ModelHandle(recipe.model)
    with contextlib.ExitStack() as stack:
        if submodel is not None:
            cut = out.with_name(f".{out.name}.cut")
            stack.callback(shutil.rmtree, cut, ignore_errors=True)
            changes = (*cut_submodel(recipe, changes, submodel, cut), cut)
        model = ModelHandle(recipe.model, changes)
        check_step(step, model)
        progress.stage(key, 1)
        artifact = write_export(model, step, out)
        if submodel is None and (run / "results.json").is_file():
            results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        else:  # a sub-model, or the run has not come to its end: nothing is measured
            about = {"revision": original.revision, **describe_model(original, model)}
            results = {"metrics": [], "model": about, "versions": versions()}
    row = {**export_row(artifact, str(artifact.path)), "submodel": submodel}
    write_card(artifact.path, recipe, original.folder, results, row)
    progress.advance(str(artifact.path))
    return artifact


def cut_submodel(recipe: Recipe, changes: tuple[Path, ...], name: str, out: Path) -> tuple[Path, ...]:
    """Write a sub-model's units and config into the folder `out`; returns the changes that it was cut from."""
    changing = [step for step in recipe.steps if step.method.kind in CHANGING]
    last = max((place for place, step in enumerate(changing) if isinstance(step.options, Submodels)), default=None)
    if last is None:
        raise QtoolError("--submodel: the run trains no sub-models; put distill/sortednet into its recipe, or leave it away")
    options = changing[last].options
    assert isinstance(options, Submodels), "so the last such step was found"
    if name not in options.submodels:
        raise QtoolError(f'--submodel: {changing[last].key} has none named "{name}"{nearest(name, options.submodels)}')
    before = changes[: last + 1]
    shutil.rmtree(out, ignore_errors=True)
    write_cut(cutter_of(ModelHandle(recipe.model, before), options.submodels[name]), out)
    return before


def finished_run(run: Path) -> tuple[Recipe, tuple[Path, ...]]:
    """The recipe of a run and the folders of its changes; raises QtoolError where a changing step is not done."""
    if not (run / "recipe.yaml").is_file():
        raise QtoolError(f"{run} is no run folder: it has no recipe.yaml; name the --out folder of a qtool run")
    recipe = load(run / "recipe.yaml")
    changes = []
    for index, step in enumerate(recipe.steps):
        if step.method.kind in CHANGING:
            state = StepFolder(RunFolder(run), index, step.key)
            if state.result() is None:
                raise QtoolError(
                    f"{run}: the step {step.key} is not finished; finish it with qtool run {run}/recipe.yaml --out {run}"
                )
            changes.append(state.path)
    return recipe, tuple(changes)


def describe_model(original: ModelHandle, compressed: ModelHandle) -> dict[str, Any]:
    """Parameters, and bytes before and after, counted in stored tensors."""
    after = quantized_bytes = quantized_weights = 0
    changed: dict[str, Any] = {}
    for unit in [*(f"block_{index:03d}" for index in range(compressed.n_blocks)), "outer"]:
        changed |= compressed.unit_changes(unit)
    kept = compressed.stored_names()
    for name, p in compressed.model.named_parameters(remove_duplicate=False):
        if name not in kept:
            continue
        value = changed.get(name)
        if value is None or isinstance(value, Tensor):
            after += p.numel() * compressed.dtype.itemsize
        else:
            low_rank = changed.get(name.removesuffix(".weight") + LOW_RANK)
            stored = value[0].stored_bytes + (0 if low_rank is None else low_rank.stored_bytes)
            after += stored
            quantized_bytes += stored
            quantized_weights += math.prod(value[0].shape)
    counted = original.stored_names()
    of_original = dict(original.model.named_parameters(remove_duplicate=False))
    before = sum(of_original[name].numel() * original.dtype.itemsize for name in counted)
    return {
        "parameters": original.n_parameters(),
        "parameters_compressed": compressed.n_parameters(),
        "bytes_original": before,
        "bytes_compressed": after,
        "bits_per_weight": 8 * quantized_bytes / quantized_weights if quantized_weights else 8 * original.dtype.itemsize,
        "cache": None if (cache := compressed.cache()) is None else str(cache),
        "attention": None if (rounding := compressed.rounding()) is None else str(rounding),
    }


def digest_model(model: ModelHandle) -> str:
    """SHA-256 over config, and over size, first and last MiB of each weight file: enough to notice another model."""
    digest = hashlib.sha256((model.folder / "config.json").read_bytes())
    for path in model.checkpoint.files:
        size = path.stat().st_size if path.exists() else 0
        digest.update(f"{path.name} {size}".encode())
        if size:
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()


class Stage:
    """Seconds and peak memory of what happens inside."""

    def __init__(self, name: str) -> None:
        self.facts: dict[str, Any] = {"name": name}

    def __enter__(self) -> "Stage":
        self._begun = time.perf_counter()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak that Linux keeps
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        return self

    def __exit__(self, *error: object) -> None:
        gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
        self.facts |= {
            "seconds": round(time.perf_counter() - self._begun, 3),
            "peak_rss_gib": peak_rss_gib(),
            "peak_gpu_gib": gpu,
        }


def peak_rss_gib() -> float:
    """Peak resident memory since the last reset (Linux), or of the whole process (elsewhere), in GiB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
