"""PyTorch's tools, and those built on it, take the model in all of its forms."""

import copy
import logging
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parameters_to_vector, prune, vector_to_parameters

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.compression.layers import logger
from repvgg_hf.runtime.cluster_layers import ClusterConv2d

FORMS = ["branches", "fused", "quantized", "quantized inputs", "qat", "fused qat"]
FLOAT_FORMS = FORMS[:2]


@pytest.fixture(scope="module")
def make_model(tiny_config, randomize_batch_norms):
    """`make_model(form)`: of random weights, in eval mode."""

    def make(form: str) -> RepVGGForImageClassification:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        model = randomize_batch_norms(RepVGGForImageClassification(tiny_config(oabn_threshold=1.0)), generator).eval()
        if form.startswith("fused"):
            model.reparameterize()
        if form == "quantized inputs":
            model.quantize(bits=4, activation_bits=8, calibration=torch.randn(4, 3, 16, 16, generator=generator))
        elif form == "quantized":
            model.quantize(bits=4)
        elif form.endswith("qat"):
            model.prepare_qat(bits=4)
        return model

    return make


@pytest.fixture
def images(generator):
    return torch.randn(4, 3, 16, 16, generator=generator)


def loaded(model, folder):
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


def kernels(model) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 4}


class TestDtypes:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    @pytest.mark.parametrize("form", FORMS)
    @torch.no_grad()
    def test_pixel_values_take_the_dtype_of_the_model(self, make_model, images, form, dtype):
        model = make_model(form).to(dtype)
        logits = model(images).logits
        assert logits.dtype == dtype
        assert torch.equal(logits, model(images.to(dtype)).logits)

    @pytest.mark.parametrize("form", FORMS)
    @torch.no_grad()
    def test_half_pixel_values(self, make_model, images, form):
        model = make_model(form)
        assert torch.equal(model(images.half()).logits, model(images.half().float()).logits)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_calibration_images(self, make_model, images, dtype):
        """Are used as the float32 numbers that they are."""
        rounded = images.to(dtype)
        models = [
            make_model("fused").quantize(bits=3, activation_bits=8, calibration=x) for x in (rounded, rounded.float())
        ]
        states = [model.state_dict() for model in models]
        assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())

    def test_integer_pixel_values_are_an_error(self, make_model):
        with pytest.raises(ValueError, match="pixel_values must be floating .* got torch.uint8: pass images"):
            make_model("branches")(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))


class TestLayout:
    @pytest.mark.parametrize("load", [False, True], ids=["made", "loaded"])
    @pytest.mark.parametrize("form", FORMS)
    def test_parameters_are_contiguous(self, make_model, form, load, tmp_path):
        model = make_model(form)
        model = loaded(model, tmp_path) if load else model
        vector = parameters_to_vector(model.parameters())
        assert len(vector) == model.num_parameters(only_trainable=True)
        vector_to_parameters(vector * 2, model.parameters())

    @pytest.mark.parametrize("load", [False, True], ids=["made", "loaded"])
    def test_inference_is_with_the_channels_last(self, make_model, images, load, tmp_path):
        model = make_model("fused")
        model = loaded(model, tmp_path) if load else model
        before = {name: (parameter, parameter.clone()) for name, parameter in kernels(model).items()}
        with torch.no_grad():
            model(images)
        for name, (parameter, values) in before.items():
            assert model.get_parameter(name) is parameter and torch.equal(parameter, values)
            assert parameter.is_contiguous(memory_format=torch.channels_last), name
        model.train()
        assert all(parameter.is_contiguous() for parameter in model.parameters())
        model.eval()(images)  # with gradients
        assert all(parameter.is_contiguous() for parameter in model.parameters())

    def test_a_chosen_layout_stays(self, make_model, images):
        model = make_model("fused").to(memory_format=torch.channels_last)
        with torch.no_grad():
            model(images)
        model.train()
        assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels(model).values())

    def test_shared_memory_is_left_alone(self, make_model, images):
        """Views of one tensor, as in FSDP's flat parameters, and what other processes see."""
        flat, shared = make_model("fused"), make_model("fused").share_memory()
        vector = parameters_to_vector(flat.parameters()).detach()
        vector_to_parameters(vector, flat.parameters())
        with torch.no_grad():
            logits = flat(images).logits
            shared(images)
            vector.zero_()
            assert not torch.equal(flat(images).logits, logits)
        assert all(parameter.is_contiguous() and parameter.is_shared() for parameter in shared.parameters())

    @pytest.mark.parametrize("form", ["branches", "fused", "qat", "fused qat"])
    def test_lbfgs(self, make_model, images, form):
        model = make_model(form).train()
        labels = torch.arange(4)
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.01, max_iter=4)
        losses = []

        def closure():
            optimizer.zero_grad()
            loss = model(images, labels=labels).loss
            loss.backward()
            losses.append(loss.item())
            return loss

        optimizer.step(closure)
        assert losses[-1] < losses[0]

    @pytest.mark.parametrize("form", FLOAT_FORMS)
    def test_pruned_layers(self, make_model, images, form):
        model = make_model(form)
        name = next(name for name, module in model.named_modules() if type(module) is nn.Conv2d)
        prune.l1_unstructured(model.get_submodule(name), "weight", amount=0.5)
        logits = model(images).logits
        calls = [
            model.reparameterize, model.quantize, model.prepare_qat,
            lambda: model.quantize(activation_bits=8, calibration=images),
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(
                ValueError, match=rf"{name}.weight is pruned.*prune.remove\(model.get_submodule\('{name}"
            ):
                call()
        prune.remove(model.get_submodule(name), "weight")
        torch.testing.assert_close(model.reparameterize()(images).logits, logits, atol=1e-5, rtol=1e-4)
        model.quantize()


class TestCompile:
    @pytest.mark.parametrize(
        ("form", "context"),
        [
            # each form and each context several times, both kinds of training form with gradients
            pytest.param(form, context, marks=() if sampled else pytest.mark.full)
            for form, contexts in {
                "branches": (True, False, True), "fused": (True, True, True), "quantized": (False, True, False),
                "quantized inputs": (True, False, False), "qat": (False, False, True),
                "fused qat": (False, True, False),
            }.items()
            for context, sampled in zip((torch.no_grad, torch.inference_mode, torch.enable_grad), contexts)
        ],
    )  # fmt: skip
    def test_loaded_model(self, make_model, images, form, context, tmp_path):
        """In one graph, the weights of which are not decoded before."""
        torch._dynamo.reset()
        model = make_model(form)
        model = loaded(model, tmp_path)
        with context():
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            actual = [compiled(images).logits for _ in range(2)]
            expected = model(images).logits
        for logits in actual:
            torch.testing.assert_close(logits, expected)

    @pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
    def test_gradient_checkpointing(self, make_model, images, use_reentrant):
        """Statistics are updated once, and the bounds in the backward pass are those of the forward pass."""
        torch._dynamo.reset()
        plain = make_model("branches").train()
        model = copy.deepcopy(plain)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        compiled, labels = torch.compile(model, backend="aot_eager"), torch.arange(4)
        for _ in range(2):
            losses = [function(images, labels=labels).loss for function in (plain, compiled)]
            sum(losses).backward()
        torch.testing.assert_close(losses[0], losses[1])
        for (name, expected), actual in zip(plain.named_parameters(), model.parameters()):
            torch.testing.assert_close(actual.grad, expected.grad, msg=name)
        for (name, expected), actual in zip(plain.named_buffers(), model.buffers()):
            torch.testing.assert_close(actual, expected, msg=name)


class OtherVersion:
    """What versions of Transformers give a checkpoint function to run, for a layer."""

    @staticmethod
    def forms(layer):
        from functools import partial

        return [layer, layer.__call__, partial(layer.__call__), partial(type(layer).forward, layer), lambda x: layer(x)]


@pytest.mark.parametrize("index", range(5), ids=["layer", "method", "partial", "forward", "function"])
def test_gradient_checkpointing_of_other_versions(make_model, images, index):
    """It depends on no more than that a layer has a function which is given what to run."""
    model = make_model("branches").train()
    expected = copy.deepcopy(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = model.repvgg.embeddings.layer
    function = layer._gradient_checkpointing_func
    layer.gradient_checkpointing = False
    output = function(OtherVersion.forms(layer)[index], images)
    output.sum().backward()
    plain = expected.repvgg.embeddings.layer
    plain(images).sum().backward()
    for (name, parameter), other in zip(plain.named_parameters(), layer.parameters()):
        assert torch.equal(other.grad, parameter.grad), name
    assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), plain.buffers()))


class TestFunc:
    @pytest.mark.parametrize("form", FORMS[:4])
    def test_vmap(self, make_model, images, form):
        model = make_model(form)
        logits = vmap(lambda image: model(image[None]).logits[0])(images)
        torch.testing.assert_close(logits, model(images).logits, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("form", FORMS[:4])
    def test_grad_of_the_pixels(self, make_model, images, form):
        model = make_model(form)
        actual = grad(lambda x: model(x).logits.square().sum())(images)
        each = vmap(grad(lambda x: model(x[None]).logits.square().sum()))(images)
        images.requires_grad_()
        (expected,) = torch.autograd.grad(model(images).logits.square().sum(), images)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(each, expected, atol=1e-4, rtol=1e-3)

    @pytest.mark.parametrize("form", FORMS[:4])
    def test_gradients_per_image(self, make_model, images, form):
        model = make_model(form)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

        def loss(parameters, image):
            return functional_call(model, parameters, (image[None],)).logits.square().sum()

        each = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
        model(images).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name].sum(dim=0), parameter.grad, atol=1e-3, rtol=1e-3, msg=name)

    @pytest.mark.parametrize("form", FORMS[:4])
    def test_ensemble(self, make_model, images, form):
        models = [make_model(form) for _ in range(2)]
        with torch.no_grad():
            models[1].classifier.bias.add_(1)
            parameters, buffers = torch.func.stack_module_state(models)
            logits = vmap(lambda p, b: functional_call(models[0], (p, b), (images,)).logits)(parameters, buffers)
            for index, model in enumerate(models):
                torch.testing.assert_close(logits[index], model(images).logits, atol=1e-5, rtol=1e-4)


class TestLoRA:
    @pytest.fixture
    def adapted(self, make_model, images):
        """A model in train form, all of whose branches' convolutions without groups have trained adapters."""
        peft = pytest.importorskip("peft", reason="peft is not installed")
        model = make_model("branches")
        targets = [
            name for name, module in model.named_modules()
            if type(module) is nn.Linear or (type(module) is nn.Conv2d and module.groups == 1)
        ]  # fmt: skip
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
        optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
        losses = []
        for _ in range(5):
            loss = adapted.train()(pixel_values=images, labels=torch.arange(4)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        return adapted.eval()

    @torch.no_grad()
    def test_fusing_takes_the_adapters_in(self, adapted, images, relative_error):
        """With the bounds that OABN has in training, whether they are merged before or not."""
        logits = adapted(pixel_values=images).logits
        with adapted.disable_adapter():
            assert relative_error(adapted(pixel_values=images).logits, logits) > 1e-2
        fused = copy.deepcopy(adapted).get_base_model().reparameterize()
        assert relative_error(fused(images).logits, logits) < 1e-5
        merged = adapted.merge_and_unload()
        assert relative_error(merged(images).logits, logits) < 1e-5
        assert relative_error(merged.reparameterize()(images).logits, logits) < 1e-5

    def test_other_adapters_are_an_error(self, make_model, images):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(r=2, target_modules=r".*\.stages\.0\.layers\.0\..*3x3\.conv", use_dora=True)
        with pytest.raises(ValueError, match="'default' .* does not just add a kernel .* use LoRA without variants"):
            peft.get_peft_model(make_model("branches"), config)(pixel_values=images)


@pytest.mark.parametrize("form", ["quantized", "quantized inputs"])
def test_num_parameters_of_a_quantized_model(make_model, form, tmp_path):
    """Is that of the float model that it stands for; codes don't train."""
    fused = make_model("fused")
    biases = sum(parameter.numel() for name, parameter in fused.named_parameters() if name.endswith("bias"))
    for model in (make_model(form), loaded(make_model(form), tmp_path)):
        assert model.num_parameters() == model.num_parameters(exclude_embeddings=True) == fused.num_parameters()
        assert model.num_parameters(only_trainable=True) == biases
        assert isinstance(model.repvgg.embeddings.layer.conv, ClusterConv2d)


class TestVerbosity:
    @pytest.mark.parametrize("verbosity", ["warning", "error"])
    def test_variable(self, verbosity):
        script = (
            "from repvgg_hf import RepVGGConfig, RepVGGForImageClassification as Model;"
            "Model(RepVGGConfig(stem_hidden_size=8, hidden_sizes=[8], depths=[1], strides=[2])).quantize('uniform', 8)"
        )
        environment = os.environ | {"TRANSFORMERS_VERBOSITY": verbosity}
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        assert ("216 weights for each codebook" in done.stderr) == (verbosity == "warning")
        assert "Fusing" not in done.stderr  # as asked for

    def test_function(self, caplog):
        from transformers.utils import logging as transformers_logging

        before = transformers_logging.get_verbosity()
        try:
            transformers_logging.set_verbosity_error()
            logger.warning("unwanted")
            logger.error("wanted")
            transformers_logging.set_verbosity_warning()
            logger.warning("heard")
        finally:
            transformers_logging.set_verbosity(before)
        assert [record.getMessage() for record in caplog.records] == ["wanted", "heard"]
        assert all(isinstance(record, logging.LogRecord) for record in caplog.records)
