"""The models: shapes, outputs, losses, fusing, and what they refuse."""

import copy

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoBackbone, AutoConfig, AutoModel, AutoModelForImageClassification

from repvgg_hf import ReparamConv2d, RepVGGBackbone, RepVGGConfig, RepVGGForImageClassification, RepVGGModel
from repvgg_hf.runtime.configuration_repvgg import VARIANTS
from repvgg_hf.runtime.modeling_repvgg import RepVGGLayer

LARGE = ("b1", "b2", "b3", "d2se")
AUTO_CLASSES = {
    AutoModel: RepVGGModel,
    AutoModelForImageClassification: RepVGGForImageClassification,
    AutoBackbone: RepVGGBackbone,
}


@pytest.fixture
def make_model(tiny_config, randomize_batch_norms, generator):
    def make(cls=RepVGGForImageClassification, **fields):
        return randomize_batch_norms(cls(tiny_config(**fields)), generator).eval()

    return make


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


class TestReparameterize:
    @pytest.mark.parametrize(
        "variant", [pytest.param(v, marks=pytest.mark.slow if v.startswith(LARGE) else ()) for v in VARIANTS]
    )
    @torch.no_grad()
    def test_every_variant(self, variant, randomize_batch_norms, keep_signal, relative_error, generator):
        model = RepVGGForImageClassification(RepVGGConfig.from_variant(variant, num_labels=10)).eval()
        keep_signal(randomize_batch_norms(model, generator), RepVGGLayer)
        pixel_values = torch.randn(2, 3, 32, 32, generator=generator)
        expected = model(pixel_values).logits
        assert relative_error(*expected) > 1e-2  # the images matter, or the next comparison would show nothing
        assert model.reparameterize() is model
        assert relative_error(model(pixel_values).logits, expected) <= 1e-4

    @pytest.mark.parametrize("fields", [{}, {"oabn": False}, {"use_squeeze_excitation": True}], ids=str)
    @pytest.mark.parametrize(
        "branches",
        [["3x3", "1x1", "identity"], ["3x3", "1x3", "3x1"], ["3x3", "3x3", "1x1", "identity"], ["3x3"]],
        ids="+".join,
    )
    def test_other_blocks(self, make_model, images, relative_error, branches, fields):
        model = make_model(block_branches=branches, oabn_threshold=1.0, **fields)
        expected = model(images).logits
        model.reparameterize()
        assert relative_error(model(images).logits, expected) <= 1e-4

    def test_form(self, make_model):
        model = make_model().reparameterize()
        assert model.config.deploy
        assert not any(isinstance(module, (ReparamConv2d, nn.BatchNorm2d)) for module in model.modules())
        built_fused = RepVGGForImageClassification(model.config)
        assert built_fused.state_dict().keys() == model.state_dict().keys()
        built_fused.load_state_dict(model.state_dict())

    @pytest.mark.parametrize("cls", [RepVGGModel, RepVGGBackbone])
    def test_models_without_head(self, make_model, images, relative_error, cls):
        model = make_model(cls, out_indices=[0, 1, 2])
        expected = model(images)[0]
        actual = model.reparameterize()(images)[0]
        pairs = zip(actual, expected) if cls is RepVGGBackbone else [(actual, expected)]
        assert all(relative_error(fused, branches) <= 1e-5 for fused, branches in pairs)

    def test_twice_is_once(self, make_model):
        model = make_model().reparameterize()
        before = copy.deepcopy(model.state_dict())
        model.reparameterize()
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_bfloat16_fuses_in_float32(self, make_model):
        model = make_model().bfloat16()
        reference = copy.deepcopy(model).float().reparameterize().bfloat16()
        model.reparameterize()
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
        for name, tensor in reference.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name

    @pytest.mark.parametrize("field", ["weight", "running_mean", "running_var"])
    def test_a_broken_block_is_named_and_nothing_changes(self, make_model, field):
        model = make_model()
        block = model.repvgg.encoder.stages[1].layers[0].conv
        getattr(block.branches["1x1"].norm, field).data[2] = float("nan")
        keys = list(model.state_dict())
        with pytest.raises(
            ValueError, match=r"Block 'repvgg.encoder.stages.1.layers.0.conv' can't be fused.*look for NaN"
        ):
            model.reparameterize()
        assert list(model.state_dict()) == keys
        assert not model.config.deploy
        block.branches["1x1"].norm.reset_parameters()
        assert model.reparameterize().config.deploy

    def test_offloaded_weights_are_named(self, tiny_config):
        with torch.device("meta"):
            model = RepVGGForImageClassification(tiny_config())
        with pytest.raises(
            ValueError, match=r"repvgg\.embeddings\..* is offloaded .*: load the model without device_map"
        ):
            model.reparameterize()

    def test_a_part_of_a_model_is_refused(self, make_model):
        encoder = make_model().repvgg.encoder
        keys = encoder.state_dict().keys()
        for method in ("reparameterize", "quantize", "prepare_qat"):
            with pytest.raises(ValueError, match=rf"a part of a model.*call {method}\(\) on the whole model"):
                getattr(encoder, method)()
        assert not encoder.config.deploy and encoder.state_dict().keys() == keys

    def test_the_result_can_be_fine_tuned(self, make_model, images):
        model = make_model().reparameterize().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        before = copy.deepcopy(dict(model.named_parameters()))
        losses = []
        for _ in range(2):
            loss = model(images, labels=torch.tensor([1, 2])).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] < losses[0]
        for name, parameter in model.named_parameters():
            assert parameter.requires_grad and not torch.equal(parameter, before[name]), name


class TestOutputs:
    def test_shapes(self, make_model, images):
        outputs = make_model(RepVGGModel)(images, output_hidden_states=True)
        shapes = [tuple(hidden_state.shape) for hidden_state in outputs.hidden_states]
        assert shapes == [(2, 8, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4)]
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        assert torch.equal(outputs.pooler_output, outputs.last_hidden_state.mean(dim=(2, 3)))
        assert make_model(RepVGGModel)(images).hidden_states is None

    def test_classifier(self, make_model, images):
        model = make_model()
        outputs = model(images, output_hidden_states=True)
        pooled = model.repvgg(images).pooler_output
        assert torch.equal(outputs.logits, F.linear(pooled, model.classifier.weight, model.classifier.bias))
        assert outputs.loss is None
        assert len(outputs.hidden_states) == 3

    def test_config_switches(self, make_model, images):
        assert len(make_model(output_hidden_states=True)(images).hidden_states) == 3
        logits, hidden_states = make_model(return_dict=False, output_hidden_states=True)(images)
        assert (tuple(logits.shape), len(hidden_states)) == ((2, 5), 3)

    def test_tuples(self, make_model, images):
        model = make_model()
        outputs = model(images, labels=torch.tensor([0, 1]))
        loss, logits = model(images, labels=torch.tensor([0, 1]), return_dict=False)
        assert torch.equal(loss, outputs.loss) and torch.equal(logits, outputs.logits)
        last, pooled = model.repvgg(images, return_dict=False)
        assert (tuple(last.shape), tuple(pooled.shape)) == ((2, 16, 4, 4), (2, 16))
        backbone = make_model(RepVGGBackbone, out_indices=[1, 2])
        (maps,) = backbone(images, return_dict=False)[:1]
        assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 8, 8, 8), (2, 16, 4, 4)]

    @pytest.mark.parametrize("indices", [[0], [2], [0, 2], [0, 1, 2]], ids=str)
    def test_backbone(self, make_model, images, indices):
        backbone = make_model(RepVGGBackbone, out_indices=indices)
        hidden_states = backbone(images, output_hidden_states=True).hidden_states
        maps = backbone(images).feature_maps
        assert backbone(images).hidden_states is None
        assert backbone.channels == [[8, 8, 16][index] for index in indices] == [m.shape[1] for m in maps]
        assert all(torch.equal(m, hidden_states[index]) for m, index in zip(maps, indices))

    def test_squeeze_excitation(self, make_model, images):
        model = make_model(use_squeeze_excitation=True, squeeze_ratio=4)
        layer = model.repvgg.encoder.stages[0].layers[0]
        assert layer.attention.fc1.weight.shape == (2, 8, 1, 1)
        x = layer.conv(model.repvgg.embeddings(images))
        hidden = F.relu(x.mean((2, 3)) @ layer.attention.fc1.weight[:, :, 0, 0].T + layer.attention.fc1.bias)
        gate = torch.sigmoid(hidden @ layer.attention.fc2.weight[:, :, 0, 0].T + layer.attention.fc2.bias)
        torch.testing.assert_close(layer(model.repvgg.embeddings(images)), F.relu(x * gate[:, :, None, None]))

    def test_groups_of_every_second_layer(self, tiny_config):
        model = RepVGGModel(tiny_config(hidden_sizes=[8, 8], depths=[3, 2], groups=4))
        assert [[layer.conv.groups for layer in stage.layers] for stage in model.encoder.stages] == [[1, 4, 1], [4, 1]]
        assert model.embeddings.layer.conv.groups == 1

    @pytest.mark.parametrize("deploy", [False, True], ids=["train_form", "deploy"])
    def test_initialization(self, tiny_config, deploy):
        torch.manual_seed(0)
        model = RepVGGForImageClassification(tiny_config(hidden_sizes=[64, 64], deploy=deploy))
        for name, module in model.named_modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
                fan_out = module.out_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
                fan_out *= module.groups  # as PyTorch counts
                assert 0.8 < module.weight.std() / (2 / fan_out) ** 0.5 < 1.25, name
            if isinstance(module, nn.BatchNorm2d):
                assert (module.weight == 1).all() and (module.bias == 0).all() and (module.running_var == 1).all()
        assert model.classifier.weight.std() < 0.05


class TestInputs:
    @pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 47), (47, 33), (5, 64)], ids=str)
    @pytest.mark.parametrize("deploy", [False, True], ids=["train_form", "deploy"])
    def test_any_size(self, make_model, generator, size, deploy):
        model = make_model(deploy=deploy)
        outputs = model(torch.randn(1, 3, *size, generator=generator), output_hidden_states=True)
        assert outputs.logits.shape == (1, 5) and outputs.logits.isfinite().all()
        halved = list(size)
        for hidden_state in outputs.hidden_states:
            halved = [(extent + 1) // 2 for extent in halved]
            assert list(hidden_state.shape[2:]) == halved

    def test_images_do_not_mix(self, make_model, images):
        model = make_model()
        torch.testing.assert_close(model(images).logits[1:], model(images[1:]).logits)

    @pytest.mark.parametrize("shape", [(1, 1, 8, 8), (1, 4, 8, 8), (3, 8, 8), (8, 8), (1, 8, 8, 3)], ids=str)
    @pytest.mark.parametrize("cls", [RepVGGForImageClassification, RepVGGBackbone])
    def test_other_shapes_are_refused(self, make_model, cls, shape):
        with pytest.raises(ValueError) as raised:
            make_model(cls)(torch.zeros(shape))
        for part in ("[batch, 3, height, width]", str(list(shape)), "image processor", "num_channels"):
            assert part in str(raised.value)

    def test_no_image(self, make_model):
        with pytest.raises(ValueError, match="You have to specify pixel_values"):
            make_model()()

    def test_other_channel_counts(self, make_model, generator):
        assert make_model(num_channels=1)(torch.randn(1, 1, 8, 8, generator=generator)).logits.shape == (1, 5)


class TestLoss:
    def test_one_label(self, make_model, images):
        labels = torch.tensor([3, 1])
        outputs = make_model()(images, labels=labels)
        torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, labels))

    def test_several_labels(self, make_model, images):
        labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 0, 0, 1]])
        outputs = make_model(problem_type="multi_label_classification")(images, labels=labels)
        torch.testing.assert_close(outputs.loss, F.binary_cross_entropy_with_logits(outputs.logits, labels))

    def test_regression(self, make_model, images):
        labels = torch.tensor([0.5, -2.0])
        outputs = make_model(num_labels=1)(images, labels=labels)
        torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits.squeeze(), labels))
        labels = torch.randn(2, 5)
        outputs = make_model(problem_type="regression")(images, labels=labels)
        torch.testing.assert_close(outputs.loss, F.mse_loss(outputs.logits, labels))

    def test_the_loss_is_a_mean(self):
        """`Trainer` must divide it by the accumulation steps: it does for a model that takes no loss arguments."""
        assert RepVGGForImageClassification.accepts_loss_kwargs is False

    def test_dropout_is_before_the_classifier(self, make_model, images):
        model = make_model(classifier_dropout=0.5)
        expected = model(images).logits
        assert torch.equal(model(images).logits, expected)
        model.dropout.train()
        assert not torch.equal(model(images).logits, expected)


class TestAutoClasses:
    @pytest.mark.parametrize(("auto", "cls"), AUTO_CLASSES.items(), ids=lambda value: value.__name__)
    def test_from_config(self, tiny_config, auto, cls):
        assert type(auto.from_config(tiny_config())) is cls

    @pytest.mark.parametrize(("auto", "cls"), list(AUTO_CLASSES.items())[:2], ids=lambda value: value.__name__)
    def test_from_a_folder(self, make_model, tmp_path, images, auto, cls):
        model = make_model(cls)
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config) is RepVGGConfig
        loaded = auto.from_pretrained(tmp_path)
        assert type(loaded) is cls and loaded.config.hidden_sizes == model.config.hidden_sizes
        torch.testing.assert_close(loaded(images)[0], model(images)[0])

    def test_backbone_from_a_folder(self, make_model, tmp_path, monkeypatch, images):
        model = make_model(RepVGGBackbone, out_indices=[1, 2])
        model.save_pretrained(tmp_path / "backbone")
        monkeypatch.setattr(HfApi, "repo_exists", lambda self, repo_id: True)  # AutoBackbone asks it of a folder, too
        for loaded in (
            AutoBackbone.from_pretrained(tmp_path / "backbone"),
            RepVGGBackbone.from_pretrained(tmp_path / "backbone"),
        ):
            assert type(loaded) is RepVGGBackbone
            for actual, expected in zip(loaded(images).feature_maps, model(images).feature_maps, strict=True):
                torch.testing.assert_close(actual, expected)

    @pytest.mark.parametrize("cls", [RepVGGModel, RepVGGBackbone])
    def test_base_model_of_a_classifier(self, make_model, tmp_path, images, cls):
        classifier = make_model()
        classifier.save_pretrained(tmp_path)
        model, info = cls.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        expected = classifier(images, output_hidden_states=True).hidden_states[-1]
        actual = model(images)[0]
        torch.testing.assert_close(actual[0] if cls is RepVGGBackbone else actual, expected)
