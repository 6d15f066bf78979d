"""Post-training quantization with calibration data: a model and some examples to quantized layers.

`calibrate.py` goes through the model, block by block (`blocks.py`) or, any network, by hooks (`graph.py` finds what
waits for what, `graph_statistics.py` gathers what the layers see); `model_inputs.py` and `outputs.py` know what models
take and put out. `gptq.py` chooses a layer's codes, `mixed_precision.py` its bits, `activation_ranges.py` the range of
its input. May import runtime/, codebooks/ and `compression/layers.py`.
"""
