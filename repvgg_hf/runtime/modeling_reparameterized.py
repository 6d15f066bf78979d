"""A Transformers model with blocks of branches, which can be fused, quantized, trained quantized, saved and loaded.

A *branch* is one of the linear maps that a block sums while it trains; *fusing* turns their sum into one convolution.
See `reparameterization.py`.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from typing_extensions import Self, Unpack

from .checkpoints import check_checkpoint_form, check_published_weights, replace_files, unreadable_weights
from .cluster_layers import check_layers, decode_layers, dequantize_layers, replace_with_cluster_layers
from .quantization_cluster import ClusterConfig, ClusterOptions
from .reparameterization import ReparamConv2d, checkpoint_once, fused_convolutions


class ReparameterizedPreTrainedModel(PreTrainedModel):
    """Base class of models with [`ReparamConv2d`] blocks: loading, saving, fusing and quantizing.

    The configuration of such a model has `deploy` (built fused, one convolution per block), `qat_config` (how it is
    prepared for quantization-aware training, or `None`) and `weights_checksum`.
    """

    is_part = False  # of a model, without a stem or configuration of its own
    _keep_in_fp32_modules_strict = ["weight_fake_quant", "input_fake_quant"]

    def post_init(self):
        super().post_init()
        settings = self.config.qat_config
        if settings is not None and next(self.parameters()).is_meta:  # from_pretrained: a QAT checkpoint follows
            _import_compression("A checkpoint of quantization-aware training").restore_qat(self, settings)

    def _set_gradient_checkpointing(
        self, enable=True, gradient_checkpointing_func=torch.utils.checkpoint.checkpoint, **kwargs
    ):
        function = partial(checkpoint_once, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, function, **kwargs)

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
                `"float16"` (default), `"float32"`, or `"int8"` for integer engines.
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
        return _import_compression("quantize()").quantize(
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
                Images, and [`CalibrationConfig`], for the ranges of the inputs that `activation_bits` rounds.
            qat_config ([`QATConfig`], *optional*):
                How codebooks move and training goes over to quantized weights.
            granularity, group_size, channel_scale, codebook_dtype, bits_overrides, modules_to_not_convert, symmetric,
            range_method, decode, activation_bits (*optional*):
                The same as in [`~RepVGGPreTrainedModel.quantize`].

        Raises `ValueError` for a model that is quantized or prepared already, bad options, or weights that aren't
        finite, `TypeError` for an unknown option; the model is then unchanged.
        """
        self._require_whole_model("prepare_qat()")
        return _import_compression("prepare_qat()").prepare_qat(
            self,
            method,
            bits,
            calibration=calibration,
            calibration_config=calibration_config,
            qat_config=qat_config,
            **options,
        )

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
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, output_loading_info=False, **kwargs):
        """Load a model as `PreTrainedModel.from_pretrained` does, and check what was loaded.

        Raises `ValueError` for the wrong form of checkpoint (branches, fused, quantized) or a broken file.

        For a quantized checkpoint `quantization_config=ClusterConfig(decode="on_the_fly")` chooses when to decode.
        """
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ValueError(unreadable_weights(pretrained_model_name_or_path, error, kwargs)) from error
        check_checkpoint_form(info["missing_keys"], info["unexpected_keys"], model.config.deploy)
        check_published_weights(pretrained_model_name_or_path, model.config, kwargs)
        for name, module in model.named_modules():
            if isinstance(module, ReparamConv2d) and any(parameter.is_meta for parameter in module.parameters()):
                raise ValueError(
                    f"{name} is offloaded, but a block of branches runs in memory only: load the model without "
                    "device_map or with device_map='cpu', or reparameterize() and save it first."
                )
            if isinstance(module, nn.Conv2d):  # as the input, so that no call has to rearrange the kernel
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
        requested = kwargs.get("quantization_config")
        if isinstance(requested, ClusterConfig) and requested.decode != model.config.quantization_config.decode:
            model.decode_weights(on_the_fly=requested.decode == "on_the_fly")
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict, *args, **kwargs):
        own = self.state_dict().keys()
        check_checkpoint_form(own - state_dict.keys(), state_dict.keys() - own, self.config.deploy)
        return super().load_state_dict(state_dict, *args, **kwargs)

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """Save the model as `PreTrainedModel.save_pretrained` does; the files appear only when all are complete.

        They are written to a temporary folder and then renamed, so that an interrupted save leaves what was there
        before. Weights of an earlier save under other names (sharded or not) are removed.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"{target} is a file: save_pretrained needs a folder.")
        target.mkdir(parents=True, exist_ok=True)
        if push_to_hub:
            kwargs.setdefault("repo_id", target.name)
        self.config.weights_checksum = None  # that of the files it was loaded from
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as folder:
            super().save_pretrained(folder, *args, push_to_hub=push_to_hub, **kwargs)
            replace_files(Path(folder), target)


def _import_compression(caller: str):
    try:
        import repvgg_hf.compression as compression
    except ImportError as error:
        raise ImportError(f"{caller} is part of the package: `pip install repvgg-hf`.") from error
    return compression


__all__ = ["ReparameterizedPreTrainedModel"]
