"""The house: who imports whom, what importing costs, and that every public name exists.

Rooms import downwards only, see `ALLOWED`. All of it is read from the imports in the source, wherever they stand.
"""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import repvgg_hf
from repvgg_hf.hub.runtime_files import runtime_files

ROOT = Path(repvgg_hf.__file__).parent
RECIPES = ROOT.parent / "recipes"  # installed as repvgg_hf.recipes

# a room or file, and the rooms it may import besides itself: from the ground to the roof
_LIBRARY = ["runtime", "networks", "compression"]
ALLOWED = {
    "runtime": [],
    "registration": ["runtime"],
    "networks": ["runtime"],
    "compression.codebooks": ["runtime"],
    "compression.layers": ["runtime", "networks", "compression.codebooks"],
    "compression.ptq": ["runtime", "networks", "compression.codebooks", "compression.layers"],
    "compression.qat": ["runtime", "networks", "compression.codebooks", "compression.layers"],
    "compression": _LIBRARY,
    "analysis": _LIBRARY,
    "interop": _LIBRARY,
    "training": [*_LIBRARY, "analysis"],
    "hub": [*_LIBRARY, "analysis", "interop"],
    "recipes": [*_LIBRARY, "analysis", "interop", "training", "hub"],
}
# a file that imports its way up: inside a function, for what a model does only where the whole package is installed
UPWARDS = {("runtime.whole_package", "compression")}
# public names that any room above may import from the package itself, and where they are
PUBLIC = {name: module.strip(".") for name, module in repvgg_hf._LAZY.items()} | {
    "RepVGGConfig": "runtime.configuration_repvgg"
}
HEAVY = [
    "torchvision", "scipy", "sklearn", "datasets", "evaluate", "matplotlib", "timm", "accelerate", "rich",
    "onnx", "onnxruntime", "onnxscript", "openvino", "coremltools", "torchao",
    "repvgg_hf.runtime.modeling_repvgg", "repvgg_hf.compression", "repvgg_hf.analysis", "repvgg_hf.training",
    "repvgg_hf.interop",
]  # fmt: skip


def find_modules(root: Path, prefix: str = "") -> dict[str, Path]:
    """Every module below a folder, by its name in the package; a folder is its `__init__`, the package itself `""`."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        found[".".join([prefix] * bool(prefix) + parts)] = path
    return found


MODULES = find_modules(ROOT) | find_modules(RECIPES, "recipes")
INSIDE = {name: path for name, path in MODULES.items() if name}  # without the package's own __init__


def imported_modules(name: str, path: Path, modules=MODULES) -> list[tuple[str, ast.stmt, list[ast.AST]]]:
    """(module inside the package, statement, enclosing nodes) for every import of the package in a file.

    `from x import y` is of `x.y` if that is a module, else of `x`; a name that `repvgg_hf` itself offers is of the
    module that it comes from.
    """
    found = []
    parts = ["repvgg_hf", *name.split(".")] if name else ["repvgg_hf"]
    package = parts if path.name == "__init__.py" else parts[:-1]

    def visit(node, parents):
        targets = []
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            targets = [f"{base}.{alias.name}" for alias in node.names]
        for target in targets:
            top, _, inner = target.partition(".")
            if top != "repvgg_hf":
                continue
            if inner not in modules and isinstance(node, ast.ImportFrom):
                inner = PUBLIC.get(inner, inner.rpartition(".")[0])
            found.append((inner, node, parents))
        for child in ast.iter_child_nodes(node):
            visit(child, [*parents, node])

    visit(ast.parse(path.read_text(encoding="utf-8")), [])
    return found


def room_of(name: str) -> str:
    """The innermost entry of `ALLOWED` that a module is in."""
    rooms = [room for room in ALLOWED if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len)


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of a graph, empty if there is none."""
    done, path = set(), []

    def visit(node):
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return []
        path.append(node)
        for target in sorted(graph.get(node, ())):
            if cycle := visit(target):
                return cycle
        done.add(path.pop())
        return []

    return next((cycle for node in graph if (cycle := visit(node))), [])


def test_no_import_cycles():
    """Between files, wherever in them the imports stand. The package's own `__init__` loads names when asked for."""
    graph = {
        name: {target for target, *_ in imported_modules(name, path) if target and target != name}
        for name, path in INSIDE.items()
    }
    assert sum(map(len, graph.values())) > 100  # or nothing was found
    assert all(target in graph[name] for name, target in UPWARDS)  # none that is no more
    assert find_cycle(graph) == []


@pytest.mark.parametrize("name", INSIDE)
def test_rooms_import_downwards_only(name):
    room = room_of(name)
    for target, statement, parents in imported_modules(name, INSIDE[name]):
        where = f"{name}:{statement.lineno} imports repvgg_hf.{target}"
        in_function = any(isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) for parent in parents)
        if (name, target) in UPWARDS:
            assert in_function and any(isinstance(parent, ast.Try) for parent in parents), f"{where} outside of try"
            continue
        assert target in MODULES, f"{where}, which is no module"
        if not target:  # `import repvgg_hf`, for its public names
            assert room in ("training", "recipes"), where
            continue
        allowed = [room, *ALLOWED[room]]
        assert any(target == other or target.startswith(f"{other}.") for other in allowed), where


@pytest.mark.parametrize("name", [name for name in INSIDE if name.startswith("runtime.")])
def test_runtime_files_can_be_copied_alone(name):
    """They go into Hub repositories, whose scanner follows only `from .name import x`."""
    beside = {path.stem for path in (ROOT / "runtime").glob("[!_]*.py")}
    for target, statement, parents in imported_modules(name, INSIDE[name]):
        if (name, target) in UPWARDS:
            continue
        where = f"{name}:{statement.lineno} imports repvgg_hf.{target}"
        assert not any(isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef)) for parent in parents), where
        assert isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module in beside, where
    source = ast.parse(INSIDE[name].read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(source) if isinstance(node, ast.ImportFrom) and not node.level}
    needed = {full.split(".")[0] for full in names} - set(sys.stdlib_module_names) - {"repvgg_hf"}
    assert needed <= {"torch", "transformers", "safetensors", "huggingface_hub", "typing_extensions"}


def test_runtime_is_exactly_what_is_copied():
    assert runtime_files() == sorted((ROOT / "runtime").glob("[!_]*.py"))


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_every_folder_says_what_lives_there(folder):
    init = folder / "__init__.py"
    assert init.exists(), f"{folder} has code and no __init__.py"
    docstring = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8")))
    assert docstring and len(docstring.split()) >= 5, f"{init} does not say what lives there"


def test_every_folder_is_a_room():
    """Or the tests above would know no rule for it."""
    folders = {name.split(".")[0] for name in INSIDE}
    assert folders <= {room.split(".")[0] for room in ALLOWED}
    assert all(room_of(name) for name in INSIDE)


class TestTheTestsThemselves:
    """They find what they are to find, or they would show nothing."""

    def test_imports_in_every_form(self, tmp_path):
        path = tmp_path / "card.py"
        path.write_text(
            "import os, repvgg_hf.runtime.packing\nfrom .. import analysis\nfrom ..networks.timm import x\n"
            "from . import results\nfrom .results import y\nif True:\n    from repvgg_hf.compression import z, api\n"
            "def f():\n    import repvgg_hf.hub\n    from repvgg_hf import ClusterConfig, RepVGGConfig\n"
            "    import repvgg_hf, torch\n    from torch import nn\n"
        )
        assert [target for target, *_ in imported_modules("hub.card", path)] == [
            "runtime.packing", "analysis", "networks.timm", "hub.results", "hub.results", "compression",
            "compression.api", "hub", "runtime.quantization_cluster", "runtime.configuration_repvgg", "",
        ]  # fmt: skip
        init = tmp_path / "__init__.py"
        init.write_text("from .card import x\nfrom ..runtime import packing\nfrom . import card\n")
        found = [target for target, *_ in imported_modules("hub", init)]
        assert found == ["hub.card", "runtime.packing", "hub.card"]

    def test_cycles(self):
        assert find_cycle({"a": {"b", "c"}, "b": {"d"}, "c": {"d"}, "d": set()}) == []
        assert find_cycle({"a": {"b"}, "b": {"d"}, "d": {"e"}, "e": {"b"}}) == ["b", "d", "e", "b"]

    def test_rooms(self):
        assert room_of("compression.ptq.data") == "compression.ptq" and room_of("compression.api") == "compression"
        assert room_of("compression.layers") == "compression.layers" and room_of("hub") == "hub"


# Imports every module given as an argument, and prints the line of each call of PyTorch that gives a tensor meanwhile,
# if the package's own code makes it. The default device is one that has no memory, as in `from_pretrained`.
FIND_TENSORS = """
import importlib, os, sys
import torch
from torch.overrides import TorchFunctionMode

roots = tuple(sys.argv[1].split(os.pathsep))

class Watch(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        frame = sys._getframe(1)
        while frame is not None and frame.f_code.co_name != "<module>":
            frame = frame.f_back
        if isinstance(result, torch.Tensor) and frame is not None and frame.f_code.co_filename.startswith(roots):
            print(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        return result

with torch.device("meta"), Watch():
    for name in sys.argv[2:]:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            values = list(value.values()) if isinstance(value, dict) else value
            values = values if isinstance(values, (list, tuple)) else [values]
            if not key.startswith("__") and any(isinstance(entry, torch.Tensor) for entry in values):
                print(f"{name}.{key}")
"""


def tensors_made_by(roots: list[Path], names: list[str], **kwargs) -> list[str]:
    command = [sys.executable, "-c", FIND_TENSORS, os.pathsep.join(map(str, roots)), *names]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_no_module_makes_a_tensor_when_it_is_imported():
    """It would be on the device, and of the dtype, that happens to be the default then: `from_pretrained` sets both."""
    # running a package's __main__ is what it is for, and peers import libraries that need not be installed
    left_out = {name for name in INSIDE if name.endswith(".__main__") or name.startswith("recipes.peers.")}
    names = [f"repvgg_hf.{name}" for name in sorted(INSIDE.keys() - left_out)]
    assert tensors_made_by([ROOT, RECIPES], names) == []


def test_tensors_made_at_import_are_found(tmp_path):
    (tmp_path / "at_import.py").write_text(
        "import torch\n\nclass C:\n    table = torch.arange(3)\n\ndef make():\n    return torch.zeros(2)\n\n"
        "TABLE = [make()]\n\ndef later():\n    return torch.ones(2)\n"
    )
    found = tensors_made_by([tmp_path], ["at_import"], cwd=tmp_path)
    assert [line.rpartition(":")[2] for line in found] == ["3", "9", "at_import.TABLE"]


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


@pytest.mark.parametrize("name", repvgg_hf.__all__)
def test_public_names_resolve(name):
    assert getattr(repvgg_hf, name) is not None
    assert name in dir(repvgg_hf)


def test_public_names_are_declared_once_each():
    assert len(set(repvgg_hf.__all__)) == len(repvgg_hf.__all__)
    assert set(repvgg_hf.__all__) == {*repvgg_hf._LAZY, "RepVGGConfig"}
    assert set(dir(repvgg_hf)) == {*repvgg_hf.__all__, "__version__"}


def test_a_misspelt_public_name_gets_a_suggestion():
    with pytest.raises(AttributeError, match="no attribute 'quantise': did you mean 'quantize'"):
        _ = repvgg_hf.quantise


@pytest.mark.parametrize("name", [name for name in INSIDE if room_of(name) != "recipes"])
def test_names_in_all_exist(name):
    module = importlib.import_module(f"repvgg_hf.{name}") if not name.endswith("__main__") else None
    missing = [public for public in getattr(module, "__all__", []) if not hasattr(module, public)]
    assert missing == []


def test_unknown_attribute():
    with pytest.raises(AttributeError, match="module 'repvgg_hf' has no attribute 'RepVGG'"):
        repvgg_hf.RepVGG  # noqa: B018
