"""What importing costs, which part may import which, and that every public name exists."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_hf

ROOT = Path(repvgg_hf.__file__).parent
CORE = [
    "checkpoints", "cluster_layers", "configuration_repvgg", "modeling_repvgg", "packing", "quantization_cluster",
    "reparameterization", "weight_files",
]  # fmt: skip
# parts of the package, and what each may import besides the core and itself
PARTS = {"compression": [], "interop": [], "analysis": [], "hub": ["analysis"]}
HEAVY = [
    "torchvision", "scipy", "sklearn", "datasets", "evaluate", "matplotlib", "timm", "repvgg_hf.runtime.modeling_repvgg",
]  # fmt: skip


@pytest.fixture(scope="module")
def fresh_process() -> list[str]:
    """What a new Python process prints after the import alone, then after the first use of an Auto class."""
    code = f"""
import sys, repvgg_hf
print([name for name in {HEAVY} if name in sys.modules])
from transformers import AutoConfig, AutoModelForImageClassification
print(type(AutoModelForImageClassification.from_config(AutoConfig.for_model("repvgg"))))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_import_is_light(fresh_process):
    """Evaluation and training libraries, and the modeling code, load on first use only."""
    assert fresh_process[0] == "[]"


def test_auto_classes_need_only_the_import(fresh_process):
    assert fresh_process[1] == "<class 'repvgg_hf.runtime.modeling_repvgg.RepVGGForImageClassification'>"


def imported_modules(path: Path) -> list[tuple[str, ast.stmt, list[ast.AST]]]:
    """(module inside the package, statement, enclosing nodes) for every import of the package in a file."""
    found = []
    package = path.relative_to(ROOT.parent).parent.parts

    def visit(node, parents):
        if isinstance(node, ast.Import):
            found.extend((alias.name, node, parents) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            if module == "repvgg_hf":  # `from . import x`
                found.extend((f"repvgg_hf.{alias.name}", node, parents) for alias in node.names)
            else:
                found.append((module, node, parents))
        for child in ast.iter_child_nodes(node):
            visit(child, [*parents, node])

    visit(ast.parse(path.read_text()), [])
    return [item for item in found if item[0].split(".")[0] == "repvgg_hf"]


@pytest.mark.parametrize("name", CORE)
def test_core_files_can_be_copied_alone(name):
    """They go into Hub repositories, whose scanner follows only `from .name import x`."""
    for module, statement, parents in imported_modules(ROOT / f"{name}.py"):
        where = f"{name}.py:{statement.lineno} imports {module}"
        if any(isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) for parent in parents):
            in_core = module.removeprefix("repvgg_hf.") in CORE
            assert in_core or any(isinstance(parent, ast.Try) for parent in parents), f"{where} outside of try"
        else:
            assert isinstance(statement, ast.ImportFrom) and statement.level == 1, where
            assert statement.module in CORE, where


def part_files():
    for part in PARTS:
        sources = [ROOT / f"{part}.py", *sorted((ROOT / part).rglob("*.py"))]
        yield from (pytest.param(part, path, id=str(path.relative_to(ROOT))) for path in sources if path.exists())


@pytest.mark.parametrize(("part", "path"), part_files())
def test_parts_import_only_the_core(part, path):
    allowed = [*CORE, part, *PARTS[part]]
    for module, statement, _ in imported_modules(path):
        top = module.split(".")[1] if "." in module else module
        assert top in allowed, f"{path.name}:{statement.lineno} imports {module}"


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    """Or the two tests above would show nothing."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path / "repvgg_hf")
    path = tmp_path / "repvgg_hf" / "hub" / "card.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import os, repvgg_hf.runtime.packing\nfrom .. import analysis\nfrom ..interop.timm import x\nfrom . import results\n"
        "from .cards import y\nif True:\n    from repvgg_hf.compression import z\ndef f():\n    import repvgg_hf.hub"
    )
    assert [module.removeprefix("repvgg_hf.") for module, *_ in imported_modules(path)] == [
        "packing", "analysis", "interop.timm", "hub", "hub.cards", "compression", "hub",
    ]  # fmt: skip


def test_every_part_has_its_rules():
    assert {module.name for module in pkgutil.iter_modules([str(ROOT)])} <= {*CORE, *PARTS}


@pytest.mark.parametrize("name", repvgg_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(repvgg_hf, name) is not None
    assert name in dir(repvgg_hf)


@pytest.mark.parametrize("name", sorted(module.name for module in pkgutil.iter_modules([str(ROOT)])))
def test_names_in_all_exist(name):
    module = importlib.import_module(f"repvgg_hf.{name}")
    missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    assert missing == []


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'repvgg_hf' has no attribute 'RepVGG'"):
        repvgg_hf.RepVGG  # noqa: B018
