"""The quantization method is known to Transformers as soon as its table of methods is, and not at the cost of it."""

import importlib
import sys

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import repvgg_hf
from repvgg_hf.registration import _AfterImport


def test_the_method_is_known():
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["cluster"] is repvgg_hf.ClusterConfig
    assert AUTO_QUANTIZER_MAPPING["cluster"] is repvgg_hf.ClusterQuantizer


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield tmp_path
    for name in ("table_of_methods", "other_module"):
        sys.modules.pop(name, None)


def test_the_action_runs_once_after_the_import(folder):
    (folder / "table_of_methods.py").write_text("METHODS = ['a']\n")
    (folder / "other_module.py").write_text("")
    calls = []
    finder = _AfterImport("table_of_methods", lambda: calls.append(list(sys.modules["table_of_methods"].METHODS)))
    sys.meta_path.insert(0, finder)
    importlib.import_module("other_module")
    assert calls == [] and finder in sys.meta_path
    module = importlib.import_module("table_of_methods")
    assert calls == [["a"]] and finder not in sys.meta_path
    assert module.__spec__.loader is module.__loader__ and module.__file__ == str(folder / "table_of_methods.py")
    importlib.reload(module)
    assert calls == [["a"]]


def test_a_module_that_is_not_there(folder):
    sys.meta_path.insert(0, _AfterImport("table_of_methods", lambda: 1 / 0))
    with pytest.raises(ModuleNotFoundError, match="No module named 'table_of_methods'"):
        importlib.import_module("table_of_methods")


def test_an_error_of_the_module_is_its_own(folder):
    (folder / "table_of_methods.py").write_text("raise OSError('broken')\n")
    sys.meta_path.insert(0, _AfterImport("table_of_methods", lambda: 1 / 0))
    with pytest.raises(OSError, match="broken"):
        importlib.import_module("table_of_methods")
