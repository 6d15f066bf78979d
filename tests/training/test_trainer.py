"""Our `Trainer` with a last batch of one image, on a network whose last maps are single pixels."""

import pytest
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments

from repvgg_hf import RepVGGForImageClassification
from repvgg_hf.training.trainer import ImageTrainer


class Images(Dataset):
    """Random images, each of a value of its own."""

    def __init__(self, count: int):
        self.pixels = torch.randn(count, 3, 8, 8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> dict:
        return {"pixel_values": self.pixels[index], "labels": index % 5}


@pytest.mark.parametrize(("images", "steps"), [(9, 4), (8, 4), (10, 6)])
def test_a_single_image_is_dropped_in_training_alone(images, steps, tiny_config, tmp_path):
    model = RepVGGForImageClassification(tiny_config(stem_stride=2))  # 8 pixels become 1
    args = TrainingArguments(
        tmp_path, num_train_epochs=2, per_device_train_batch_size=4, report_to="none", use_cpu=True
    )
    trainer = ImageTrainer(model, args, train_dataset=Images(images), eval_dataset=Images(9))
    assert trainer.train().global_step == steps and not args.dataloader_drop_last
    assert sum(len(batch["labels"]) for batch in trainer.get_eval_dataloader()) == 9


def test_evaluation_sees_every_image_where_training_drops_the_last(tiny_config, tmp_path):
    args = TrainingArguments(
        tmp_path, num_train_epochs=1, per_device_train_batch_size=4, per_device_eval_batch_size=4, report_to="none",
        use_cpu=True, dataloader_drop_last=True,
    )  # fmt: skip
    model = RepVGGForImageClassification(tiny_config())
    trainer = ImageTrainer(model, args, train_dataset=Images(11), eval_dataset=Images(7))
    assert trainer.train().global_step == 2
    assert len(trainer.predict(Images(3)).predictions) == 3
    assert trainer.evaluate()["eval_loss"] > 0 and len(trainer.get_eval_dataloader()) == 2
    assert args.dataloader_drop_last


def test_tokens_are_masked_where_arguments_are_saved(tiny_config, tmp_path):
    args = TrainingArguments(tmp_path, report_to="none", use_cpu=True, hub_token="s3cret", run_name="a run")
    trainer = ImageTrainer(RepVGGForImageClassification(tiny_config()), args)
    trainer.save_model()
    assert b"s3cret" not in (tmp_path / "training_args.bin").read_bytes()
    saved = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (saved.hub_token, saved.run_name) == ("***", "a run")
    assert trainer.args is args and args.hub_token == "s3cret"  # which uploads need
