"""Tiny models of several families of Transformers, built in code, and what tests compute with them."""

import torch
import transformers
from torch import nn

# family: (class of the model, Auto class that loads it)
FAMILIES = {
    "resnet": ("ResNetForImageClassification", "AutoModelForImageClassification"),
    "regnet": ("RegNetForImageClassification", "AutoModelForImageClassification"),
    "mobilenetv2": ("MobileNetV2ForImageClassification", "AutoModelForImageClassification"),
    "convnextv2": ("ConvNextV2ForImageClassification", "AutoModelForImageClassification"),
    "vit": ("ViTForImageClassification", "AutoModelForImageClassification"),
    "upernet": ("UperNetForSemanticSegmentation", "AutoModelForSemanticSegmentation"),
    "rtdetr": ("RTDetrForObjectDetection", "AutoModelForObjectDetection"),
    "dfine": ("DFineForObjectDetection", "AutoModelForObjectDetection"),
    "timm": ("TimmWrapperForImageClassification", "AutoModelForImageClassification"),
}
_DETECTOR = {
    "encoder_hidden_dim": 32, "encoder_in_channels": [32, 32, 32], "encoder_ffn_dim": 32, "encoder_attention_heads": 2,
    "d_model": 32, "num_queries": 10, "decoder_in_channels": [32, 32, 32], "decoder_ffn_dim": 32, "decoder_layers": 2,
    "decoder_attention_heads": 2,
}  # fmt: skip


def make_config(family: str):
    """Return the configuration of a tiny model with five labels."""
    t, widths = transformers, {"hidden_sizes": [16, 32], "depths": [1, 1]}
    four = {"hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 1, 1]}
    stages = ["stage2", "stage3", "stage4"]
    if family == "resnet":
        return t.ResNetConfig(embedding_size=16, layer_type="bottleneck", num_labels=5, **widths)
    if family == "regnet":
        return t.RegNetConfig(embedding_size=16, groups_width=8, num_labels=5, **widths)
    if family == "mobilenetv2":
        return t.MobileNetV2Config(depth_multiplier=0.25, num_labels=5)
    if family == "convnextv2":
        return t.ConvNextV2Config(num_stages=2, num_labels=5, **widths)
    if family == "vit":
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        return t.ViTConfig(image_size=64, num_labels=5, **sizes)
    if family == "upernet":
        backbone = t.ConvNextConfig(num_stages=4, out_features=["stage1", *stages], **four)
        sizes = {"hidden_size": 32, "auxiliary_in_channels": 32, "auxiliary_channels": 16}
        return t.UperNetConfig(backbone_config=backbone, num_labels=5, **sizes)
    if family == "rtdetr":
        sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
        backbone = t.RTDetrResNetConfig(layer_type="basic", out_features=stages, **sizes)
        return t.RTDetrConfig(
            backbone_config=backbone, feat_strides=[8, 16, 32], encoder_layers=1, num_labels=5, anchor_image_size=None,
            **_DETECTOR,
        )  # fmt: skip
    if family == "dfine":
        backbone = t.HGNetV2Config(
            stage_in_channels=[16, 16, 32, 32], stage_mid_channels=[8, 8, 16, 16], stage_out_channels=[16, 32, 32, 32],
            stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1], stem_channels=[3, 8, 16],
            stage_downsample=[False, True, True, True], out_features=stages, embedding_size=16, depths=[1, 1, 1, 1],
            hidden_sizes=[16, 32, 32, 32],
        )  # fmt: skip
        return t.DFineConfig(backbone_config=backbone, num_labels=5, decoder_n_points=[2, 2, 2], **_DETECTOR)
    return t.TimmWrapperConfig(
        architecture="resnet18",
        num_labels=5,
        do_pooling=True,
        model_args={"block_args": {}, "channels": [8, 8, 16, 16]},
    )


def make_model(family: str) -> nn.Module:
    """Return a tiny float model with the statistics of batch norms that training might leave, in eval mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, FAMILIES[family][0])(make_config(family))
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.1, generator=generator)
            norm.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Return what `model` gives for two random images."""
    outputs = model.eval()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    return outputs if isinstance(outputs, torch.Tensor) else outputs.logits


def load(family: str, folder, **kwargs) -> nn.Module:
    """Load the model of a family with its Auto class."""
    return getattr(transformers, FAMILIES[family][1]).from_pretrained(folder, **kwargs)
