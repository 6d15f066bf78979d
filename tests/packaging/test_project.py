"""`pyproject.toml` says what is in the tree: packages, dependencies, versions of Python."""

import ast
import re
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("repvgg_hf", "recipes") for path in (ROOT / folder).rglob("*.py"))
OLDEST_PYTHON = (3, 10)
# import name of each core dependency
CORE = {"huggingface_hub", "numpy", "PIL", "safetensors", "torch", "transformers", "typing_extensions"}
# rooms for whom the core is enough to be imported; hub draws plots and training shows progress with the extras
CORE_ROOMS = ("runtime", "networks", "compression", "interop")


def relative_names(paths):
    return [pytest.param(path, id=path.relative_to(ROOT).as_posix()) for path in paths]


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_folder_with_code_is_installed():
    """The packages are listed by hand, because recipes/ is installed inside of repvgg_hf."""
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in SOURCES}
    expected = {re.sub(r"^recipes", "repvgg_hf.recipes", folder) for folder in folders}
    assert set(pyproject()["tool"]["setuptools"]["packages"]) == expected


@pytest.mark.parametrize("path", relative_names(SOURCES))
def test_syntax_of_the_oldest_python(path):
    ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST_PYTHON)


def test_oldest_python_is_the_same_everywhere():
    project = pyproject()
    version = "%d.%d" % OLDEST_PYTHON
    assert project["project"]["requires-python"] == f">={version}"
    assert project["tool"]["ruff"]["target-version"] == "py" + version.replace(".", "")
    assert f"Programming Language :: Python :: {version}" in project["project"]["classifiers"]


def test_core_dependencies_are_the_installed_ones():
    """The metadata of the installed package, which pip resolves, not of the file it was made from."""
    core = {re.split(r"[<>=!~;\[ ]", line)[0] for line in requires("repvgg_hf") if "extra ==" not in line}
    assert core == {{"PIL": "pillow"}.get(name, name.replace("_", "-")) for name in CORE}


def imported_when_loaded(tree: ast.Module) -> set[str]:
    """Top-level names of absolute imports that run when the module is imported; those in functions run later."""
    found, pending = set(), list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            pending += list(ast.iter_child_nodes(node))
    return found


@pytest.mark.parametrize(
    "path", relative_names(path for path in SOURCES if path.relative_to(ROOT).parts[1] in CORE_ROOMS)
)
def test_rooms_of_the_core_import_the_core_alone(path):
    outside = imported_when_loaded(ast.parse(path.read_text(encoding="utf-8"))) - sys.stdlib_module_names
    assert outside <= CORE | {"repvgg_hf"}
