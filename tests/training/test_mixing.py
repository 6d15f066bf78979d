"""Mixed images, weights of classes, and their loss."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from transformers import TrainingArguments

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.recipes.train import weights_of_classes
from repvgg_hf.training.mixing import MixedBatches
from repvgg_hf.training.train_arguments import TrainArguments
from repvgg_hf.training.trainer import ImageTrainer


class Whole:
    """A dataset whose image `i` is `i` everywhere, of class `i % 3`."""

    def __len__(self):
        return 12

    def __getitems__(self, indices):
        indices = torch.as_tensor(indices)
        pixel_values = indices.float().reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)
        return {"pixel_values": pixel_values, "labels": indices % 3}


@pytest.mark.parametrize("kind", ["mixup", "cutmix", "both"])
def test_labels_are_the_shares_of_the_images(kind):
    torch.manual_seed(0)
    batch = MixedBatches(Whole(), 3, kind, alpha=1.0).__getitems__(list(range(12)))
    assert batch["pixel_values"].shape == (12, 3, 8, 8) and batch["labels"].shape == (12, 3)
    torch.testing.assert_close(batch["labels"].sum(1), torch.ones(12))
    # torchvision mixes each image with the one before it, all in the same share
    share = batch["labels"][1, 1]
    assert 0 < share < 1
    torch.testing.assert_close(batch["pixel_values"].mean((1, 2, 3))[1], share * 1 + (1 - share) * 0)


def test_weights_of_classes_are_scikit_learns():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2]).numpy()
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(weights_of_classes(labels, 3), torch.tensor(expected, dtype=torch.float32))
    assert weights_of_classes(labels, 4).shape == (4,)  # a class without images


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_in_training_and_in_evaluation(tiny_config, tmp_path, smoothing):
    model = RepVGGForImageClassification(tiny_config())
    classes = model.config.num_labels
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, label_smoothing_factor=smoothing)
    weights = torch.arange(1.0, classes + 1)
    trainer = ImageTrainer(model, args, class_weights=weights, soft_labels=True)
    pixel_values, shares = torch.randn(4, 3, 8, 8), torch.rand(4, classes).softmax(1)
    loss, outputs = trainer.compute_loss(model.train(), {"pixel_values": pixel_values, "labels": shares}, True)
    smoothed = shares * (1 - smoothing) + smoothing / classes
    expected = -(smoothed * weights * outputs.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, expected)
    labels = torch.tensor([0, 1, 2, 0])
    if smoothing == 0:  # with it Trainer smooths the loss of evaluation, too
        loss, outputs = trainer.compute_loss(model.eval(), {"pixel_values": pixel_values, "labels": labels}, True)
        chosen = outputs.logits.log_softmax(1)[torch.arange(4), labels]
        torch.testing.assert_close(loss, -chosen.mean())


@pytest.mark.parametrize(("option", "value"), [("mixing", "cut"), ("mixing_alpha", 0.0)])
def test_options_out_of_range(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"--{option} must be .*, got '?{value}"):
        TrainArguments(tmp_path, use_cpu=True, **{option: value})
