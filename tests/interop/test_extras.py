"""Packages of engines are named with the extra that installs them."""

import re
import sys
from pathlib import Path

import pytest

from repvgg_hf.interop.extras import require

ROOT = Path(__file__).parents[2]


def test_a_module_that_is_there():
    import xml.dom.minidom

    assert require("xml.dom.minidom", extra="onnx") is xml.dom.minidom


@pytest.mark.parametrize(
    "name, found",
    [
        ("no_such_engine", "^no_such_engine is not installed, and"),
        ("no_such_engine.inside.it", "^no_such_engine is not installed, and"),
        ("xml.no_such_module", "^xml has no xml.no_such_module, and"),
        ("lacks_another", "^lacks_another lacks no_such_dependency, and"),
    ],
)
def test_a_module_that_is_missing(name, found, tmp_path, monkeypatch):
    (tmp_path / "lacks_another.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=found) as raised:
        require(name, extra="openvino")
    assert "`pip install 'repvgg-hf[openvino]'`" in str(raised.value)


def test_a_module_that_is_broken(tmp_path, monkeypatch):
    (tmp_path / "broken_engine.py").write_text("raise OSError('libengine.so: cannot open shared object file')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match=r"^broken_engine is installed and can't be imported \(libengine.so.*upgrade"):
        require("broken_engine", extra="onnx")
    assert "broken_engine" not in sys.modules


def test_every_extra_that_is_named_exists():
    tomllib = pytest.importorskip("tomllib", reason="part of Python 3.11")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "repvgg_hf").rglob("*.py")]
    named = {name for text in sources for name in re.findall(r'require\([^)]*extra="([^"]*)"', text)}
    assert named and named <= extras.keys()
