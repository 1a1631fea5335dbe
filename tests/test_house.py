"""The rules of the house, read off the files: floors, method files, docstrings, size, README, recipes, wheel."""

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import qtool
from qtool import registry

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = sorted((REPOSITORY / "qtool").rglob("*.py"))
METHODS = [p for p in SOURCES if p.parent.parent == REPOSITORY / "qtool" / "methods" and p.name != "__init__.py"]
RECIPES = sorted((REPOSITORY / "recipes").glob("*.yaml"))

# Part of qtool: its floor, and what it may import from outside besides the standard library. Options are pydantic
# models wherever they are declared; the pipeline moves tensors but computes nothing of its own.
PEERS = ("torchao", "bitsandbytes", "gemlite", "humming", "gptqmodel")
FLOORS: dict[str, tuple[int, set[str]]] = {
    "__init__": (0, {"transformers"}),  # the type that qtool.load returns; test_load sees that it is not imported
    "assets": (0, {"datasets"}),  # the demo task's own loader, which lm-eval runs
    "errors": (0, set()),
    "options": (0, {"pydantic"}),
    "progress": (0, set()),
    "formats": (1, {"torch", "pydantic"}),
    "linalg": (1, {"torch", "pydantic", "scipy"}),
    "kernels": (2, {"torch", "cupy"}),
    "layers": (3, {"torch"}),
    # accelerate and huggingface_hub are what transformers itself loads models with; onnx writes and reads one format.
    "model": (4, {"torch", "transformers", "safetensors", "accelerate", "huggingface_hub", "greenlet", "onnx"}),
    "calibration": (4, {"torch", "datasets", "pyarrow", "pydantic"}),
    "artifact": (4, set()),
    "registry": (5, set()),
    "methods": (6, {"torch", "pydantic"}),
    "laws": (6, {"torch", "transformers"}),
    "recipe": (7, {"yaml", "pydantic"}),
    "pipeline": (7, {"torch", "transformers", "safetensors", "pydantic", "yaml", "ray", "optuna"}),
    "report": (7, {"yaml"}),
    # What is measured beside qtool's own products, each inside a function, and what draws the figure.
    "bench": (7, {"torch", "transformers", "matplotlib", *PEERS}),
    "cli": (8, {"typer", "rich"}),
    "__main__": (8, set()),
}
# Imported inside a function only, so that what does not use it does not pay for it.
INSIDE_FUNCTIONS = {("kernels", "cupy"), ("calibration", "datasets"), ("calibration", "pyarrow"), ("model", "onnx")}
INSIDE_FUNCTIONS |= {("linalg", "scipy"), ("pipeline", "ray"), ("pipeline", "optuna")}
INSIDE_FUNCTIONS |= {*(("bench", name) for name in ("matplotlib", *PEERS))}
KINDS_WITH_A_LIBRARY = ("calibrate", "search", "evaluate", "export")  # one outside library each, inside a function
# registry.laws hands out the tests of a kind; they build models, and listing methods must not import torch.
# qtool.load is the package's door for Python programs.
UPWARD = {("registry", "laws"), ("__init__", "model")}


def part_of(path: Path) -> str:
    return path.relative_to(REPOSITORY / "qtool").parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports_of(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(module, line, whether inside a function) of every import; `from a import b` gives a.b where that is a module."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, child.lineno, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{name_of(path)}:{child.lineno}: a relative import; write the whole name"
                for alias in child.names:
                    target = REPOSITORY.joinpath(*str(child.module).split("."), alias.name)
                    is_module = target.is_dir() or target.with_suffix(".py").is_file()
                    yield f"{child.module}.{alias.name}" if is_module else str(child.module), child.lineno, inside
            else:
                is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, inside or is_function)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False)


def project_files() -> list[Path]:
    """Files that git tracks, or would with `git add --all`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    return sorted(path for name in set(listed.split("\0")) if name and (path := REPOSITORY / name).is_file())


def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_has_a_floor() -> None:
    assert sorted({part_of(path) for path in SOURCES} - FLOORS.keys()) == []


def test_a_file_imports_its_own_floor_or_lower() -> None:
    wrong = []
    for path in SOURCES:
        floor = FLOORS[part_of(path)][0]
        for module, line, _ in imports_of(path):
            parts = module.split(".")
            if parts[0] != "qtool":
                continue
            target = parts[1] if len(parts) > 1 else "__init__"
            if FLOORS[target][0] > floor and (part_of(path), target) not in UPWARD:
                wrong.append(f"{name_of(path)}:{line}: floor {floor} imports {module} of floor {FLOORS[target][0]}")
    assert not wrong, "\n".join(wrong)


def test_a_file_imports_from_outside_only_what_its_floor_may() -> None:
    wrong = []
    for path in SOURCES:
        allowed = FLOORS[part_of(path)][1]
        libraries = set()
        for module, line, inside in imports_of(path):
            top = module.split(".")[0]
            if top == "qtool" or top in sys.stdlib_module_names:
                continue
            if top in allowed:
                if (part_of(path), top) in INSIDE_FUNCTIONS and not inside:
                    wrong.append(f"{name_of(path)}:{line}: {top} is imported at the top; import it inside the function")
            elif path in METHODS and path.parent.name in KINDS_WITH_A_LIBRARY and inside:
                libraries.add(top)
            else:
                wrong.append(f"{name_of(path)}:{line}: imports {top}; {part_of(path)}/ may import {sorted(allowed)}")
        if len(libraries) > 1:
            wrong.append(f"{name_of(path)}: imports {sorted(libraries)}; a method may have one library")
    assert not wrong, "\n".join(wrong)


def test_methods_never_import_each_other() -> None:
    wrong = [
        f"{name_of(path)}:{line}: imports {module}; what two methods share moves down to linalg/ or formats/"
        for path in METHODS
        for module, line, _ in imports_of(path)
        if module.startswith("qtool.methods")
    ]
    assert not wrong, "\n".join(wrong)


def test_a_method_file_stays_under_200_lines() -> None:
    lengths = {name_of(path): len(path.read_text(encoding="utf-8").splitlines()) for path in METHODS}
    assert {name: length for name, length in lengths.items() if length >= 200} == {}


def test_every_module_begins_with_a_sentence_that_says_what_it_is() -> None:
    wrong = []
    for path in SOURCES:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        first = docstring.splitlines()[0] if docstring else ""
        if len(first.split()) < 3 or not first.endswith("."):
            wrong.append(f'{name_of(path)}: begins with "{first}"; write one sentence, with its full stop, on one line')
    assert not wrong, "\n".join(wrong)


def test_every_method_names_its_source() -> None:
    listed = registry.list_methods()
    keys = [f"{path.parent.name}/{path.stem}" for path in METHODS]
    assert keys and [key for key in keys if not listed[key].paper] == []


def test_every_method_says_what_it_is_for_and_what_it_costs() -> None:
    listed = registry.list_methods()
    silent = [key for key, info in listed.items() if info.module.startswith("qtool.") and not (info.purpose and info.cost)]
    assert silent == [] and set(registry.GUIDES) == set(registry.KINDS)


def test_every_method_loads_and_describes_each_of_its_options() -> None:
    wrong = []
    for path in METHODS:
        method = registry.load(f"{path.parent.name}/{path.stem}")
        fields = method.options.model_fields.items()
        wrong += [f"{method.key}: {name} has no description" for name, field in fields if not field.description]
    assert not wrong, "\n".join(wrong)


def test_no_file_has_a_name_that_says_nothing() -> None:
    empty = {"utils.py", "helpers.py", "base.py", "common.py", "misc.py"}
    assert [name_of(path) for path in project_files() if path.name in empty] == []


def test_only_the_command_line_prints() -> None:
    printing = ("print", "sys.stdout.write", "sys.stderr.write")
    wrong = []
    for path in SOURCES:
        if part_of(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in printing:
                wrong.append(f"{name_of(path)}:{node.lineno}: prints; report through Progress or raise")
    assert not wrong, "\n".join(wrong)


def test_no_except_is_bare_or_swallows_everything() -> None:
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                is_silent = all(isinstance(line, (ast.Pass, ast.Continue)) for line in node.body)
                catches_all = node.type is not None and ast.unparse(node.type) in ("Exception", "BaseException")
                if node.type is None or (catches_all and is_silent):
                    wrong.append(f"{name_of(path)}:{node.lineno}: name the exceptions, and do something about them")
    assert not wrong, "\n".join(wrong)


def test_no_file_names_a_place_on_one_machine() -> None:
    places = re.compile(rb"(?<![\w.~/-])/(work|root|home|Users|opt|mnt)/\w")
    wrong = []
    for path in project_files():
        data = path.read_bytes()
        if b"\0" in data or path.suffix == ".gz" or path.name in ("LICENSE", "tokenizer.json"):
            continue
        for number, line in enumerate(data.splitlines(), 1):
            if match := places.search(line):
                wrong.append(f"{name_of(path)}:{number}: {match[0].decode()}...")
    assert not wrong, "\n".join(wrong)


def test_the_tree_stays_small() -> None:
    sizes = {name_of(path): path.stat().st_size for path in project_files()}
    assert {name: size for name, size in sizes.items() if size > 15e6} == {}
    assert sum(sizes.values()) < 20 * 2**20


def test_no_test_leaves_early() -> None:
    """A bare `return` in a test passes without having claimed anything; pytest.skip says why."""
    wrong = []
    for path in sorted((REPOSITORY / "tests").rglob("*.py")):
        for test in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(test, ast.FunctionDef) and test.name.startswith("test_"):
                wrong += [f"{name_of(path)}:{line}: returns from {test.name}" for line in returns_of(test)]
    assert not wrong, "\n".join(wrong)


def returns_of(function: ast.AST) -> Iterator[int]:
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.Return):
            yield child.lineno
        elif not isinstance(child, (ast.FunctionDef, ast.Lambda)):
            yield from returns_of(child)


def test_the_table_in_the_readme_is_what_the_methods_say() -> None:
    write_docs = script("write_docs")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert write_docs.between_markers(readme) == write_docs.method_table(), "run python scripts/write_docs.py"


def test_the_links_of_the_readme_lead_somewhere() -> None:
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert links and [link for link in links if not (REPOSITORY / link).exists()] == []


def test_the_changelog_has_an_entry_for_this_version() -> None:
    assert f"\n## {qtool.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_there_is_a_recipe_for_each_of_ten_purposes() -> None:
    assert len(RECIPES) >= 10


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_says_what_it_is_for(path: Path) -> None:
    from qtool.recipe import load

    assert path.read_text(encoding="utf-8").startswith(f"# {path.name}: ")
    assert load(path).steps


def test_the_recipe_and_the_method_in_the_readme_work(tmp_path: Path) -> None:
    from qtool.recipe import load

    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"```yaml\n(.*?)```", readme, re.DOTALL)
    (tmp_path / "readme.yaml").write_text(recipe, encoding="utf-8")
    assert len(load(tmp_path / "readme.yaml").steps) == 6
    method, _ = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(method, "README.md", "exec"), names)
    assert isinstance(names["METHOD"], registry.Method)


@pytest.fixture(scope="module")
def wheel_files() -> dict[str, Path]:
    """Name in the wheel: file, of the installed wheel."""
    package = Path(qtool.__file__).parent
    if package == REPOSITORY / "qtool":
        pytest.skip("qtool is imported from the checkout; scripts/test installs the wheel")
    return {str(file): Path(str(file.locate())) for file in importlib.metadata.files("qtool") or []}


def test_the_wheel_holds_sources_assets_recipes_and_cuda_files_as_they_are_here(wheel_files: dict[str, Path]) -> None:
    wanted = {name_of(path): path for path in project_files() if path.is_relative_to(REPOSITORY / "qtool")}
    for folder in ("recipes", "kernels_cuda"):
        files = [path for path in (REPOSITORY / folder).rglob("*") if path.suffix in (".yaml", ".cu", ".cuh")]
        wanted |= {f"qtool/{name_of(path)}": path for path in files}
    assert sorted(wanted.keys() - wheel_files.keys()) == []
    assert [name for name, path in wanted.items() if path.read_bytes() != wheel_files[name].read_bytes()] == []


def test_the_wheel_holds_nothing_else(wheel_files: dict[str, Path]) -> None:
    tops = {name.split("/")[0] for name in wheel_files if not name.startswith("..")}
    assert tops == {"qtool", f"qtool-{qtool.__version__}.dist-info"}
    assert [name for name in wheel_files if "test" in name.split("/")[1:-1]] == []
