"""What a cold load from the Hub costs: 4 bit against float, both fused RepVGG-A0."""

import time

import pytest
from loopback_hub import LoopbackHub
from loopback_store import PUBLIC
from transformers import BitImageProcessor

from repvgg_hf import RepVGGConfig, RepVGGForImageClassification
from repvgg_hf.hub import publish

LOAD = """
import time, repvgg_hf
from transformers import AutoModelForImageClassification
start = time.perf_counter()
AutoModelForImageClassification.from_pretrained("org/{name}")
print("seconds", time.perf_counter() - start)
"""


@pytest.mark.slow
def test_cold_load_transfers_a_sixth(use_hub, fresh_process, tmp_path):
    """4 of 32 bits are 0.125; scales, codebooks and config.json come on top."""
    config = RepVGGConfig.from_variant("a0", num_labels=1000, deploy=True)
    processor = BitImageProcessor(size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224})
    model = RepVGGForImageClassification(config)
    with LoopbackHub() as hub:
        use_hub(hub)
        publish(model, "org/float", processor=processor, **PUBLIC)
        publish(model.quantize(bits=4), "org/w4", processor=processor, **PUBLIC)
        sent, seconds = {}, {}
        for name in ("float", "w4"):
            hub.requests.clear()
            start = time.perf_counter()
            printed = fresh_process(LOAD.format(name=name), hub.url, tmp_path / name)
            seconds[name] = (float(printed.split()[-1]), time.perf_counter() - start)
            sent[name] = sum(entry.sent for entry in hub.requests)
    print(f"\nbytes {sent}, ratio {sent['w4'] / sent['float']:.4f}; seconds (loading, whole process) {seconds}")
    assert 0.125 < sent["w4"] / sent["float"] <= 0.16
    assert sent["float"] > 4 * 8_309_384  # all parameters, 4 bytes each
