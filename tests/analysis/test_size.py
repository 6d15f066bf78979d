"""What a model takes on disk."""

import copy
import math

import pytest

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.analysis import bits_per_weight, checkpoint_bytes


@pytest.fixture
def model(tiny_config, randomize_batch_norms, generator):
    """In train form, with 5 convolutions and the classifier in the fused form."""
    return randomize_batch_norms(RepVGGForImageClassification(tiny_config(num_labels=8)), generator).eval()


def test_bits_per_weight(model):
    sizes = [conv.weight.numel() for conv in model.fused_convolutions().values()] + [model.classifier.weight.numel()]
    assert sizes == [8 * 3 * 9, 8 * 8 * 9, 8 * 4 * 9, 16 * 8 * 9, 16 * 8 * 9, 8 * 16]
    model.reparameterize()
    assert bits_per_weight(model) == 32
    assert bits_per_weight(copy.deepcopy(model).half()) == 16
    channels = [8, 8, 8, 16, 16, 8]

    def stored(bits, books, entry_bytes, scales):
        """Whole bytes of codes, then codebooks and float32 scales."""
        codes = sum(math.ceil(size * bits / 8) for size in sizes)
        return 8 * (codes + sum(books) * 2**bits * entry_bytes + 4 * scales * sum(channels)) / sum(sizes)

    cases = {
        (3, 6 * (1,), 2, True): {"bits": 3},
        (4, 6 * (1,), 1, True): {"bits": 4, "codebook_dtype": "int8"},
        (2, tuple(channels), 4, False): {"bits": 2, "granularity": "per_channel", "codebook_dtype": "float32"},
        (5, 6 * (1,), 2, True): {"bits": 5, "granularity": "per_channel", "method": "uniform"},
    }
    for expected, options in cases.items():
        assert bits_per_weight(copy.deepcopy(model).quantize(**options)) == pytest.approx(stored(*expected), rel=1e-12)
    partly = model.quantize(bits=3, modules_to_not_convert=["classifier"])
    convolutions = sum(math.ceil(size * 3 / 8) + 2 * 8 + 4 * out for size, out in zip(sizes[:5], channels))
    assert bits_per_weight(partly) == pytest.approx((8 * convolutions + 32 * sizes[5]) / sum(sizes), rel=1e-12)


def test_checkpoint_bytes(model, tmp_path):
    for folder, options in {"one": {}, "shards": {"max_shard_size": "1KB"}}.items():
        model.save_pretrained(tmp_path / folder, **options)
    files = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(files) > 1
    assert checkpoint_bytes(tmp_path / "shards") == sum(len(file.read_bytes()) for file in files)
    one = (tmp_path / "one" / "model.safetensors").read_bytes()
    header = int.from_bytes(one[:8], "little")
    data = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    assert checkpoint_bytes(str(tmp_path / "one")) == len(one) == 8 + header + data
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no .safetensors file: give a folder that save_pretrained wrote"):
        checkpoint_bytes(tmp_path / "empty")
