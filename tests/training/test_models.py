"""The model that a recipe trains, from options or a checkpoint."""

import pytest
import torch

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.training.models import ModelArguments, build_model, build_processor, check_source
from repvgg_hf.training.pretrained import load_pretrained
from repvgg_hf.training.processors import make_processor
from repvgg_hf.training.splits import DataArguments


def test_a_new_model_has_the_sizes_and_labels_asked_for():
    args = ModelArguments(hidden_sizes=[8, 16], depths=[1, 2], stem_hidden_size=4, oabn_threshold=3.0)
    config = build_model(args, ["cat", "dog"]).config
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}
    assert (config.hidden_sizes, config.depths, config.strides) == ([8, 16], [1, 2], [1, 2])
    assert config.oabn and config.oabn_threshold == 3.0


def test_a_published_variant():
    config = build_model(ModelArguments(variant="a0", oabn=False), ["cat"] * 1).config
    assert config.hidden_sizes == [48, 96, 192, 1280] and not config.oabn and config.num_labels == 1


@pytest.fixture
def checkpoint(tmp_path):
    """`checkpoint(classes)`: the arguments that start from a tiny model of them, and its classifier."""

    def make(classes, **options):
        args = ModelArguments(hidden_sizes=[8], depths=[1], stem_hidden_size=4)
        model = build_model(args, classes)
        model.save_pretrained(tmp_path)
        return ModelArguments(model_name_or_path=str(tmp_path), **options), model.classifier.weight

    return make


def test_what_is_stored_in_bfloat16_trains_in_float32(checkpoint):
    args, _ = checkpoint(["cat", "dog"])
    RepVGGForImageClassification.from_pretrained(args.model_name_or_path).bfloat16().save_pretrained(
        args.model_name_or_path
    )
    args.ignore_mismatched_sizes = True
    kept, new = (build_model(args, classes) for classes in (["cat", "dog"], ["ox", "ant"]))
    pretrained = load_pretrained(args.model_name_or_path)
    for model in (kept, new, pretrained):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.config.dtype == torch.float32


@pytest.mark.parametrize("classes", [["a", "b", "c"], ["cat", "bee"], ["cat"]])
def test_a_checkpoint_with_other_classes(checkpoint, classes):
    args, weight = checkpoint(["cat", "dog"])
    with pytest.raises(ValueError, match=f"has 2 classes, the dataset {len(classes)}.*--ignore_mismatched_sizes"):
        build_model(args, classes)
    args.ignore_mismatched_sizes = True
    model = build_model(args, classes)
    assert model.config.id2label == dict(enumerate(classes))
    new = model.classifier.weight
    assert new.shape == (len(classes), 8) and new.isfinite().all() and not torch.isin(new, weight).any()


def test_a_checkpoint_keeps_its_names_and_their_order(checkpoint):
    args, weight = checkpoint(["dog", "cat"])
    for by_position, classes in ((False, ["cat", "dog"]), (True, ["ox", "ant"])):
        model = build_model(args, classes, by_position)
        assert model.config.id2label == {0: "dog", 1: "cat"} and model.config.label2id == {"dog": 0, "cat": 1}
        assert torch.equal(model.classifier.weight, weight)


def test_a_checkpoint_without_names_takes_the_datasets(checkpoint):
    args, weight = checkpoint(["LABEL_0", "LABEL_1"])
    model = build_model(args, ["dog", "cat"])
    assert model.config.id2label == {0: "dog", 1: "cat"} and torch.equal(model.classifier.weight, weight)


def test_one_channel():
    args = ModelArguments(hidden_sizes=[8], depths=[1], stem_hidden_size=4, num_channels=1)
    assert build_model(args, ["a", "b"])(torch.zeros(1, 1, 8, 8)).logits.shape == (1, 2)
    assert len(build_processor(None, DataArguments(), channels=1).image_mean) == 1


def test_processor():
    assert build_processor(None, DataArguments()).crop_size["height"] == 8  # the digits
    assert build_processor(None, DataArguments(dataset_name="x", image_size=32)).crop_size["height"] == 32
    with pytest.raises(ValueError, match="Give --image_size"):
        build_processor(None, DataArguments(dataset_name="x"))


def test_a_checkpoints_processor_keeps_all_but_the_size(checkpoint, tmp_path):
    args, _ = checkpoint(["a", "b"])
    name = args.model_name_or_path
    with pytest.raises(ValueError, match="has no image processor that can be loaded.*--image_size"):
        build_processor(name, DataArguments())
    assert build_processor(name, DataArguments(image_size=16, crop_ratio=0.5)).size["shortest_edge"] == 32
    make_processor(24, 0.75).save_pretrained(tmp_path)
    assert build_processor(name, DataArguments()).to_dict() == make_processor(24, 0.75).to_dict()
    assert build_processor(name, DataArguments(image_size=12)).to_dict() == make_processor(12, 0.75).to_dict()


def test_a_folder_without_configuration_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: give a folder"):
        check_source(str(tmp_path), None)
