"""What exporters are given wrong is named, before anything is converted or written."""

import re

import numpy as np
import pytest
import torch
from quantized_models import small_repvgg

from repvgg_hf import (
    compile_int8,
    export_coreml,
    export_executorch,
    export_litert,
    export_onnx,
    export_openvino,
    export_program,
)
from repvgg_hf.interop.arguments import dynamic_dimensions, image_sides
from repvgg_hf.interop.qdq import to_qdq

NO_SIZES = [-32, 0, "32", 32.0, True, (3, 32, 32), (32,), (32, -1), [32, "32"], torch.tensor(32)]
WRITERS = {  # functions by the folder that they write into
    "onnx": export_onnx,
    "openvino": export_openvino,
    "coreml": export_coreml,
    "executorch": export_executorch,
    "litert": export_litert,
}
writers = pytest.mark.parametrize("inside", WRITERS)


@pytest.fixture(scope="module")
def model():
    return small_repvgg()


def write(inside: str, *arguments, **options):
    for package in {"onnx": ("onnxscript",), "openvino": ("openvino", "onnxscript")}.get(inside, ()):
        pytest.importorskip(package)
    return WRITERS[inside](*arguments, **options)


def test_sizes_of_images():
    assert image_sides(32) == (32, 32) and image_sides((24, 32)) == image_sides([24, np.int64(32)]) == (24, 32)


@writers
@pytest.mark.parametrize("size", NO_SIZES, ids=repr)
def test_no_size_of_images(model, inside, size, tmp_path):
    message = f"image_size must be a positive integer or two of them, (height, width), got {size!r}"
    with pytest.raises(ValueError, match=re.escape(message)):
        write(inside, model, tmp_path, image_size=size)
    assert not any(tmp_path.iterdir())


def test_a_configuration_with_no_size(tmp_path):
    model = small_repvgg()
    model.config.image_size = "large"
    with pytest.raises(ValueError, match="image_size in the configuration of RepVGGFor.* must be .*, got 'large'"):
        write("onnx", model, tmp_path)


@writers
@pytest.mark.parametrize("wrong", ["org/checkpoint", None, {}], ids=repr)
def test_no_model(inside, wrong, tmp_path):
    found = "None" if wrong is None else f"{type(wrong).__name__} {wrong!r}"
    with pytest.raises(TypeError, match=rf"model must be a network .*, got {re.escape(found)}: load it first"):
        write(inside, wrong, tmp_path)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "function", [to_qdq, lambda model: export_program(model, torch.zeros(1)), lambda model: compile_int8(model, None)]
)
def test_no_model_for_a_program(function):
    with pytest.raises(TypeError, match="model must be a network .*, got str 'org/checkpoint'"):
        function("org/checkpoint")


@writers
@pytest.mark.parametrize("above", ["", "file", "file/further"])
def test_a_file_in_a_folders_place(model, inside, above, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.export.export", lambda *_, **__: pytest.fail("converted first"))
    file = tmp_path / (above.partition("/")[0] or inside)
    file.write_text("mine")
    with pytest.raises(ValueError, match=rf"{file} is a file: export_{inside}\(\) writes into a folder `{inside}`"):
        write(inside, model, tmp_path / above)
    assert file.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


@writers
def test_no_folder(model, inside):
    with pytest.raises(TypeError, match=r"folder must be a path \(str or Path\), got None"):
        write(inside, model, None)


def test_dimensions():
    assert dynamic_dimensions(["width", "batch"]) == ("batch", "width") and dynamic_dimensions(()) == ()
    for wrong in (None, "batch", 3, True, ["depth"], [["batch"]], [None]):
        with pytest.raises(ValueError, match=re.escape(f"batch, height, width, got {wrong!r}")):
            dynamic_dimensions(wrong)


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (2, 3, 1, 32), (0, 3, 32, 32), (3, 32, 32)], ids=str)
def test_an_example_that_can_not_be_dynamic(model, shape):
    message = f"dynamic=True at least two, .* got {re.escape(str(list(shape)))}: give torch.zeros"
    with pytest.raises(ValueError, match=message):
        export_program(model, torch.zeros(shape), dynamic=True)


@pytest.mark.parametrize("function", [export_program, compile_int8])
def test_no_example(model, function):
    with pytest.raises(TypeError, match=r"example must be a tensor of images .*, got tuple \(2, 3, 32, 32\)"):
        function(model, (2, 3, 32, 32))
