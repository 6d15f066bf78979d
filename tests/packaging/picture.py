"""A picture classified from a folder, by a user who has the package and its core dependencies only.

python picture.py make FOLDER        # where torchvision is installed: a 4-bit model with the image processor
python picture.py classify FOLDER    # anywhere
"""

import sys

import torch
from PIL import Image
from transformers import pipeline

import repvgg_hf

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def picture(name: str) -> Image.Image:
    return Image.new("RGB", (48, 40), COLORS[name])


def make(folder: str) -> None:
    """A 4-bit model that tells the colors apart, trained on their pictures, and the processor that made them ready."""
    from transformers import BitImageProcessor

    torch.manual_seed(0)
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pixel_values = processor([picture(name) for name in COLORS], return_tensors="pt")["pixel_values"]
    config = repvgg_hf.RepVGGConfig(
        stem_hidden_size=8, hidden_sizes=[8, 16], depths=[1, 1], strides=[2, 2], id2label=dict(enumerate(COLORS))
    )
    model = repvgg_hf.RepVGGForImageClassification(config).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(100):  # as many as let the running statistics of the batch norms follow
        optimizer.zero_grad()
        model(pixel_values, labels=torch.arange(len(COLORS))).loss.backward()
        optimizer.step()
    model.eval().quantize(bits=4).save_pretrained(folder)
    processor.save_pretrained(folder)


def classify(folder: str) -> None:
    classifier = pipeline("image-classification", folder)
    assert classifier.model.is_quantized
    for name in COLORS:
        answers = classifier(picture(name))
        print(name, answers[0])
        assert answers[0]["label"] == name and answers[0]["score"] > 0.8, answers


if __name__ == "__main__":
    {"make": make, "classify": classify}[sys.argv[1]](sys.argv[2])
