"""The quantizer, through which `from_pretrained` loads quantized checkpoints."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from .checkpoints import check_checkpoint, read_tensors, require_readable, tensors_checksum
from .checksum_settings import settings_to_store
from .cluster_layers import check_layers
from .layer_swaps import dequantize_layers, rebuild_structure, replace_with_cluster_layers, warn_of_half_biases
from .marker import has_own_code, pass_over_marker, with_marker
from .new_layers import NewLayer, check_loaded_before_quantizing, find_new_layers
from .quantization_cluster import ClusterConfig
from .stored_names import names_in_model, tensors_in_files
from .whole_package import import_compression


def _require_safetensors(files: list[str] | None) -> None:
    """Raise `ValueError` unless a quantized checkpoint is in safetensors `files`, the only ones that are checked."""
    others = [str(file) for file in files or [] if Path(file).suffix != ".safetensors"]
    if others or not files:
        raise ValueError(
            f"Quantized weights are loaded from safetensors files only, got {', '.join(others) or 'a state_dict'}: "
            "names, dtypes, shapes and the checksum are checked in the files, and what is missing would be memory with "
            "arbitrary contents. Load the folder that save_pretrained() wrote, without use_safetensors=False; for "
            "tensors in memory call load_state_dict() of a model that is quantized the same way."
        )


def require_fused(config) -> None:
    """Raise `ValueError` if the `config` of a quantized model of this package says that it has branches."""
    if not config.deploy:
        raise ValueError(
            "config.json has a quantization_config but deploy=False: quantized checkpoints hold fused kernels. "
            "Set deploy to true in config.json if its keys end in weight_codes, or remove quantization_config."
        )


class ClusterQuantizer(HfQuantizer):
    """The part of `from_pretrained` that loads quantized checkpoints of any model, and quantizes float ones on the fly.

    A model of this package does the work through its own methods, so that one whose code came with a checkpoint gets
    layers of that code, also while the package is installed. Other models have no such methods, nor code for it beside
    their checkpoints: these need the package, and `import repvgg_hf` before they are loaded.

    Example:
    ```python
    >>> from transformers import AutoModelForObjectDetection
    >>> from repvgg_hf import ClusterConfig

    >>> config = ClusterConfig(bits=4)
    >>> model = AutoModelForObjectDetection.from_pretrained("PekingU/rtdetr_r18vd", quantization_config=config)
    >>> model.save_pretrained("rtdetr-w4")
    ```"""

    requires_calibration = False
    new_layers: dict[str, NewLayer] = {}  # that the checkpoint does not have, or with other sizes: they stay float

    def update_parallel_plan(self, model, plan):
        """Leave the plan as it is: no tensor of a cluster layer is in one, and Transformers' search takes long."""

    def update_dtype(self, dtype):
        # fusing and clustering in half precision would cost accuracy: load in float32, cast when done
        self.final_dtype = dtype
        return dtype if self.pre_quantized else torch.float32

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        files = [str(file) for file in checkpoint_files or [] if Path(file).suffix == ".safetensors"]
        require_readable(model.config.name_or_path, files)  # with an error that says what to do
        if not self.pre_quantized:
            return
        if has_own_code(model):
            require_fused(model.config)
        _require_safetensors(checkpoint_files)
        config = self.quantization_config
        rebuild_structure(model, config)
        tensors = read_tensors(checkpoint_files)
        names = names_in_model(tensors, model)
        self.new_layers = find_new_layers(model, {names[name]: tensors[name].shape for name in tensors}, config)
        config.modules_to_not_convert = [*config.modules_to_not_convert, *self.new_layers]
        layers = _own_method(model, replace_with_cluster_layers)(config)
        decode = vars(config).pop("decode_here", config.decode)  # as the argument of from_pretrained has it
        for layer in layers.values():
            layer.on_the_fly = decode == "on_the_fly"
        pass_over_marker(model, layers)
        check_checkpoint(layers, tensors, names, checkpoint_files, model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self.pre_quantized:
            _own_method(model, check_layers, "check_cluster_layers")()
            return
        if not has_own_code(model):  # else with what was missing, see check_quantized_on_loading
            check_loaded_before_quantizing(model, self.quantization_config)
        model.is_quantized = False  # not yet, although it was announced before the weights were loaded
        quantize = getattr(model, "quantize", None) or partial(import_compression("quantize()").quantize, model)
        quantize(self.quantization_config)
        model.to(self.final_dtype).config.dtype = self.final_dtype

    def _dequantize(self, model, dtype=None):
        _own_method(model, dequantize_layers, "replace_with_float_layers")()
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype  # config.json holds its name
        return model if dtype is None else model.to(dtype)

    def get_state_dict_and_metadata(self, model):
        from transformers.integrations.accelerate import load_offloaded_parameter  # rarely needed, and internal

        # in config.json, which is written next: safetensors writes several metadata keys in random order, and saving
        # the same model twice shall give the same bytes
        tensors = {
            name: load_offloaded_parameter(model, name) if tensor.is_meta else tensor
            for name, tensor in model.state_dict().items()
        }
        warn_of_half_biases(model)
        state = with_marker(model, tensors)
        self.quantization_config.checksum = tensors_checksum(
            tensors_in_files(model, state).items(), settings_to_store(model.config, model.dtype)
        )
        return (None if state is tensors else state), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether `Trainer` takes the model, also to evaluate it: what stayed float (biases) trains, codes don't."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _own_method(model, function: Callable, name: str | None = None) -> Callable:
    """Return the method of `model` that does what `function` does, called `name` or like it, or else `function`."""
    return getattr(model, name or function.__name__, None) or partial(function, model)


# `setdefault`: a copy of this file that came with a checkpoint may meet the installed package in one process
auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault("cluster", ClusterConfig)
auto.AUTO_QUANTIZER_MAPPING.setdefault("cluster", ClusterQuantizer)
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (ClusterConfig,)

__all__ = ["ClusterQuantizer", "require_fused"]
