"""Files for engines in a repository: what is published, what goes again, and what the card says of them."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from loopback_store import PUBLIC
from PIL import Image
from test_card import html, tables

from repvgg_hf import load_engine
from repvgg_hf.hub import EngineResult, publish, publish_family, write_folder
from repvgg_hf.hub.engines import javascript
from repvgg_hf.hub.recipe_figures import engine_results

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
REPO, FILE, PUBLISHED = "org/tiny", "onnx/model_q4.onnx", "cluster-w4"


@pytest.fixture(scope="module")
def integers(tiny_model):
    """The tiny classifier of digits with weights of 4 bits and integer inputs."""
    images = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return copy.deepcopy(tiny_model()).quantize(bits=4, activation_bits=8, calibration=[images])


@pytest.fixture
def measured(results):
    """Results with a measurement of each engine."""
    device = {"device": "a processor, 1 thread", "milliseconds": 1.234}
    rows = [
        EngineResult(PUBLISHED, "ONNX Runtime", 94.75, 99.9, 98.5, 360, file=FILE, **device),
        EngineResult(PUBLISHED, "PyTorch, inductor", 94.5, 99.8, 97.5, 360),
        EngineResult("float", "OpenVINO", 96.5, 100.0, 100.0, 360, file="openvino/openvino_model.xml"),
    ]
    return replace(results, engines=rows)


def test_files_are_published_and_go_again(hub, integers, processor):
    options = {"processor": processor, **PUBLIC}
    publish(integers, REPO, formats=("onnx",), **options)
    files = hub.files(REPO)
    assert FILE in files and json.loads(files["card.json"])["files"] == {FILE: len(files[FILE])}
    assert not publish(integers, REPO, formats=("onnx",), **options).changed
    hub.put(REPO, {"onnx/decoder.onnx": b"of somebody else"})
    publish(integers, REPO, **options)
    files = hub.files(REPO)
    assert FILE not in files and files["onnx/decoder.onnx"] == b"of somebody else"


def test_openvino_is_published_with_its_weights(hub, integers, processor):
    pytest.importorskip("openvino")
    options = {"processor": processor, **PUBLIC}
    publish(integers, REPO, formats=["openvino"], **options)
    files, path = hub.files(REPO), "openvino/openvino_model"
    assert json.loads(files["card.json"])["files"] == {f"{path}.xml": len(files[f"{path}.xml"] + files[f"{path}.bin"])}
    assert not publish(integers, REPO, formats=["openvino"], **options).changed
    publish(integers, REPO, formats=["onnx"], **options)
    assert {name for name in hub.files(REPO) if "/" in name} == {FILE}


def test_the_folder_runs(integers, processor, tmp_path):
    write_folder(integers, tmp_path / "repo", REPO, processor=processor, license="mit", formats=("onnx",))
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = integers(images).logits
    engine = load_engine(tmp_path / "repo", "onnxruntime")
    assert (engine(images).argmax(1) == expected.argmax(1).numpy()).all() and engine.processor() is not None


def test_the_cards_lines_run_the_file(integers, processor, tmp_path, picture, monkeypatch, capsys):
    folder = tmp_path / "repo"
    write_folder(integers, folder, REPO, processor=processor, license="mit", formats=("onnx",))
    blocks = (folder / "README.md").read_text().split("```python\n")[1:]
    (code,) = [block.split("```")[0] for block in blocks if "onnxruntime" in block]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: f"{name}/{file}")
    code = code.replace(REPO, str(folder)).replace("image.png", str(picture))
    exec(code, {})
    with torch.no_grad():
        logits = integers(**processor(Image.open(picture), return_tensors="pt")).logits[0]
    assert int(capsys.readouterr().out) == logits.argmax()


@pytest.mark.parametrize("bits", [None, 4])
def test_models_without_integers_compute_in_float(bits, tiny_model, processor, tmp_path):
    write_folder(tiny_model(bits), tmp_path / "repo", REPO, processor=processor, license="mit", formats=("onnx",))
    images = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = tiny_model(bits)(images).logits.numpy()
    engine = load_engine(tmp_path / "repo", "onnxruntime")
    assert engine.path.name == "model.onnx" and engine(images) == pytest.approx(expected, abs=1e-4)


def test_the_card_shows_what_was_measured_and_no_more(integers, processor, measured, tmp_path):
    card = write_folder(
        integers, tmp_path / "repo", REPO, measured, processor=processor, published=PUBLISHED, draw_plots=False,
        formats=("onnx",), license="mit",
    )  # fmt: skip
    text = str(card)
    size = f"{(tmp_path / 'repo' / FILE).stat().st_size:,}"
    found = next(table for table in tables(text) if table[0][:2] == ["engine", "file"])
    assert found == [
        ["engine", "file", "bytes", "device", "median, ms", "top-1", "agreement", "same logits"],
        ["ONNX Runtime", f"<code>{FILE}</code>", size, "a processor, 1 thread", "1.23", "94.75", "99.90", "98.50"],
        ["PyTorch, inductor", "", "", "", "", "94.50", "99.80", "97.50"],
    ]
    assert 'AutoModel.from_pretrained(name, { dtype: "q4" })' in text and "<script" not in html(text)
    alone = write_folder(integers, tmp_path / "alone", REPO, processor=processor, license="mit", formats=("onnx",))
    assert ["ONNX Runtime", f"<code>{FILE}</code>", size] in tables(str(alone))[-1]
    assert tables(str(alone))[-1][0] == ["engine", "file", "bytes"]
    assert "## Engines" not in str(write_folder(integers, tmp_path / "none", REPO, processor=processor, license="mit"))


def test_another_files_measurement_is_refused(integers, processor, measured, tmp_path):
    measured.engines[0].bytes = 123
    options = {
        "processor": processor,
        "published": PUBLISHED,
        "formats": ("onnx",),
        "draw_plots": False,
        "license": "mit",
    }
    with pytest.raises(ValueError, match=rf"measured {FILE} of 123 bytes for 'cluster-w4'.* export and evaluate"):
        write_folder(integers, tmp_path / "repo", REPO, measured, **options)
    assert list(tmp_path.iterdir()) == []


def test_bad_formats_are_refused_before_any_work(hub, integers, tiny_model, processor):
    with pytest.raises(ValueError, match="formats must be a list of some of onnx, .*, got 'tensorrt'"):
        publish(integers, REPO, processor=processor, formats=["tensorrt"], **PUBLIC)
    with pytest.raises(ValueError, match="formats must be a list of some of onnx, .*, got 'onnx'"):
        publish_family({"w4": integers}, REPO, processor=processor, formats="onnx", **PUBLIC)
    with pytest.raises(ValueError, match="is not quantized: call quantize"):
        publish(tiny_model(), REPO, processor=processor, formats=["openvino"], **PUBLIC)
    assert hub.requests == []


@pytest.mark.parametrize(
    "name, options",
    [
        ("model_quantized", '{ dtype: "q8" }'),
        ("model_q4", '{ dtype: "q4" }'),
        ("model_q1", '{ dtype: "q1" }'),
        ("model_int8", '{ dtype: "int8" }'),
        ("model", '{ dtype: "fp32" }'),
        ("model_q3", '{ model_file_name: "model_q3", dtype: "fp32" }'),
    ],
)
def test_javascript(name, options):
    code = javascript("org/tiny", None, f"onnx/{name}.onnx")
    assert f"AutoModel.from_pretrained(name, {options});" in code and "from_pretrained(name);" in code
    assert 'revision: "w4" }' in javascript("org/tiny", "w4", f"onnx/{name}.onnx").splitlines()[3]


class TestFiguresOfTheRecipe:
    RECORD = {
        "images": 360, "bytes": 3108, "cpu": "a processor", "threads": 2,
        "engines": [
            {"engine": "OpenVINO", "file": None, "top1": 94.0, "agreement": 99.0, "near": 98.0, "milliseconds": 2.0}
        ],
    }  # fmt: skip
    MODELS = [{"model": "float", "bytes": 9736}, {"model": PUBLISHED, "bytes": 3108}]

    def test_fields(self):
        (row,) = engine_results(self.RECORD, self.MODELS)
        expected = EngineResult(PUBLISHED, "OpenVINO", 94.0, 99.0, 98.0, 360, milliseconds=2.0)
        assert EngineResult(**row) == replace(expected, device="a processor, 2 threads")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"bytes": 1}, r"of a checkpoint of 1 bytes, and the models have float \(9736 bytes\), cluster-w4"),
            ({"engines": [{"engine": "x"}]}, r"evaluation.engines\[0\] lacks 'top1'"),
            ({"engines": None}, "evaluation.engines must be a list"),
        ],
    )
    def test_bad_records(self, changes, message):
        with pytest.raises(ValueError, match=message):
            engine_results(self.RECORD | changes, self.MODELS)

    def test_bad_results(self, measured):
        with pytest.raises(ValueError, match=r"engines\[0\].model is 'w2', but results.models has only float, uniform"):
            replace(measured, engines=[replace(measured.engines[0], model="w2")])
        with pytest.raises(ValueError, match=r"results.engines\[0\].agreement must be a percentage"):
            replace(measured, engines=[replace(measured.engines[0], agreement=101.0)])
