"""What a card says of the integers of a quantized model: which engines compute with them, and on which CPUs exactly."""

from ..runtime.quantization_cluster import LARGEST_REDUCED, ClusterConfig


def integers_section(quantization: ClusterConfig | None) -> str:
    """Return the section about a model that is quantized this way; empty if it does not compute with integers."""
    if quantization is None or quantization.activation_bits is None or quantization.codebook_dtype != "int8":
        return ""
    bits = {quantization.bits, *quantization.bits_overrides.values()}
    within = all(quantization.largest_integer(each) <= LARGEST_REDUCED for each in bits)
    lines = [
        "## Integers",
        "",
        f"The model is an integer program: int8 weights, inputs of {quantization.activation_bits} bits, biases that "
        "are multiples of the product of their scales. ONNX Runtime, OpenVINO and PyTorch's compiler run it as such; "
        "the accuracy shown here is that of its simulation in PyTorch, from which they differ only where a floating "
        "point number falls on the other side of a rounding step.",
        "",
    ]
    if within:
        lines.append(f"- All weights are within +-{LARGEST_REDUCED}: every CPU computes the same integers.")
    else:
        lines.append(
            f"- Some weights are beyond +-{LARGEST_REDUCED}: exact on CPUs with VNNI or AMX instructions, on Arm and "
            "in browsers. x86 CPUs without (AVX2, early AVX-512) saturate sums of two products, which costs accuracy: "
            "for these quantize with `reduce_range=True`."
        )
    if quantization.activation_scheme == "int8_symmetric":
        lines.append("- Zero is zero in every int8 input, which is TensorRT's rule.")
    if quantization.quantize_last_map:
        lines.append("- The last feature map is rounded, too: nothing but its mean is computed in floating point.")
    if quantization.modules_to_not_convert:
        kept = ", ".join(f"`{name}`" for name in quantization.modules_to_not_convert)
        lines.append(f"- Floating point is {kept}.")
    return "\n".join(lines)
