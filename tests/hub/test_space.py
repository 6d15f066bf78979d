"""The folder of a page, and publishing it as a Space: files, what the page is told, errors, commits. No browser."""

import json
import re
import subprocess
import sys

import pytest
import yaml
from loopback_store import WRITE_TOKEN
from PIL import Image
from transformers import BitImageProcessor, ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from repvgg_hf.hub import DatasetInfo, ModelResult, Results, write_space
from repvgg_hf.hub.space_command import main
from repvgg_hf.hub.space_pixels import pixel_settings

REPO = "org/page"
KEPT = f"spaces/{REPO}"
WASM = b"\0asm not really"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def write(tmp_path, family, package):
    """`write(...)` writes the page of the family into `tmp_path / "page"`."""

    def run(models=None, results=None, **options):
        options = {"onnxruntime_web": package, "license": "mit"} | options
        return write_space(tmp_path / "page", family if models is None else models, results, **options)

    return run


def test_the_page_has_all_that_it_asks_for(write, tmp_path, picture):
    values = write(images={"A cat": picture})
    page = tmp_path / "page"
    assert json.loads((page / "space.json").read_text(encoding="utf-8")) == values
    asked = {entry["file"] for entry in values["models"] + values["images"]}
    asked |= {values["engine"]["module"], values["engine"]["wasm"]}
    html = (page / "index.html").read_text(encoding="utf-8")
    asked |= set(re.findall(r'(?:src|href)="([^":]+)"', html))
    for script in page.glob("*.js"):
        asked |= {name.removeprefix("./") for name in re.findall(r'["\'](\./[^"\']+)["\']', script.read_text("utf-8"))}
    assert {"page.js", "page.css", "engine.js", "pixels.js", "images/1.jpg"} <= asked
    assert [name for name in sorted(asked) if not (page / name).is_file()] == []
    there = {path.relative_to(page).as_posix() for path in page.rglob("*") if path.is_file()}
    assert there == asked | {"README.md", "index.html", "space.json"}
    assert (page / values["engine"]["wasm"]).read_bytes() == WASM and values["engine"]["version"] == "9.8.7"
    assert (page / "images" / "1.jpg").read_bytes() == picture.read_bytes()


def test_nothing_comes_from_elsewhere(write, tmp_path):
    write()
    html = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in html and "connect-src 'self'" in html
    text = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "page").glob("*.*s"))
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, no address


def test_models_are_ordered_by_bits(write, tmp_path):
    entries = write()["models"]
    assert [(entry["name"], entry["bits"]) for entry in entries] == [("float", 32), ("w4", 4), ("w2", 2)]
    for entry in entries:
        content = (tmp_path / "page" / entry["file"]).read_bytes()
        assert content == b"\0onnx of " + entry["name"].encode() and entry["bytes"] == len(content)


def test_bits_that_differ_by_layer_are_averaged(write, tiny_model, processor, monkeypatch):
    tiny_model.cache_clear()
    overrides = {"classifier": 8}
    model = tiny_model().quantize(bits=4, bits_overrides=overrides)
    tiny_model.cache_clear()
    monkeypatch.setattr("repvgg_hf.hub.space_models.SpaceModel.write", lambda self, path: path.write_bytes(b"onnx"))
    numels = {name: layer.weight_numel for name, layer in model.named_modules() if hasattr(layer, "weight_numel")}
    expected = sum((8 if name in overrides else 4) * numel for name, numel in numels.items()) / sum(numels.values())
    (entry,) = write({"mixed": model}, processor=processor)["models"]
    assert 4 < entry["bits"] < 8 and entry["bits"] == pytest.approx(expected, abs=0.05)


def test_readme_tells_the_hub_what_it_is(write, tmp_path):
    title = "Bits: \"few\", 'fewer' # and 1 – π"
    write(title=title, license="mit")
    readme = (tmp_path / "page" / "README.md").read_text(encoding="utf-8")
    head, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", readme, re.DOTALL).groups()
    values = yaml.safe_load(head)
    assert values["title"] == title and values["license"] == "mit"
    assert (values["sdk"], values["app_file"]) == ("static", "index.html")
    assert values["custom_headers"]["cross-origin-embedder-policy"] == "require-corp"
    assert len(values["short_description"]) <= 60  # the Hub's limit
    assert "| w4 | 4 |" in text and "9.8.7" in text


def test_accuracy_comes_from_the_results_alone(write, results):
    values = write(results=results)
    accuracy = values["accuracy"]
    assert accuracy["dataset"] == "digits, held out" and values["float_bytes"] == 9736
    figures = {(point["model"], point["bytes"], point["top1"]) for point in accuracy["points"]}
    assert figures == {(row.model, row.bytes, row.top1) for row in results.models}
    # two models have the method and bits of w4's: cluster fits, uniform does not
    assert [entry["measured"] for entry in values["models"]] == ["float", "cluster-w4", None]
    assert [entry["top1"] for entry in values["models"]] == [96.5, 95.0, None]


def test_without_results_nothing_is_claimed(write):
    values = write()
    assert values["accuracy"] is None and {entry["top1"] for entry in values["models"]} == {None}


def test_top1_is_the_mean_over_seeds(write, results):
    again = ModelResult("cluster-w4", "cluster", 4, 94.0, 3108, 4.4, 360, 1, "per_tensor", True)
    values = write(results=Results(results.dataset, [*results.models, again]))
    assert values["models"][1]["top1"] == 94.5


def test_measured_says_which_figure_is_whose(write, results):
    values = write(results=results, measured={"w4": "uniform-w4"})
    assert values["models"][1]["measured"] == "uniform-w4" and values["models"][1]["top1"] == 80.25


def test_classifiers_of_other_architectures(write, processor, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    (tmp_path / "resnet" / "onnx").mkdir()
    (tmp_path / "resnet" / "onnx" / "model.onnx").write_bytes(b"onnx")
    values = write({"float": tmp_path / "resnet"}, processor=processor)
    assert values["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"] and values["models"][0]["bits"] == 32


def test_models_from_memory_need_a_processor(write, tiny_model):
    with pytest.raises(ValueError, match="no model is given as a folder: pass processor="):
        write({"w4": tiny_model(4)})


def test_exporting_names_the_extra(write, tiny_model, processor, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"repvgg-hf\[onnx\]"):
        write({"w4": tiny_model(4)}, processor=processor)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"models": {}}, "models is empty"),
        ({"license": "free"}, "license 'free' is none"),
        ({"title": " "}, "title must be a line of text"),
        ({"title": "hf_" + "a" * 34}, "access token"),
        ({"measured": {"w5": "cluster-w4"}}, "measured names w5, and models has w2, float, w4"),
        ({"measured": {"w4": "cluster-w4"}}, r"measured\['w4'\] is 'cluster-w4', and results.models has none"),
        ({"images": {"A cat": "missing.png"}}, r"images\['A cat'\] is missing.png, which can't be read"),
        ({"onnxruntime_web": "elsewhere"}, "got elsewhere: `npm install onnxruntime-web` puts it into node_modules"),
    ],
)
def test_bad_arguments_are_named(write, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write(**options)
    assert not (tmp_path / "page").exists() and not list(tmp_path.glob(".page*"))


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda family, model: family | {"a/b": model}, "the model's name 'a/b' becomes part of an address"),
        (lambda family, model: family | {"more": family["w4"]}, "'w4' and 'more' both have 4 bits"),
        (lambda family, model: family | {"more": family["w4"] / "onnx"}, "no readable config.json"),
        (
            lambda family, model: {"w4": object()},
            r"models\['w4'\] must be an image classifier of Transformers .*, got object",
        ),
        (
            lambda family, model: {"w4": model.base_model},
            r"models\['w4'\] is RepVGGModel: give one whose class ends in ForImageClassification",
        ),
    ],
    ids=["name", "same bits", "no checkpoint", "no model", "no classifier"],
)
def test_models_that_do_not_fit_are_named(write, family, tiny_model, break_it, message):
    with pytest.raises(ValueError, match=re.compile(message, re.I)):
        write(break_it(family, tiny_model(4)))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("id2label", {str(index): f"other {index}" for index in range(10)}, "has other classes than 'w2'"),
        ("architectures", ["ResNetModel"], "is ResNetModel: give one whose class ends in"),
        ("qat_config", {"bits": 4}, "is being trained with quantized weights"),
    ],
)
def test_checkpoints_that_do_not_fit_are_named(write, family, field, value, message):
    path = family["w4"] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"models\['w4'\].* {message}"):
        write()


def test_a_checkpoint_without_processor_is_named(write, family):
    (family["w2"] / "preprocessor_config.json").unlink()
    (family["w4"] / "preprocessor_config.json").unlink()
    (family["float"] / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match="float has no preprocessor_config.json: pass processor="):
        write()


def test_a_package_without_the_file_is_named(write, package):
    (package / "dist" / "ort-wasm-simd-threaded.wasm").unlink()
    with pytest.raises(ValueError, match=r"9.8.7\) has no dist/ort-wasm.*npm install onnxruntime-web@latest"):
        write()


def test_files_that_are_no_pictures_are_named(write, tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(ValueError, match=r"images\['x'\] is .*text.jpg, which can't be read"):
        write(images={"x": tmp_path / "text.jpg"})
    Image.new("RGB", (4, 4)).save(tmp_path / "x.bmp")
    with pytest.raises(ValueError, match="is a BMP file, .*give a JPEG, PNG or WebP file"):
        write(images={"x": tmp_path / "x.bmp"})


def test_a_folder_with_something_in_it_stays(write, tmp_path):
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="page is not empty"):
        write()
    assert [path.name for path in (tmp_path / "page").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "processor, channels, message",
    [
        (BitImageProcessor(resample=1), 3, r"BitImageProcessor.resample is 1, and the page resizes by 0 \(nearest\)"),
        (BitImageProcessor(do_center_crop=False, size={"shortest_edge": 8}), 3, "makes pictures of different sizes"),
        (BitImageProcessor(do_resize=False, do_center_crop=False), 3, "makes pictures of different sizes"),
        (BitImageProcessor(size={"shortest_edge": 8, "longest_edge": 9}), 3, "size must have shortest_edge, or height"),
        (BitImageProcessor(), 1, "image_mean has 3 values, and the models take 1 channels"),
        (BitImageProcessor(), 4, "The models take 4 channels"),
    ],
)
def test_processors_that_a_page_can_not_follow_are_named(processor, channels, message):
    with pytest.raises(ValueError, match=message):
        pixel_settings(processor, channels)


def test_crop_share_of_convnext():
    processor = ConvNextImageProcessor(size={"shortest_edge": 224}, crop_pct=0.875)
    settings = pixel_settings(processor, 3)
    assert settings["resize"] == {"shortest_edge": 256} and settings["crop"] == {"height": 224, "width": 224}
    settings = pixel_settings(ConvNextImageProcessor(size={"shortest_edge": 384}, crop_pct=0.875), 3)
    assert settings["resize"] == settings["crop"] == {"height": 384, "width": 384}


def test_command_writes_a_folder(tmp_path, family, package, picture, results, capsys):
    results.to_json(tmp_path / "results.json")
    arguments = ["--output_dir", str(tmp_path / "page"), "--onnxruntime_web", str(package), "--title", "Mine"]
    arguments += ["--license", "mit"]
    arguments += ["--models", *[f"{name}={folder}" for name, folder in family.items()], "--images", f"A cat={picture}"]
    main([*arguments, "--results_json", str(tmp_path / "results.json"), "--measured", "w4=uniform-w4"])
    assert "python -m http.server" in capsys.readouterr().out
    values = json.loads((tmp_path / "page" / "space.json").read_text("utf-8"))
    assert values["title"] == "Mine" and values["models"][1]["top1"] == 80.25


def test_command_reads_the_results_of_a_card(tmp_path, family, package, results):
    results.to_json(tmp_path / "results.json")
    card = {"repo_id": "org/x", "results": json.loads((tmp_path / "results.json").read_text())}
    (tmp_path / "card.json").write_text(json.dumps(card))
    arguments = [
        "--output_dir",
        str(tmp_path / "page"),
        "--onnxruntime_web",
        str(package),
        "--license",
        "mit",
        "--models",
    ]
    main([*arguments, f"w4={family['w4']}", "--results_json", str(tmp_path / "card.json")])
    values = json.loads((tmp_path / "page" / "space.json").read_text("utf-8"))
    assert values["accuracy"]["dataset"] == "digits, held out"


def test_command_publishes(hub, family, package, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    options = ["--license", "mit", "--visibility", "public", "--onnxruntime_web", str(package)]
    main(["--repo_id", REPO, "--models", f"w4={family['w4']}", *options])
    assert "org/page at " in capsys.readouterr().out and "models/w4.onnx" in hub.files(KEPT)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--output_dir", "page", "--models", "w4=x"], "the following arguments are required: --license"),
        (["--license", "mit", "--repo_id", "org/page", "--models", "w4=x"], "--visibility is not given"),
        (["--license", "mit", "--models", "w4=x"], "give --repo_id to publish the page, or --output_dir"),
        (["--license", "mit", "--output_dir", "page", "--models", "folder"], "--models takes <name>=<value>"),
        (["--output_dir", "page"], "--models"),
    ],
)
def test_command_names_what_is_missing(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_command_is_one_of_the_hubs():
    done = subprocess.run([sys.executable, "-m", "repvgg_hf.hub", "space", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--onnxruntime_web" in done.stdout


def test_results_without_quantized_models_make_no_plot(write):
    rows = [ModelResult("float", "float", 32, 96.5, 9736, 32.0, 360, 0)]
    assert write(results=Results(DatasetInfo("digits", "held out"), rows))["accuracy"] is None
