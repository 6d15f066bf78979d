"""Quantized checkpoints: every way to load them, saving them again, and files that are damaged or do not fit."""

import copy
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from transformers import AutoModelForImageClassification, BitImageProcessor, Trainer, TrainingArguments, modeling_utils

from repvgg_hf import ClusterConfig, RepVGGForImageClassification
from repvgg_hf.runtime.cluster_layers import ClusterLayer

CONV = "repvgg.encoder.stages.0.layers.0.conv"
FORMATS = {
    "w3": {"bits": 3},
    "w4 int8": {"bits": 4, "codebook_dtype": "int8", "bits_overrides": {"classifier": 8}},
    "w2 per_channel": {"bits": 2, "granularity": "per_channel", "modules_to_not_convert": ["embeddings"]},
    "w5 uniform": {"bits": 5, "method": "uniform"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_config, randomize_batch_norms):
    """A float model, the same with 3 bits, and the folder where that is saved: made once, and copied for a test."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    float_model = randomize_batch_norms(RepVGGForImageClassification(tiny_config()), generator).eval()
    model = copy.deepcopy(float_model).quantize(bits=3)
    folder = tmp_path_factory.mktemp("made") / "quantized"
    model.save_pretrained(folder)
    return SimpleNamespace(float_model=float_model, model=model, folder=folder)


@pytest.fixture
def float_model(made):
    return copy.deepcopy(made.float_model)


@pytest.fixture
def model(made):
    return copy.deepcopy(made.model)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "quantized")


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


@torch.no_grad()
def logits(model, images):
    return model(images).logits


def decoded_weights(model):
    return {name: layer.weight for name, layer in model.named_modules() if isinstance(layer, ClusterLayer)}


def assert_same_tensors(actual: dict, expected: dict):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def assert_same(loaded, model, images):
    """The same weights to the last bit; logits to rounding, as theirs depends on where the weights lie in memory."""
    assert loaded.is_quantized
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert_same_tensors(decoded_weights(loaded), decoded_weights(model))
    torch.testing.assert_close(logits(loaded, images), logits(model, images), atol=1e-6, rtol=1e-5)


def run_fresh(code: str) -> None:
    """Run `code` in a new Python process, which has imported nothing."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr


class TestFreshProcess:
    def test_auto_classes_pipeline_and_backbone(self, model, folder, images, tmp_path):
        processor = BitImageProcessor(
            size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3,
            image_std=[0.25] * 3,
        )  # fmt: skip
        processor.save_pretrained(folder)
        code = f"""
import repvgg_hf, torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, pipeline
torch.set_num_threads(1)
folder, images = {str(folder)!r}, torch.load({str(tmp_path / "images.pt")!r})
picture = Image.frombytes("RGB", (32, 32), bytes(i * 7 % 256 for i in range(32 * 32 * 3)))
with torch.no_grad():
    result = {{
        "AutoModel": AutoModel.from_pretrained(folder)(images).last_hidden_state,
        "classifier": AutoModelForImageClassification.from_pretrained(folder)(images).logits,
        "backbone": repvgg_hf.RepVGGBackbone.from_pretrained(folder, out_indices=[1, 2])(images).feature_maps,
        "pipeline": pipeline("image-classification", folder)(picture, top_k=5),
    }}
torch.save(result, {str(tmp_path / "result.pt")!r})
"""
        torch.save(images, tmp_path / "images.pt")
        run_fresh(code)
        result = torch.load(tmp_path / "result.pt")

        picture = Image.frombytes("RGB", (32, 32), bytes(i * 7 % 256 for i in range(32 * 32 * 3)))
        with torch.no_grad():
            outputs = model.repvgg(images, output_hidden_states=True)
            scores = model(**processor(picture, return_tensors="pt")).logits.softmax(-1)[0]

        expected = {
            "AutoModel": outputs.last_hidden_state,
            "classifier": logits(model, images),
            "backbone": outputs.hidden_states[1:],
        }
        for name, output in expected.items():
            torch.testing.assert_close(result[name], output, atol=1e-6, rtol=1e-5)
        labels = {model.config.id2label[index]: score for index, score in enumerate(scores.tolist())}
        assert {entry["label"]: entry["score"] for entry in result["pipeline"]} == pytest.approx(labels, abs=1e-5)


class TestLoading:
    @pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
    def test_comes_back_and_saves_to_the_same_bytes(self, float_model, images, tmp_path, options):
        model = float_model.quantize(**options)
        model.save_pretrained(tmp_path / "first")
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "first")
        assert_same(loaded, model, images)
        loaded.save_pretrained(tmp_path / "second")
        for name in ("model.safetensors", "config.json"):
            assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()

    def test_device_map(self, model, folder, images):
        loaded = RepVGGForImageClassification.from_pretrained(folder, device_map="auto")
        assert_same(loaded.cpu(), model, images)

    def test_shards(self, model, images, tmp_path):
        model.save_pretrained(tmp_path, max_shard_size="1KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert_same(RepVGGForImageClassification.from_pretrained(tmp_path), model, images)

    def test_bfloat16_is_what_is_computed_not_what_is_stored(self, model, folder, images, tmp_path):
        loaded = RepVGGForImageClassification.from_pretrained(folder, dtype=torch.bfloat16)
        assert loaded.dtype == logits(loaded, images.bfloat16()).dtype == torch.bfloat16
        for name, weight in decoded_weights(model).items():
            assert torch.equal(loaded.get_submodule(name).weight, weight.bfloat16())
        loaded.save_pretrained(tmp_path / "again")
        stored, again = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
        quantized = {name: tensor for name, tensor in stored.items() if ".weight_" in name}
        assert len(quantized) == 3 * len(decoded_weights(model))
        assert_same_tensors({name: again[name] for name in quantized}, quantized)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("form", ["train", "deploy"])
    def test_a_float_checkpoint_is_quantized_on_loading(self, float_model, images, tmp_path, form, dtype):
        if form == "deploy":
            float_model.reparameterize()
        float_model.save_pretrained(tmp_path / "float")
        config = ClusterConfig(bits=4, bits_overrides={"classifier": 6})
        loaded = AutoModelForImageClassification.from_pretrained(
            tmp_path / "float", quantization_config=config, dtype=dtype
        )
        expected = float_model.quantize(config).to(dtype)
        assert loaded.dtype == dtype
        assert_same_tensors(loaded.state_dict(), expected.state_dict())
        assert_same_tensors(decoded_weights(loaded), decoded_weights(expected))
        loaded.save_pretrained(tmp_path / "quantized")
        assert_same_tensors(
            RepVGGForImageClassification.from_pretrained(tmp_path / "quantized").state_dict(), expected.state_dict()
        )

    def test_decoding_on_the_fly_is_chosen_on_loading(self, model, folder, images):
        loaded = RepVGGForImageClassification.from_pretrained(
            folder, quantization_config=ClusterConfig(decode="on_the_fly")
        )
        assert all(layer.on_the_fly for layer in loaded.modules() if isinstance(layer, ClusterLayer))
        assert_same(loaded, model, images)

    @pytest.mark.parametrize("save_again", [False, True], ids=["run", "save"])
    def test_offloaded_to_disk(self, model, folder, images, tmp_path, save_again):
        loaded = RepVGGForImageClassification.from_pretrained(
            folder, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
        )
        if save_again:
            loaded.save_pretrained(tmp_path / "again")
            assert_same(RepVGGForImageClassification.from_pretrained(tmp_path / "again"), model, images)
        else:
            torch.testing.assert_close(logits(loaded, images), logits(model, images), atol=1e-6, rtol=1e-5)

    def test_trainer_evaluates(self, model, folder, images, tmp_path):
        labels = torch.tensor([1, 3])

        class Images(Dataset):
            def __len__(self):
                return len(images)

            def __getitem__(self, index):
                return {"pixel_values": images[index], "labels": labels[index]}

        loaded = RepVGGForImageClassification.from_pretrained(folder)
        arguments = TrainingArguments(tmp_path / "out", report_to="none", use_cpu=True)
        metrics = Trainer(loaded, arguments, eval_dataset=Images()).evaluate()
        expected = torch.nn.functional.cross_entropy(logits(model, images), labels).item()
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)

    def test_compiles_to_one_graph_that_decodes(self, model, folder, images):
        config = ClusterConfig(decode="on_the_fly")
        loaded = RepVGGForImageClassification.from_pretrained(folder, quantization_config=config)
        torch._dynamo.reset()
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, images), logits(model, images), atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("number", [1, 2])
    def test_an_interrupted_save_leaves_the_old_checkpoint(
        self, model, folder, images, float_model, monkeypatch, number
    ):
        other = RepVGGForImageClassification.from_pretrained(folder).dequantize().quantize(bits=2)
        original, calls = modeling_utils.safe_save_file, []

        def interrupted(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(modeling_utils, "safe_save_file", interrupted)
        with pytest.raises(KeyboardInterrupt):
            other.save_pretrained(folder, max_shard_size="1KB")
        assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json"}
        assert_same(RepVGGForImageClassification.from_pretrained(folder), model, images)


def edit_config(folder, **fields):
    """Change fields of `quantization_config`; `None` removes one."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        config["quantization_config"].pop(name)
        if value is not None:
            config["quantization_config"][name] = value
    path.write_text(json.dumps(config))


def edit_tensors(folder, edit):
    """Save what `edit` makes of the tensors, without a checksum that would notice."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, checksum=None)


def replace(name, change):
    def edit(tensors):
        tensors[f"{CONV}.{name}"] = change(tensors[f"{CONV}.{name}"])

    return edit


def with_first_entry(value):
    def change(codebook):
        codebook[0, 0] = value
        return codebook

    return change


EDITS = {
    "short codes": (replace("weight_codes", lambda codes: codes[:-1].clone()), "weight_codes in .*model.safetensors"),
    "long codes": (replace("weight_codes", lambda codes: codes.repeat(2)), "weight_codes in .*model.safetensors"),
    "dtype of codes": (replace("weight_codes", lambda codes: codes.int()), "weight_codes in .*is torch.int32"),
    "dtype of codebook": (replace("weight_codebook", lambda book: book.float()), "weight_codebook in .*float32"),
    "dtype of scale": (replace("weight_scale", lambda scale: scale.half()), "weight_scale in .* is torch.float16"),
    "shape of codebook": (replace("weight_codebook", lambda book: book[:, :4].clone()), r"weight_codebook in .*1, 4"),
    "unsorted codebook": (replace("weight_codebook", lambda book: book.flip(1)), "weight_codebook is not ascending"),
    "NaN codebook": (replace("weight_codebook", with_first_entry(float("nan"))), "weight_codebook has NaN"),
    "infinite codebook": (replace("weight_codebook", with_first_entry(-float("inf"))), "weight_codebook has NaN or"),
    "NaN scale": (replace("weight_scale", lambda scale: scale * float("nan")), "weight_scale has NaN"),
    "no codes": (lambda tensors: tensors.pop(f"{CONV}.weight_codes"), "weight_codes .* is not in .*model.safetensors"),
    "no scale": (lambda tensors: tensors.pop(f"{CONV}.weight_scale"), "weight_scale .* is not in .*model.safetensors"),
    "no bias": (lambda tensors: tensors.pop(f"{CONV}.bias"), "bias .*is not in .*model.safetensors"),
}  # fmt: skip


class TestBadFiles:
    """A ValueError that names the tensor or the file, and what to do."""

    FIX = "ownload|quantize (the float model )?again"

    def refused(self, folder, message, fix=FIX):
        with pytest.raises(ValueError, match=message) as raised:
            AutoModelForImageClassification.from_pretrained(folder)
        assert raised.match(fix)

    def test_truncated(self, folder):
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[:-1])
        self.refused(folder, str(folder))

    @pytest.mark.parametrize("tensor", ["weight_codes", "weight_codebook", "weight_scale", "bias"])
    def test_a_flipped_bit_in_a_tensor(self, folder, tensor):
        data = bytearray((folder / "model.safetensors").read_bytes())
        header = int.from_bytes(data[:8], "little")
        start, _ = json.loads(data[8 : 8 + header])[f"{CONV}.{tensor}"]["data_offsets"]
        data[8 + header + start] ^= 1
        (folder / "model.safetensors").write_bytes(data)
        self.refused(folder, "model.safetensors")

    def test_flipped_bits_all_over_the_header(self, folder):
        """Refused, or harmless: a bit of the padding or of the metadata changes no tensor."""
        data = (folder / "model.safetensors").read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        intact = load_file(folder / "model.safetensors")
        expected = RepVGGForImageClassification.from_pretrained(folder).state_dict()
        refused = 0
        for position in range(0, end, 37):
            damaged = bytearray(data)
            damaged[position] ^= 1 << position % 7
            (folder / "model.safetensors").write_bytes(damaged)
            try:
                loaded = RepVGGForImageClassification.from_pretrained(folder)
            except ValueError as error:
                assert str(folder) in str(error), f"byte {position}"
                refused += 1
            else:
                assert_same_tensors(loaded.state_dict(), expected)
                assert_same_tensors(load_file(folder / "model.safetensors"), intact)
        assert refused > end // 37 // 2

    @pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
    def test_edited_tensors(self, folder, edit, message):
        edit_tensors(folder, edit)
        self.refused(folder, f"{CONV.removeprefix('repvgg.')}.{message}")

    def test_float_weights_under_a_quantized_config(self, folder, model):
        tensors = model.dequantize().state_dict()
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors", metadata={"format": "pt"},
        )  # fmt: skip
        self.refused(folder, "weight_codes .* is not in .*model.safetensors", "Remove quantization_config")

    def test_quantized_weights_under_a_float_config(self, folder):
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
        self.refused(folder, "quantized checkpoint and the model is not", "keep the quantization_config")

    def test_a_format_of_the_future(self, folder):
        edit_config(folder, format_version=2)
        self.refused(folder, "format_version 2, .* reads 1", "pip install -U repvgg-hf")

    @pytest.mark.parametrize("fields", [{"bits": 4}, {"granularity": "per_channel"}, {"codebook_dtype": "float32"}])
    def test_a_config_of_another_model(self, folder, fields):
        edit_config(folder, **fields, checksum=None)
        self.refused(folder, r"weight_code\w+ in .*model.safetensors is .* quantization_config asks for")

    def test_a_missing_scale_in_the_config(self, folder):
        edit_config(folder, channel_scale=False, checksum=None)
        self.refused(folder, "weight_scale in .*model.safetensors is none of the tensors")

    def test_branches_asked_for(self, folder):
        with pytest.raises(ValueError, match="quantization_config but deploy=False.*Set deploy to true"):
            RepVGGForImageClassification.from_pretrained(folder, deploy=False)
