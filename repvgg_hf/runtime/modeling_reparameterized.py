"""A Transformers model with blocks of branches, which can be fused, quantized, trained quantized, saved and loaded.

A *branch* is one of the linear maps that a block sums while it trains; *fusing* turns their sum into one convolution.
See `reparameterization.py`.
"""

from functools import partial
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self, Unpack

from .checkpoints import check_checkpoint_form, check_published_weights, require_readable, weight_files
from .cluster_layers import check_layers, cluster_layers, decode_layers
from .image_processor_file import PROCESSOR_FILE, ImageProcessorFile
from .layer_swaps import dequantize_layers, replace_with_cluster_layers
from .new_layers import check_quantized_on_loading, check_sizes, warn_of_new_layers, without_layers
from .quantization_cluster import ClusterConfig, ClusterOptions
from .quantizer_cluster import ClusterQuantizer, require_fused
from .reparameterization import ReparamConv2d, checkpoint_once, fused_convolutions
from .saving import finish_before_loading, replace_files
from .whole_package import import_compression


class ReparameterizedPreTrainedModel(PreTrainedModel):
    """Base class of models with [`ReparamConv2d`] blocks: loading, saving, fusing and quantizing.

    The configuration of such a model has `deploy` (built fused, one convolution per block), `qat_config` (how it is
    prepared for quantization-aware training, or `None`) and `weights_checksum`.
    """

    is_part = False  # of a model, without a stem or configuration of its own
    image_processor_file: ImageProcessorFile | None = None  # of where the model is from; saved along with it
    _keep_in_fp32_modules_strict = ["weight_fake_quant", "input_fake_quant", "output_fake_quant"]

    def post_init(self):
        super().post_init()
        if not next(self.parameters()).is_meta:
            return
        # from_pretrained: a checkpoint follows
        if self.config.qat_config is not None:
            compression = import_compression("A checkpoint of quantization-aware training")
            compression.restore_qat(self, self.config.qat_config)
        # of the model that is loaded it is an object by now, and goes to the quantizer: this is a part of another one
        quantization = getattr(self.config, "quantization_config", None)
        if _is_cluster_dict(quantization) and not self.is_part:
            self._prepare_as_quantized_part(ClusterConfig.from_dict(quantization))

    def _prepare_as_quantized_part(self, config: ClusterConfig) -> None:
        """Make room for the codes of a backbone that was quantized on its own, in a checkpoint of the whole model."""
        require_fused(self.config)
        self.replace_with_cluster_layers(config)
        self.config.quantization_config = config
        self.hf_quantizer = ClusterQuantizer(config, pre_quantized=True)
        self.is_quantized, self.quantization_method = True, config.quant_method

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **kwargs
    ):
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)
        for module in self.modules():
            if getattr(module, "gradient_checkpointing", False):
                function = module._gradient_checkpointing_func
                module._gradient_checkpointing_func = partial(checkpoint_once, function, module)

    def reparameterize(self):
        """Fuse the branches of every layer into one convolution, in place; returns the model.

        Kernels are computed in float32 and checked on a random batch; the result has the model's dtype. A fused model
        is returned as it is. Raises `ValueError` naming the block if the result is wrong; the model is then unchanged.
        """
        self._require_whole_model("reparameterize()")
        if any(getattr(module, "weight_fake_quant", None) is not None for module in self.modules()):
            raise ValueError("The model was prepared for QAT: quantize() fuses it and keeps the trained codebooks.")
        for name, convolution in self.fused_convolutions().items():
            self.set_submodule(name, convolution)
        self.config.deploy = True
        return self

    def fused_convolutions(self) -> dict[str, nn.Conv2d]:
        """Return what each block of branches fuses into, by the block's name; the model is not changed."""
        return fused_convolutions(self)

    def quantize(
        self,
        method: str | ClusterConfig | None = None,
        bits: int | None = None,
        *,
        calibration: Any = None,
        calibration_config: Any = None,
        **options: Unpack[ClusterOptions],
    ) -> Self:
        """Replace every weight by codes and a codebook, in place; returns the model. Branches are fused first.

        A *code* is a number of a few bits that selects an entry of a *codebook*, a short table of values; a *channel
        scale* is one more factor for each output channel. *Calibration* is choosing them from images that the model
        sees.

        Args:
            method (`str` or [`ClusterConfig`], *optional*):
                `"cluster"` (k-means codebooks, the default) or `"uniform"` (evenly spaced ones), or a whole
                configuration, which then takes the place of `bits` and `options`.
            bits (`int`, *optional*):
                Bits of a weight's code, 1 to 8; 4 by default.
            calibration (*optional*):
                Some hundred images, labeled or not: a `DataLoader`, a dataset of `pixel_values`, or batches
                `[batch, channels, height, width]`. With them codes and codebooks are chosen for the layers' outputs
                instead of their weights. Needed for `activation_bits`.
            calibration_config ([`CalibrationConfig`], *optional*):
                How these images are used.
            granularity (`str`, *optional*):
                Which weights share a codebook: `"per_tensor"` (default), `"per_channel"` or `"per_group"`.
            group_size (`int`, *optional*):
                Output channels that share a codebook, with `"per_group"`.
            channel_scale (`bool`, *optional*):
                Fit a scale for each output channel; by default where it costs next to nothing.
            codebook_dtype (`str`, *optional*):
                `"float16"` (default without `activation_bits`), `"float32"`, or `"int8"` for integer engines (default
                with them).
            bits_overrides (`dict[str, int]`, *optional*):
                Other bits for some modules, such as `{"classifier": 8}`.
            modules_to_not_convert (`list[str]`, *optional*):
                Modules that stay float.
            symmetric (`bool`, *optional*), range_method (`str`, *optional*):
                The grid of `"uniform"`: as many steps to both sides of zero (default) or from minimum to maximum; for
                the least squared error (`"mse"`, default) or the whole range (`"minmax"`).
            decode (`str`, *optional*):
                When a loaded model decodes its weights: `"at_load"` (default) or `"on_the_fly"`.
            activation_bits (`int`, *optional*):
                Bits of every quantized layer's input, 2 to 8; weights only by default.
            activation_scheme (`str`, *optional*), quantize_last_map (`bool`, *optional*):
                With `activation_bits`: where zero lies in these integers, anywhere (`"affine"`, default) or in the
                middle (`"int8_symmetric"`, for TensorRT); and whether the last feature map is rounded, too.
            reduce_range (`bool`, *optional*):
                Int8 weights within +-63, with which every CPU computes exactly; by default those of up to 6 bits with
                `activation_bits`.

        After `prepare_qat` call it without arguments: the trained codebooks are kept as they are. Raises `ValueError`
        for a model that is quantized already, bad options, or weights that aren't finite, `TypeError` for an unknown
        option; the model is then unchanged.

        Example:
        ```python
        >>> from repvgg_hf import RepVGGConfig, RepVGGForImageClassification

        >>> model = RepVGGForImageClassification(RepVGGConfig.from_variant("a0"))
        >>> model = model.quantize(bits=3, bits_overrides={"classifier": 8})
        >>> model.save_pretrained("repvgg-a0-w3")
        ```"""
        self._require_whole_model("quantize()")
        return import_compression("quantize()").quantize(
            self, method, bits, calibration=calibration, calibration_config=calibration_config, **options
        )

    def prepare_qat(
        self,
        method: str | ClusterConfig | None = None,
        bits: int | None = None,
        *,
        calibration: Any = None,
        calibration_config: Any = None,
        qat_config: Any = None,
        **options: Unpack[ClusterOptions],
    ) -> Self:
        """Make the model compute with quantized weights while its parameters train, in place; returns the model.

        In train form each block quantizes its fused kernel, with the batch norm statistics frozen, and runs one
        convolution. After every optimizer step call `repvgg_hf.update_codebooks(model)`, or give `Trainer` a
        `repvgg_hf.QATCallback()`; at the end [`~RepVGGPreTrainedModel.quantize`] freezes the result.

        Args:
            method (`str` or [`ClusterConfig`], *optional*), bits (`int`, *optional*):
                The same as in [`~RepVGGPreTrainedModel.quantize`]; training with `"uniform"` is LSQ, learned step size
                quantization.
            calibration, calibration_config (*optional*):
                Images, and [`CalibrationConfig`], for the ranges of the inputs that `activation_bits` rounds, and for
                each layer's bits with `target_bits_per_weight`.
            qat_config ([`QATConfig`], *optional*):
                How codebooks move and training goes over to quantized weights.
            granularity, group_size, channel_scale, codebook_dtype, bits_overrides, modules_to_not_convert, symmetric,
            range_method, decode, activation_bits, activation_scheme, quantize_last_map, reduce_range (*optional*):
                The same as in [`~RepVGGPreTrainedModel.quantize`].

        Raises `ValueError` for a model that is quantized or prepared already, bad options, or weights that aren't
        finite, `TypeError` for an unknown option; the model is then unchanged.
        """
        self._require_whole_model("prepare_qat()")
        return import_compression("prepare_qat()").prepare_qat(
            self,
            method,
            bits,
            calibration=calibration,
            calibration_config=calibration_config,
            qat_config=qat_config,
            **options,
        )

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Count the parameters as `PreTrainedModel` does, in a quantized model with the weights that codes stand for.

        Those don't train.
        """
        count = super().num_parameters(only_trainable, exclude_embeddings)
        return count if only_trainable else count + sum(layer.weight_numel for layer in cluster_layers(self).values())

    def replace_with_cluster_layers(self, config: ClusterConfig):
        """Put empty cluster layers in the place of those that `config` converts; returns them by name."""
        return replace_with_cluster_layers(self, config)

    def replace_with_float_layers(self):
        """Put float layers with the decoded weights in the place of the cluster layers."""
        dequantize_layers(self)

    def check_cluster_layers(self):
        """Raise `ValueError` naming a loaded tensor whose values can't be right."""
        check_layers(self)

    def decode_weights(self, on_the_fly: bool | None = None):
        """Decode the weights now, instead of when the model first runs.

        `on_the_fly=True` decodes them in every forward pass instead, `False` keeps them decoded; `None` leaves that as
        it is.

        Call it before `torch.export` or an export to ONNX, which would trace the decoding in a model that never ran;
        before `nn.DataParallel`, whose copies would decode in every step; and before a second CUDA stream uses the
        model.
        """
        decode_layers(self, on_the_fly)

    def dequantize(self, dtype: torch.dtype | None = None):
        """Make a quantized model a float one with the decoded weights, in place; returns the model.

        The rounding of activations (`activation_bits`) is dropped with the layers that did it. The float model has the
        present dtype, or `dtype`. Raises `ValueError` for a model that is not quantized or is offloaded.
        """
        return super().dequantize(dtype)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs
    ) -> Self:  # with output_loading_info a tuple, as Transformers has it, too
        """Load a model as `PreTrainedModel.from_pretrained` does, and check what was loaded.

        Raises `ValueError` for the wrong form of checkpoint (branches, fused, quantized) or a broken file, and
        `RuntimeError` for another number of classes (or other sizes) than the checkpoint's, without
        `ignore_mismatched_sizes=True`. With it such a layer is new: float in a quantized model, prepared anew in one
        that was prepared for quantization-aware training.

        For a quantized checkpoint `quantization_config=ClusterConfig(decode="on_the_fly")` chooses when to decode.
        """
        _refuse_other_formats(cls, kwargs)
        kwargs = finish_before_loading(pretrained_model_name_or_path, kwargs)
        if _is_cluster_dict(kwargs.get("quantization_config")):
            kwargs = kwargs | {"quantization_config": ClusterConfig.from_dict(kwargs["quantization_config"])}
        ignored = kwargs.pop("ignore_mismatched_sizes", False)  # else refused below, by what and where differs
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **kwargs,
            )
        except (SafetensorError, KeyError, JSONDecodeError):  # of the weights, or of the index of their files
            require_readable(pretrained_model_name_or_path, weight_files(pretrained_model_name_or_path, **kwargs))
            raise
        check_published_weights(pretrained_model_name_or_path, model.config, kwargs)
        model._settle_new_layers(pretrained_model_name_or_path, info, ignored)
        for name, module in model.named_modules():
            if isinstance(module, ReparamConv2d) and any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, but a block of branches runs in memory only: load the model without "
                    "device_map or with device_map='cpu', or reparameterize() and save it first."
                )
        if pretrained_model_name_or_path is not None:
            commit = getattr(model.config, "_commit_hash", None)
            model.image_processor_file = ImageProcessorFile.beside(pretrained_model_name_or_path, commit, kwargs)
        return (model, info) if output_loading_info else model

    def _settle_new_layers(self, name, info: dict, ignored: bool) -> None:
        """Check which of the model's tensors the checkpoint `name` gave, as `info` says, and what becomes of others."""
        new = getattr(getattr(self, "hf_quantizer", None), "new_layers", {})
        missing, unexpected = (without_layers(info[keys], new) for keys in ("missing_keys", "unexpected_keys"))
        check_checkpoint_form(missing, unexpected, self.config.deploy)
        check_sizes(name, info["mismatched_keys"], ignored)
        check_quantized_on_loading(self, missing, info["mismatched_keys"])
        warn_of_new_layers(name, new, "stays float (modules_to_not_convert)")
        if getattr(self, "qat_settings", None) is not None:
            compression = import_compression("A checkpoint of quantization-aware training")
            compression.settle_qat(self, name, info["missing_keys"], info["mismatched_keys"])

    def load_state_dict(self, state_dict, *args, **kwargs):
        own = self.state_dict().keys()
        check_checkpoint_form(own - state_dict.keys(), state_dict.keys() - own, self.config.deploy)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def _get_files_timestamps(self, working_dir):
        # of the files that push_to_hub leaves out: none, as save_pretrained writes into a new folder
        return {}

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """Save the model as `PreTrainedModel.save_pretrained` does; the files appear only when all are complete.

        They are written to a temporary folder and then renamed, so that an interrupted save, also one that is killed,
        leaves what was there before or the new model: what is left of it is done by the next save or load. Weights of
        an earlier save under other names (sharded or not) are removed.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file: save_pretrained needs a folder.")
        target.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            kwargs.setdefault("repo_id", target.name)
        if getattr(self, "qat_settings", None) is not None:
            import_compression("Saving a model in training").warn_of_unmoved_codebooks(self)
        self.config.weights_checksum = None  # that of the files it was loaded from
        with replace_files(target) as folder:
            main_process = kwargs.get("is_main_process", args[0] if args else True)
            if main_process and self.image_processor_file is not None and not (target / PROCESSOR_FILE).exists():
                self.image_processor_file.write(folder)
            super().save_pretrained(folder, *args, push_to_hub=push_to_hub, **kwargs)


def _is_cluster_dict(quantization) -> bool:
    return isinstance(quantization, dict) and quantization.get("quant_method") == "cluster"


def _refuse_other_formats(cls: type, arguments: dict) -> None:
    """Raise `ValueError` for an argument of `from_pretrained` that asks for weights in a format that no model has."""
    for name in ("from_tf", "from_flax", "gguf_file"):
        if arguments.get(name):
            raise ValueError(
                f"{name}={arguments[name]!r}: {cls.__name__} has no weights in that format. Load the folder or "
                "repository that save_pretrained() wrote, in safetensors, without this argument."
            )


__all__ = ["ReparameterizedPreTrainedModel"]
