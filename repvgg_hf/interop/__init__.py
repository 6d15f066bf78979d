"""The integers of a quantized model, and what engines take: ONNX, OpenVINO, Core ML, torch's own int8, and others.

Engines' packages are optional, and imported only by the functions that need them, see `extras.py`.
"""
