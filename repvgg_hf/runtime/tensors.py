"""What PyTorch's tools do with tensors and parameters: their layout in memory, offloading, pruning, adapters.

Those that read a parameter as a vector (`fully_shard`, LBFGS, `parameters_to_vector`, pruning) want it contiguous,
`[out, in, height, width]`. Inference is quickest with the channels last in memory, as no call has to rearrange the
kernel. So parameters are contiguous until a fused model first runs for inference, and again when it trains.
"""

import torch
from torch import nn


def has_memory(tensor: torch.Tensor) -> bool:
    """Tell whether `tensor` is one, and no stand-in for one that `torch.export` or `torch.func` computes with."""
    try:
        tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # a wrapper of torch.func
        return False
    return type(tensor) is torch.Tensor


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of half precision in float32, where squares and variances stay in range; others as they are."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def channels_last(images: torch.Tensor) -> torch.Tensor:
    """Return `images` `[batch, channels, height, width]` with the channels last in memory.

    Inside a transformation of `torch.func`, whose tensors can't be laid out, they are returned as they are.
    """
    if not torch.compiler.is_compiling() and not has_memory(images):
        return images
    return images.contiguous(memory_format=torch.channels_last)


def lay_out(parameter: torch.Tensor, memory_format: torch.memory_format) -> bool:
    """Rearrange the memory of a kernel `[out, in, height, width]`, which stays the same parameter; tell whether it was.

    Left alone is what has that format already, what shares its memory with other tensors or processes, and all while
    the model is compiled, traced, or captured in a CUDA graph.
    """
    if type(parameter) is not nn.Parameter or parameter.is_contiguous(memory_format=memory_format):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    data = parameter.data
    if not has_memory(data) or data.untyped_storage().nbytes() != data.nbytes:
        return False
    if data.is_shared() if data.device.type == "cpu" else data.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    # an inference tensor would be of no use in training, and a parameter that is one takes no other
    with torch.inference_mode(parameter.is_inference()), torch.no_grad():
        parameter.data = data.contiguous(memory_format=memory_format)
    return True


def require_module(model) -> None:
    """Raise `TypeError` for a `model` that is no `nn.Module`."""
    if not isinstance(model, nn.Module):
        found = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(f"model must be an nn.Module, got {found}.")


def require_bare(model) -> None:
    """Raise `ValueError` for a `model` that is compiled, or wrapped to run in parallel, or `TypeError` for no module.

    Its tensors have other names than the model's own, under which they would be saved, and its replicas other values.
    """
    require_module(model)
    kind = type(model).__name__
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise ValueError(
            f"The model is wrapped ({kind}), which gives its tensors other names: give model.module, then wrap it."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or "_orig_mod" in module._modules:
            raise ValueError(
                f"{name or 'The model'} is compiled ({type(module).__name__}), which gives its tensors other names: "
                "give the model itself, and compile what comes of it (torch.compile keeps it as _orig_mod)."
            )


def require_in_memory(model: nn.Module) -> None:
    """Raise `ValueError` naming the first weight of `model` that was offloaded by a `device_map`."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise ValueError(
                f"{name} is offloaded to disk or another device, and this needs every weight in memory: load the "
                "model without device_map, or with device_map='cpu'."
            )


def require_unpruned(model: nn.Module) -> None:
    """Raise `ValueError` naming the first weight of `model` that `torch.nn.utils.prune` computes from a mask."""
    for name, _ in model.named_buffers():
        module_name, _, tensor_name = name.rpartition(".")
        if tensor_name.endswith("_mask") and hasattr(model.get_submodule(module_name), f"{tensor_name[:-5]}_orig"):
            pruned = tensor_name[:-5]
            raise ValueError(
                f"{module_name}.{pruned} is pruned, and its mask is applied in every forward pass: make that permanent "
                f"with torch.nn.utils.prune.remove(model.get_submodule({module_name!r}), {pruned!r}) first."
            )


def kernel_of(conv: nn.Module) -> torch.Tensor:
    """Return the kernel `[out, in / groups, height, width]` that a convolution computes with, differentiably.

    `conv` is an `nn.Conv2d`, or one that peft has wrapped, whose active adapters (LoRA) add to its kernel. Raises
    `ValueError` for adapters that do something else.
    """
    if isinstance(conv, nn.Conv2d) or not hasattr(conv, "base_layer"):
        return conv.weight
    kernel = conv.base_layer.weight
    if conv.disable_adapters or conv.merged:
        return kernel
    adapted = getattr(conv, "lora_A", None)
    for adapter in conv.active_adapters:
        variant = adapted is None or adapter in conv.lora_variant or conv.lora_bias.get(adapter)
        if variant or conv.base_layer.groups > 1:
            raise ValueError(
                f"The adapter {adapter!r} of a branch's convolution does not just add a kernel to the convolution's: "
                "use LoRA without variants or biases, and leave out convolutions with groups (exclude_modules)."
            )
        if adapter in adapted:
            kernel = kernel + conv.get_delta_weight(adapter)
    return kernel


__all__ = [
    "channels_last",
    "has_memory",
    "kernel_of",
    "lay_out",
    "require_bare",
    "require_in_memory",
    "require_module",
    "require_unpruned",
]
