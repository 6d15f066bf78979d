"""An image processor's work in the graph: resize, crop, rescale and normalize, from uint8 images as they are decoded.

ONNX's Resize would not do. PIL and torchvision resize the width first, and round that to 8 bits before they resize the
height; Resize does both at once, which is 20 gray levels away at sharp edges. So each of the two is a product with a
matrix of the filter's weights, computed in the graph from the image's size, for those pixels only that the crop leaves.
It is done in float64 with PIL's weights of 22 bits, and so gives the same gray levels as PIL. torchvision's own are up
to 2 from these. (Pillow 13 takes the height first where it shrinks by more than twice the pixels that the width does,
such as tall images, and is then as far from all others at sharp edges.)
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from .graph import GraphWriter, refill

PROCESSORS = ("BitImageProcessor", "ViTImageProcessor")  # which do these steps and no others
FILTERS = {2: "linear", 3: "cubic"}  # by PIL's number


@dataclass(frozen=True)
class ImageSteps:
    """What is done to an image.

    Attributes:
        resize (`int` or `(height, width)`, *optional*): new length of the shorter side, or new size.
        filter (`str`): of the interpolation, `"linear"` or `"cubic"`.
        crop (`(height, width)`, *optional*): the center that is cut out.
        factor (`float`), mean (`tuple[float]`), std (`tuple[float]`): a channel c becomes
            `(c * factor - mean) / std`.
    """

    resize: int | tuple[int, int] | None
    filter: str
    crop: tuple[int, int] | None
    factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) of what comes out, `None` if that depends on the image."""
        return self.crop or (self.resize if isinstance(self.resize, tuple) else None)


def image_steps(processor: Any) -> ImageSteps:
    """Read the steps of an image processor of Transformers, or of the one in a folder.

    Raises `ValueError` for a processor that does something else.
    """
    if isinstance(processor, (str, os.PathLike)):
        from transformers import AutoImageProcessor

        processor = AutoImageProcessor.from_pretrained(processor)
    kind = type(processor).__name__
    if kind.removesuffix("Pil").removesuffix("Fast") not in PROCESSORS:
        raise ValueError(
            f"preprocess must be an image processor of one of the kinds {', '.join(PROCESSORS)}, whose steps are known "
            f"here, or a folder with one, got a {kind}: leave preprocess out and prepare images outside of the file."
        )
    fields = processor.to_dict()
    resize, kernel = _resize(kind, fields) if fields["do_resize"] else (None, "linear")
    crop = None
    if fields.get("do_center_crop"):
        crop = (fields["crop_size"]["height"], fields["crop_size"]["width"])
        known = (resize, resize) if isinstance(resize, int) else resize
        if known is None or known[0] < crop[0] or known[1] < crop[1]:
            raise ValueError(
                f"{kind} crops {crop[0]} x {crop[1]} pixels from an image that it resizes to {known}, which may be "
                "smaller and would be padded: set its size to at least its crop_size."
            )
    colors = len(fields["image_mean"]) if fields["do_normalize"] else 3
    return ImageSteps(
        resize=resize,
        filter=kernel,
        crop=crop,
        factor=fields["rescale_factor"] if fields["do_rescale"] else 1.0,
        mean=tuple(fields["image_mean"]) if fields["do_normalize"] else (0.0,) * colors,
        std=tuple(fields["image_std"]) if fields["do_normalize"] else (1.0,) * colors,
    )


def _resize(kind: str, fields: dict) -> tuple[int | tuple[int, int], str]:
    size, resample = fields["size"], fields["resample"]
    if resample not in FILTERS:
        raise ValueError(
            f"{kind} resizes with resample={resample!r}, which is not known here: use 2 (bilinear) or 3 (bicubic), or "
            "leave preprocess out."
        )
    if set(size) == {"shortest_edge"}:
        return size["shortest_edge"], FILTERS[resample]
    if set(size) == {"height", "width"}:
        return (size["height"], size["width"]), FILTERS[resample]
    raise ValueError(f"{kind} resizes to {size}: only shortest_edge, or height and width, is known here.")


def add_preprocessing(proto: Any, steps: ImageSteps) -> None:
    """Put the steps before the input of an `onnx.ModelProto`: uint8 `image` `[batch, height, width, channels]`."""
    (pixel_values,) = proto.graph.input
    dimensions = [dimension.dim_param or dimension.dim_value for dimension in pixel_values.type.tensor_type.shape.dim]
    if steps.size and not all(isinstance(d, str) or d == size for d, size in zip(dimensions[2:], steps.size)):
        raise ValueError(
            f"The image processor makes images of {steps.size}, and the model takes {tuple(dimensions[2:])}: set "
            "image_size=, or its crop_size."
        )
    if len(steps.mean) != dimensions[1]:
        raise ValueError(f"The image processor is for {len(steps.mean)} channels, and the model takes {dimensions[1]}.")
    taken = {value for node in proto.graph.node for value in [*node.input, *node.output]}
    taken |= {tensor.name for tensor in proto.graph.initializer}
    graph = GraphWriter(taken, prefix="image_")
    _add_steps(graph, steps, "image", pixel_values.name)
    nodes, shape = list(proto.graph.node), [dimensions[0], "image_height", "image_width", dimensions[1]]
    image = graph.onnx.helper.make_tensor_value_info("image", graph.onnx.TensorProto.UINT8, shape)
    refill(proto.graph.input, [image])
    refill(proto.graph.node, [*graph.nodes, *nodes])
    proto.graph.initializer.extend(graph.initializers.values())


def _add_steps(graph: GraphWriter, steps: ImageSteps, image: str, output: str) -> None:
    x = graph.cast(graph.add("Transpose", [image], perm=[0, 3, 1, 2]), "float64")
    old = _slice(graph, graph.add("Shape", [x]), 2, 4)
    new = _new_size(graph, steps, old)
    start, count = graph.shared(np.zeros(2, np.int64)), new
    if steps.crop is not None:
        count = graph.shared(np.array(steps.crop, np.int64))
        start = graph.add("Div", [graph.add("Sub", [new, count]), graph.shared(np.array([2], np.int64))])
    if steps.resize is not None:
        for dimension in (1, 0):  # the width first
            sizes = [_entry(graph, value, dimension) for value in (old, new, start, count)]
            weights = _filter_weights(graph, steps.filter, *sizes)
            operands = [x, graph.add("Transpose", [weights], perm=[1, 0])] if dimension else [weights, x]
            half, lowest, highest = (graph.shared(np.array(number, np.float64)) for number in (0.5, 0, 255))
            rounded = graph.add("Floor", [graph.add("Add", [graph.add("MatMul", operands), half])])  # halves up
            x = graph.add("Clip", [rounded, lowest, highest])
    # (x * factor - mean) / std as one product and one sum
    std = np.array(steps.std, np.float64).reshape(1, -1, 1, 1)
    mean = np.array(steps.mean, np.float64).reshape(1, -1, 1, 1)
    x = graph.add("Mul", [graph.cast(x, "float32"), graph.shared((steps.factor / std).astype(np.float32))])
    graph.add("Add", [x, graph.shared((-mean / std).astype(np.float32))], output)


def _new_size(graph: GraphWriter, steps: ImageSteps, old: str) -> str:
    """Return the name of (height, width) of the resized image, int64."""
    if steps.resize is None:
        return old
    if isinstance(steps.resize, tuple):
        return graph.shared(np.array(steps.resize, np.int64))
    # the longer side is rounded down, as Transformers does
    scaled = graph.add("Mul", [old, graph.shared(np.array([steps.resize], np.int64))])
    return graph.add("Div", [scaled, graph.add("ReduceMin", [old], keepdims=1)])


def _filter_weights(graph: GraphWriter, kernel: str, old: str, new: str, start: str, count: str) -> str:
    """Add the weights by which pixels of the resized image sum those of the old one, float64 `[count, old]`.

    All sizes are names of int64 scalars. Where the image shrinks, the filter is as much wider. The order of operations
    and the rounding to 22 bits are PIL's.
    """
    half, one = graph.shared(np.array(0.5, np.float64)), graph.shared(np.array(1, np.float64))
    scale = graph.add("Div", [graph.cast(old, "float64"), graph.cast(new, "float64")])
    end = graph.add("Add", [start, count])
    places = graph.add("Reshape", [_range(graph, start, end), graph.shared(np.array([-1, 1], np.int64))])
    centers = graph.add("Mul", [graph.add("Add", [places, half]), scale])
    pixels = graph.add("Add", [_range(graph, graph.shared(np.array(0, np.int64)), old), half])
    distance = graph.add("Abs", [graph.add("Sub", [pixels, centers])])
    distance = graph.add("Mul", [distance, graph.add("Div", [one, graph.add("Max", [scale, one])])])
    weights = _linear(graph, distance) if kernel == "linear" else _cubic(graph, distance)
    total = graph.add("ReduceSum", [weights, graph.shared(np.array([1], np.int64))], keepdims=1)
    weights = graph.add("Mul", [weights, graph.add("Div", [one, total])])
    unit = graph.shared(np.array(2**22, np.float64))
    whole = graph.add("Floor", [graph.add("Add", [graph.add("Mul", [weights, unit]), half])])
    return graph.add("Div", [whole, unit])


def _linear(graph: GraphWriter, distance: str) -> str:
    return graph.add("Relu", [graph.add("Sub", [graph.shared(np.array(1, np.float64)), distance])])


def _cubic(graph: GraphWriter, distance: str) -> str:
    """Add the bicubic filter with a = -0.5: 1.5 d^3 - 2.5 d^2 + 1 up to 1, -0.5 d^3 + 2.5 d^2 - 4 d + 2 up to 2."""

    def polynomial(x: str, factors: tuple[float, ...]) -> str:
        value = graph.shared(np.array(factors[0], np.float64))
        for factor in factors[1:]:
            product = graph.add("Mul", [value, x])
            value = graph.add("Add", [product, graph.shared(np.array(factor, np.float64))])
        return value

    two = graph.shared(np.array(2, np.float64))
    outer = polynomial(graph.add("Min", [distance, two]), (-0.5, 2.5, -4.0, 2.0))  # 0 at 2, and so beyond
    is_inner = graph.add("Less", [distance, graph.shared(np.array(1, np.float64))])
    return graph.add("Where", [is_inner, polynomial(distance, (1.5, -2.5, 0.0, 1.0)), outer])


def _range(graph: GraphWriter, start: str, end: str) -> str:
    """Add the whole numbers from `start` to before `end`, as float64."""
    return graph.cast(graph.add("Range", [start, end, graph.shared(np.array(1, np.int64))]), "float64")


def _entry(graph: GraphWriter, vector: str, index: int) -> str:
    return graph.add("Gather", [vector, graph.shared(np.array(index, np.int64))])


def _slice(graph: GraphWriter, value: str, start: int, end: int) -> str:
    bounds = [graph.shared(np.array([bound], np.int64)) for bound in (start, end)]
    return graph.add("Slice", [value, *bounds])


__all__ = ["ImageSteps", "add_preprocessing", "image_steps"]
