"""Int8 in PyTorch itself: `torch.compile` turns a quantized model into oneDNN's integer kernels, on x86 CPUs."""

import torch
from torch import nn

from .arguments import require_example, require_model
from .extras import require
from .integers import integer_layers
from .programs import clip_to_grids, export_module
from .qdq import to_qdq


class Int8Program:
    """A compiled model, called with images of the shape that it was compiled for; returns what the model returns.

    It returns the logits of a model that has some.
    """

    def __init__(self, compiled, shape: torch.Size):
        self.compiled, self.shape = compiled, shape

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor):
        if pixel_values.shape != self.shape:
            raise ValueError(
                f"The model was compiled for images {list(self.shape)} and got {list(pixel_values.shape)}: call "
                "compile_int8() with an example of that shape, too."
            )
        return self.compiled(pixel_values)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)})"


def compile_int8(model: nn.Module, example: torch.Tensor) -> Int8Program:
    """Compile a quantized model to int8 kernels of x86 CPUs, by `torch.compile` with its inductor.

    The checkpoint's integers are what is computed with, so that nothing is prepared, calibrated or converted. Takes
    about ten seconds, or more for large models; as ever with `torch.compile`, a C++ compiler must be there.

    Args:
        model (`nn.Module`): a quantized model with activation bits; any that PyTorch can export.
        example (`torch.Tensor`): images `[batch, channels, height, width]` of the shape that it will be called with.

    Raises `ImportError` naming the extra if torchao is missing, which has the rules that join operations into int8
    kernels, `RuntimeError` if PyTorch was built without oneDNN for x86, and `ValueError` for a model without integers,
    see [`~repvgg_hf.interop.integers.integer_layers`].

    Example:
    ```python
    >>> import torch
    >>> from repvgg_hf import RepVGGForImageClassification, compile_int8

    >>> model = RepVGGForImageClassification.from_pretrained("org/repvgg-a0-oabn-w4a8")
    >>> program = compile_int8(model, torch.zeros(1, 3, 224, 224))
    >>> program(pixel_values).argmax(1)
    tensor([281])
    ```"""
    require_model(model)
    require_example(example)
    integer_layers(model)  # its errors come first
    _require_kernels()
    program = export_module(clip_to_grids(to_qdq(model)).cpu(), example).module()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):  # weights are packed once, while it is compiled
        compiled = Int8Program(torch.compile(program), example.shape)
        compiled(example)
    return compiled


def _require_kernels() -> None:
    """Make the rules known by which inductor finds int8 convolutions and linear layers."""
    if not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_acl_supported():
        raise RuntimeError(
            "This PyTorch has no oneDNN for x86 CPUs, whose int8 kernels the model is compiled to: run it in ONNX "
            "Runtime instead, see export_onnx()."
        )
    require("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", extra="inductor")


__all__ = ["Int8Program", "compile_int8"]
