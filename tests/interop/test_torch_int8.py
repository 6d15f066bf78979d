"""Quantized models as int8 programs of PyTorch: exported, and compiled by inductor."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_models import NEAR, agreement, pictures, residual_network, trained, trained_float
from quantized_models import repvgg
from torch.ao.quantization.fx import _decomposed  # noqa: F401

from repvgg_hf import RepVGGBackbone, compile_int8, export_program, load_engine
from repvgg_hf.interop.integers import integer_layers
from repvgg_hf.interop.programs import load_program

FORMATS = {
    "W4A8": {},
    "W2A8": {"bits": 2},
    "W8A8 without reduced range": {"bits": 8},
    "per channel": {"granularity": "per_channel"},
    "A4": {"activation_bits": 4},
    "squeeze and excitation": {"squeeze_excitation": True},
    "int8_symmetric": {"activation_scheme": "int8_symmetric"},
    "float classifier": {"modules_to_not_convert": ["classifier"]},
}


def weights_of(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    end = ".weight_int8"
    return {
        name.removeprefix("model.").removesuffix(end): tensor
        for name, tensor in program.state_dict.items()
        if name.endswith(end)
    }


class TestExportProgram:
    @pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
    def test_it_gives_the_models_logits(self, options):
        model, images = trained(**options), pictures(64, seed=3)[0]
        program = export_program(model, images)
        with torch.no_grad():
            expected, logits = model(images).logits, program.module()(images)
        same, near = agreement(logits, expected)
        assert same >= 0.999 and near >= NEAR
        assert expected.argmax(1).unique().numel() == 4

    @pytest.mark.parametrize("bits", [1, 3, 8])
    def test_weights_are_the_checkpoints_integers(self, bits, tmp_path):
        model = trained(bits)
        torch.export.save(export_program(model, pictures(2, seed=3)[0]), tmp_path / "model.pt2")
        found, layers = weights_of(torch.export.load(tmp_path / "model.pt2")), integer_layers(model)
        assert found.keys() == layers.keys()
        assert all(torch.equal(found[name], layer.weight) for name, layer in layers.items())

    def test_a_damaged_file_gives_no_log(self, tmp_path, caplog):
        path, logger = tmp_path / "model.pt2", logging.getLogger("torch.export")
        torch.export.save(export_program(trained(), pictures(2, seed=3)[0]), path)
        assert load_program(path).state_dict
        path.write_bytes(path.read_bytes()[:1000])
        level = logger.level
        with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="model.pt2 can't be loaded by PyTorch"):
            logger.addHandler(caplog.handler)  # torch's loggers pass nothing on
            try:
                load_engine(path)
            finally:
                logger.removeHandler(caplog.handler)
        assert not [record for record in caplog.records if record.name.startswith("torch.export")]
        assert logger.level == level

    def test_any_batch_and_size(self):
        model = trained()
        program = export_program(model, pictures(2, seed=3)[0], dynamic=True).module()
        for shape in ((1, 3, 16, 16), (5, 3, 24, 40)):
            images = torch.randn(shape)
            with torch.no_grad():
                assert torch.allclose(program(images), model(images).logits, atol=0.05)

    def test_a_saved_program_runs_without_this_package(self, tmp_path):
        model, images = trained(), pictures(8, seed=3)[0]
        torch.export.save(export_program(model, images), tmp_path / "model.pt2")
        torch.save(images, tmp_path / "images.pt")
        code = (
            "import sys, torch; from torch.ao.quantization.fx import _decomposed\n"
            "program = torch.export.load('model.pt2').module()\n"
            "torch.save(program(torch.load('images.pt')), 'logits.pt'); print('repvgg_hf' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert result.stdout.strip() == "False", result.stderr
        with torch.no_grad():
            assert agreement(torch.load(tmp_path / "logits.pt"), model(images).logits)[0] == 1

    def test_a_backbone_gives_its_feature_maps(self, tiny_config):
        model = repvgg(tiny_config(out_features=["stage1", "stage2"]), model_class=RepVGGBackbone)
        images = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            expected, found = model(images).feature_maps, export_program(model, images).module()(images).feature_maps
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=1e-3 * other.abs().max())

    def test_no_integers(self):
        images = pictures(2, seed=3)[0]
        with pytest.raises(ValueError, match="is not quantized"):
            export_program(trained_float(), images)
        with pytest.raises(ValueError, match="being trained quantized"):
            export_program(trained_float().prepare_qat(bits=4), images)


@pytest.mark.slow  # a compilation takes ten seconds
class TestCompileInt8:
    @pytest.fixture(autouse=True)
    def kernels(self):
        pytest.importorskip("torchao")
        torch._dynamo.reset()
        with torch._inductor.utils.fresh_cache():  # or the passes that are counted don't run
            yield

    @pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
    def test_it_gives_the_models_logits_by_int8_kernels(self, options):
        model, images = trained(**options), pictures(256, seed=3)[0]
        counters = torch._dynamo.utils.counters
        counters.clear()
        program = compile_int8(model, images)
        convolutions = counters["inductor"]["qconv_weight_prepack_matcher_count"]
        linear = counters["inductor"]["qlinear_weight_prepack_matcher_count"]
        assert convolutions + linear == len(integer_layers(model))
        with torch.no_grad():
            same, near = agreement(program(images), model(images).logits)
        assert same >= 0.996 and near >= NEAR  # of 256 images one may differ

    def test_another_network(self):
        model, images = residual_network(), pictures(64, seed=3)[0]
        with torch.no_grad():
            same, near = agreement(compile_int8(model, images)(images), model(images).logits)
        assert same == 1 and near >= NEAR

    def test_gradients_are_not_asked_for(self):
        images = pictures(2, seed=3)[0]
        program = compile_int8(trained(), images)
        assert not program(images.requires_grad_()).requires_grad

    def test_another_shape(self):
        program = compile_int8(trained(), pictures(2, seed=3)[0])
        with pytest.raises(ValueError, match=r"compiled for images \[2, 3, 16, 16\] and got \[1, 3, 16, 16\]"):
            program(pictures(1, seed=3)[0])


class TestBadInput:
    def test_no_integers(self):
        images = pictures(2, seed=3)[0]
        with pytest.raises(ValueError, match="is not quantized"):
            compile_int8(trained_float(), images)
        with pytest.raises(ValueError, match="being trained quantized"):
            compile_int8(trained_float().prepare_qat(bits=4), images)
        with pytest.raises(ValueError, match="activation_bits=None"):
            compile_int8(trained_float().quantize(bits=4, codebook_dtype="int8", channel_scale=True), images)

    def test_no_torchao(self, monkeypatch):
        pytest.importorskip("torchao")
        monkeypatch.setitem(sys.modules, "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", None)
        with pytest.raises(ImportError, match=r"repvgg-hf\[inductor\]"):
            compile_int8(trained(), pictures(2, seed=3)[0])

    def test_no_onednn(self, monkeypatch):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        with pytest.raises(RuntimeError, match="no oneDNN for x86"):
            compile_int8(trained(), pictures(2, seed=3)[0])


def test_it_is_imported_only_when_asked_for():
    rules = "torchao.quantization.pt2e.inductor_passes"
    code = f"import sys, repvgg_hf; repvgg_hf.compile_int8; print('{rules}' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert result.stdout.strip() == "False", result.stderr
