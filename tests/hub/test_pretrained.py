"""A network of timm on the Hub as the start of a training."""

import timm
import torch
from huggingface_hub import HfApi
from loopback_store import WRITE_TOKEN

from repvgg_hf import from_timm
from repvgg_hf.networks.timm_folder import save_for_timm
from repvgg_hf.training.pretrained import load_pretrained, processor_of

REPO = "timm/repvgg_a0.rvgg_in1k"


@torch.no_grad()
def test_a_network_of_timm(hub, tmp_path):
    network = from_timm(timm.create_model("repvgg_a0", num_classes=5).eval())
    save_for_timm(network, tmp_path)
    api = HfApi(hub.url, WRITE_TOKEN)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path)
    loaded = load_pretrained(REPO)
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(pixel_values).logits, network(pixel_values).logits)
    assert processor_of(loaded).crop_size["height"] == 224
