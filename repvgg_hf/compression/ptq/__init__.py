"""Post-training quantization with calibration data: a model and some images to quantized layers.

`calibrate.py` goes through the model block by block; `gptq.py` chooses a layer's codes, `mixed_precision.py` its bits,
`activation_ranges.py` the range of its input. May import runtime/, codebooks/ and `compression/layers.py`.
"""
