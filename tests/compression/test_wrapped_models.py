"""What is no module, or one that was compiled or wrapped: a named error from every function, and nothing changed."""

import pytest
import torch
from torch import nn

import repvgg_hf

EXAMPLE = torch.zeros(1, 3, 8, 8)
FUNCTIONS = {
    "quantize": repvgg_hf.quantize,
    "prepare_qat": repvgg_hf.prepare_qat,
    "dequantize": repvgg_hf.dequantize,
    "save_quantized": lambda model: repvgg_hf.save_quantized(model, "folder"),
    "load_quantized": lambda model: repvgg_hf.load_quantized(model, "folder"),
    "fuse": lambda model: repvgg_hf.fuse(model, EXAMPLE),
    "add_oabn": lambda model: repvgg_hf.add_oabn(model, EXAMPLE),
    "update_codebooks": repvgg_hf.update_codebooks,
    "kernel_report": repvgg_hf.kernel_report,
}


def make() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_module(name):
    with pytest.raises(TypeError, match="model must be an nn.Module, got str"):
        FUNCTIONS[name]("repvgg")
    with pytest.raises(TypeError, match="model must be an nn.Module, got the class Conv2d"):
        FUNCTIONS[name](nn.Conv2d)


def part_compiled() -> nn.Module:
    model = make()
    model[3] = torch.compile(model[3], backend="eager")
    return model


WRAPPED = {
    "compiled": (lambda: torch.compile(make(), backend="eager"), "The model is compiled .*give the model itself"),
    "a part compiled": (part_compiled, "3 is compiled .*give the model itself"),
    "scripted": (lambda: torch.jit.script(make()), "The model is compiled .*give the model itself"),
    "parallel": (lambda: nn.DataParallel(make()), r"The model is wrapped \(DataParallel\).*give model.module"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit.script")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("update_codebooks", "kernel_report")])
@pytest.mark.parametrize("kind", WRAPPED)
def test_wrapped_models_are_refused(kind, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wrap, message = WRAPPED[kind]
    model = wrap()
    before = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](model)
    assert list(model.state_dict()) == before and not list(tmp_path.iterdir())


def test_a_model_that_compiles_itself_is_quantized_as_any():
    """`module.compile()` keeps the names."""
    model = make()
    model.compile(backend="eager")
    model(EXAMPLE)
    expected = repvgg_hf.quantize(make(), bits=4)
    repvgg_hf.quantize(model, bits=4)
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert isinstance(model[3], repvgg_hf.ClusterConv2d) and model(EXAMPLE).isfinite().all()
