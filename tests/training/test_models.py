"""The model that a recipe trains, from options or a checkpoint."""

import pytest

from repvgg_hf.training.models import ModelArguments, build_model, build_processor
from repvgg_hf.training.pictures import DataArguments


def test_a_new_model_has_the_sizes_and_labels_asked_for():
    args = ModelArguments(hidden_sizes=[8, 16], depths=[1, 2], stem_hidden_size=4, oabn_threshold=3.0)
    config = build_model(args, ["cat", "dog"]).config
    assert config.id2label == {0: "cat", 1: "dog"} and config.label2id == {"cat": 0, "dog": 1}
    assert (config.hidden_sizes, config.depths, config.strides) == ([8, 16], [1, 2], [1, 2])
    assert config.oabn and config.oabn_threshold == 3.0


def test_a_published_variant():
    config = build_model(ModelArguments(variant="a0", oabn=False), ["cat"] * 1).config
    assert config.hidden_sizes == [48, 96, 192, 1280] and not config.oabn and config.num_labels == 1


def test_a_checkpoint_with_other_classes(tmp_path):
    args = ModelArguments(hidden_sizes=[8], depths=[1], stem_hidden_size=4)
    build_model(args, ["cat", "dog"]).save_pretrained(tmp_path)
    args = ModelArguments(model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match="has 2 classes, the dataset 3.*--ignore_mismatched_sizes"):
        build_model(args, ["a", "b", "c"])
    args.ignore_mismatched_sizes = True
    assert build_model(args, ["a", "b", "c"]).classifier.out_features == 3


def test_processor():
    assert build_processor(None, DataArguments()).crop_size["height"] == 8  # the digits
    assert build_processor(None, DataArguments(dataset_name="x", image_size=32)).crop_size["height"] == 32
    with pytest.raises(ValueError, match="Give --image_size"):
        build_processor(None, DataArguments(dataset_name="x"))
