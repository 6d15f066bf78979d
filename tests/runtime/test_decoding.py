"""A layer decodes its weight when it is first used: whatever that first use is, and whatever happens before it."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.distributed
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForImageClassification

from repvgg_hf import ClusterConfig, RepVGGForImageClassification
from repvgg_hf.runtime.cluster_layers import ClusterLayer, cluster_layers


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, randomize_batch_norms):
    torch.manual_seed(0)
    model = randomize_batch_norms(RepVGGForImageClassification(tiny_config()), torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("quantized")
    model.eval().quantize("uniform", bits=4, channel_scale=True).save_pretrained(folder)
    return folder


@pytest.fixture
def model(folder):
    return RepVGGForImageClassification.from_pretrained(folder)


@pytest.fixture
def images(generator):
    return torch.randn(2, 3, 32, 32, generator=generator)


@pytest.fixture
def expected(folder, images):
    """The logits of a model that was decoded before it ran."""
    model = RepVGGForImageClassification.from_pretrained(folder)
    model.decode_weights()
    assert decoded(model) == cluster_layers(model).keys()
    with torch.no_grad():
        return model(images).logits


def decoded(model) -> set[str]:
    """The layers that keep a dense weight."""
    return {name for name, layer in cluster_layers(model).items() if "dense_weight" in dict(layer.named_buffers())}


class Logits(nn.Module):
    """What others wrap a model in to export it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values).logits


class TestLoadingDecodesNothing:
    @pytest.mark.parametrize("arguments", [{}, {"dtype": torch.bfloat16}, {"device_map": "auto"}], ids=str)
    def test_until_the_model_runs(self, folder, images, arguments):
        model = AutoModelForImageClassification.from_pretrained(folder, **arguments)
        assert len(cluster_layers(model)) == 6 and decoded(model) == set()
        model(images.to(model.dtype))
        assert decoded(model) == cluster_layers(model).keys()

    def test_nor_does_saving_or_moving(self, model, folder, tmp_path):
        model.cpu().save_pretrained(tmp_path)
        assert model.state_dict().keys() == copy.deepcopy(model).state_dict().keys()
        assert decoded(model) == set()
        assert (tmp_path / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()

    def test_on_the_fly_never_keeps_a_weight(self, folder, images, expected, monkeypatch):
        original, calls = ClusterLayer.decoded, []
        monkeypatch.setattr(ClusterLayer, "decoded", lambda layer: calls.append(layer) or original(layer))
        config = ClusterConfig(decode="on_the_fly")
        model = RepVGGForImageClassification.from_pretrained(folder, quantization_config=config)
        assert calls == []
        for count in (6, 12):
            assert torch.equal(model(images).logits, expected)
            assert len(calls) == count and decoded(model) == set()

    def test_a_weight_that_is_looked_at(self, model):
        weight = model.classifier.weight
        assert decoded(model) == {"classifier"} and model.classifier.weight is weight


def test_outputs_do_not_depend_on_when(model, images, expected):
    keys = model.state_dict().keys()
    for _ in range(2):
        assert torch.equal(model(images).logits, expected)
    assert model.state_dict().keys() == keys


@pytest.mark.parametrize(
    "change",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: saved_and_loaded(model)],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_made_before(change, model, images, expected):
    copied = change(model)
    assert decoded(copied) == set()
    assert torch.equal(copied(images).logits, expected)
    assert decoded(model) == set()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("load_inside", [False, True])
def test_first_use_under_inference_mode(load_inside, folder, images):
    """Leaves no inference tensors, with which a model could not train afterwards."""
    model = RepVGGForImageClassification.from_pretrained(folder)
    with torch.inference_mode():
        if load_inside:
            model = RepVGGForImageClassification.from_pretrained(folder)
        model(images)
    assert not any(layer.weight.is_inference() for layer in cluster_layers(model).values())
    if not load_inside:
        model.train()(images, labels=torch.tensor([0, 1])).loss.backward()
        assert model.repvgg.embeddings.layer.conv.bias.grad.any()


def test_threads_that_run_first_at_once(folder, images, expected):
    for _ in range(5):
        model = RepVGGForImageClassification.from_pretrained(folder)
        outputs, barrier = [None] * 6, threading.Barrier(6)

        def run(index, model=model, outputs=outputs, barrier=barrier):
            barrier.wait()
            with torch.no_grad():
                outputs[index] = model(images).logits

        threads = [threading.Thread(target=run, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for output in outputs:
            torch.testing.assert_close(output, expected, atol=1e-6, rtol=1e-5)


def graphs_of(model, images) -> list[int]:
    """Compile and run a model twice; the calls in each graph that was compiled."""
    graphs = []

    def backend(graph_module, example_inputs):
        graphs.append(len(graph_module.graph.find_nodes(op="call_function", target=torch.conv2d)))
        graphs.append(len(graph_module.graph.nodes))
        return graph_module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):
        compiled(images)
    return graphs


def test_a_compiled_model_decodes_while_it_is_traced(folder, model, images, expected):
    """One graph, the same as of a decoded model, without the decoding in it."""
    before = RepVGGForImageClassification.from_pretrained(folder)
    before.decode_weights()
    with torch.inference_mode():
        graphs = graphs_of(Logits(model), images)
        assert graphs == graphs_of(Logits(before), images) and len(graphs) == 2 and graphs[0] == 5
    assert decoded(model) == cluster_layers(model).keys()
    assert not any(layer.weight.is_inference() for layer in cluster_layers(model).values())
    assert torch.equal(model(images).logits, expected)


def test_a_compiled_model_that_changes(model, images, expected):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(images)
    model.to(torch.bfloat16)
    torch.testing.assert_close(compiled(images.bfloat16()).logits.float(), expected, atol=0.05, rtol=0.05)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["classifier.weight_codebook"] *= 2
    state["classifier.bias"] *= 0
    before = compiled(images.bfloat16()).logits - model.classifier.bias
    model.load_state_dict(state)
    torch.testing.assert_close(compiled(images.bfloat16()).logits, 2 * before, atol=0.01, rtol=0.01)


@pytest.mark.parametrize("decode_first", [False, True])
def test_exporting_a_model_that_never_ran(decode_first, model, images, expected):
    """Its graph decodes, unless the model was told to; the model itself keeps no stand-ins of the exporter."""
    if decode_first:
        model.decode_weights()
    program = torch.export.export(Logits(model), (images,))
    assert torch.equal(program.module()(images), expected)
    decodes = bool(program.graph.find_nodes(op="call_function", target=torch.ops.aten.index_select.default))
    assert decodes is not decode_first
    assert decoded(model) == (cluster_layers(model).keys() if decode_first else set())
    assert torch.equal(model(images).logits, expected)


def test_tensors_that_are_no_tensors_are_not_kept(model, images, expected):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(images))
    assert decoded(model) == set()
    torch.func.grad(lambda pixels: model(pixels).logits.sum())(images)
    assert decoded(model) == set()
    assert torch.equal(model(images).logits, expected)
    pickle.dumps(model)


def test_distributed_data_parallel(model, images, expected):
    """It lists a model's buffers when it wraps it, and sends them before each forward pass."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            assert torch.equal(wrapped(images).logits, expected)
    finally:
        torch.distributed.destroy_process_group()
