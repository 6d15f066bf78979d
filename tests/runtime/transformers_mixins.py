"""Transformers' own tests of a model, for RepVGG in all its forms; `test_transformers_mixins.py` runs this file.

It needs transformers' `tests` folder on the path, of its source distribution. That has not all files which the mixins
import: what is absent tests text generation and exporters. PipelineTesterMixin can't run from it: its tests of each
pipeline are not in the distribution, and its models are on the Hub.
"""

import copy
import importlib.util
import sys
import types
import unittest

import torch
from transformers.models.auto import modeling_auto

from repvgg_hf import RepVGGBackbone, RepVGGConfig, RepVGGForImageClassification, RepVGGModel

NAMES = {
    "MODEL_MAPPING_NAMES": "RepVGGModel",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "RepVGGForImageClassification",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES": "RepVGGBackbone",
}
_NOT_AFTERWARDS = "makes another model of a configuration whose model was converted after it was made"
# tests that look at what Transformers' own models have, and why ours can't pass them: of every form, and of some
UNSUITABLE = {
    "test_model_get_set_embeddings": "there are no embeddings of tokens; ConvNext's tests leave it out too",
    "test_keep_in_fp32_modules_exist": "the names are of modules that prepare_qat() with activation_bits makes",
    "test_training_gradient_checkpointing_use_reentrant_true": "looks at the first layer, the stem, whose input needs "
    "no gradient: re-entrant checkpointing would give it none",
}
UNSUITABLE_IF_CONVERTED = {
    "test_base_model_prefix_loads_base_weights": _NOT_AFTERWARDS,
    "test_init_weights_can_init_buffers": _NOT_AFTERWARDS,
    "test_from_pretrained_no_checkpoint": _NOT_AFTERWARDS,
    "test_model_weights_reload_no_missing_tied_weights": "loads a file without weights, which is refused on purpose",
}
UNSUITABLE_IF_QUANTIZED = {
    "test_can_load_ignoring_mismatched_shapes": "looks for the float weight of a quantized classifier",
    "test_keep_in_fp32_modules": "channel scales stay float32 whatever the dtype: they are stored, not computed with",
}
ABSENT = {"tests.exporters.test_export": "ExportTesterMixin", "tests.generation.test_utils": "GenerationTesterMixin"}


def stand_in_for_absent_modules() -> None:
    """Let empty classes take the place of mixins that the source distribution has not."""
    for name, class_name in ABSENT.items():
        package = name.rpartition(".")[0]
        if importlib.util.find_spec(package) is None:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[name] = types.ModuleType(name)
            setattr(sys.modules[name], class_name, type(class_name, (), {}))


for mapping, class_name in NAMES.items():  # where the mixins look up what a class is for
    getattr(modeling_auto, mapping)["repvgg"] = class_name
stand_in_for_absent_modules()

from tests.test_backbone_common import BackboneTesterMixin  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor  # noqa: E402


def on_meta(model: torch.nn.Module) -> bool:
    return next(model.parameters()).is_meta


def in_form(model_class: type, form: str) -> type:
    """A class of that name whose new models are in train form, fused, quantized or prepared for QAT.

    `from_pretrained` builds its models without weights, and the checkpoint says what becomes of them.
    """

    class InForm(model_class):
        def __init__(self, config, *args, **kwargs):
            super().__init__(config, *args, **kwargs)
            if on_meta(self) or not self.is_whole(config):
                return
            if form == "quantized":
                self.quantize(bits=4)
            elif form == "qat":
                self.prepare_qat(bits=4)

        @staticmethod
        def is_whole(config) -> bool:
            return getattr(config, "quantization_config", None) is None and config.qat_config is None

    InForm.__name__ = InForm.__qualname__ = model_class.__name__
    return InForm if form in ("quantized", "qat") else model_class


class RepVGGTester:
    """What the mixins ask for configurations and inputs."""

    batch_size, image_size, num_labels = 3, 32, 3
    is_training = True

    def __init__(self, parent, form: str):
        self.parent, self.form = parent, form

    def get_config(self) -> RepVGGConfig:
        return RepVGGConfig(
            stem_hidden_size=8, hidden_sizes=[8, 16, 16], depths=[1, 2, 1], strides=[2, 2, 2],
            num_labels=self.num_labels, out_features=["stage2", "stage3"], out_indices=[2, 3],
            deploy=self.form in ("fused", "quantized"),
        )  # fmt: skip

    def prepare_config_and_inputs(self):
        pixel_values = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        return self.get_config(), pixel_values, ids_tensor([self.batch_size], self.num_labels)

    def prepare_config_and_inputs_for_common(self):
        config, pixel_values, _ = self.prepare_config_and_inputs()
        return config, {"pixel_values": pixel_values}


class CommonTests(ModelTesterMixin):
    form: str
    has_attentions = False
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = RepVGGTester(self, self.form)
        self.config_class = RepVGGConfig
        unsuitable = UNSUITABLE | (UNSUITABLE_IF_CONVERTED if self.form in ("quantized", "qat") else {})
        unsuitable |= UNSUITABLE_IF_QUANTIZED if self.form == "quantized" else {}
        if self._testMethodName in unsuitable:
            self.skipTest(f"{self._testMethodName} {unsuitable[self._testMethodName]}")

    def test_hidden_states_output(self):
        """The mixin's own wants `[batch, sequence, hidden_size]`; ConvNext's tests override it like this."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            for wanted in ({"output_hidden_states": True}, {}):
                config.output_hidden_states = not wanted
                with torch.no_grad():
                    hidden_states = model_class(copy.deepcopy(config)).eval()(**inputs, **wanted).hidden_states
                shapes = [tuple(hidden_state.shape[1:]) for hidden_state in hidden_states]
                self.assertEqual(shapes, [(8, 16, 16), (8, 8, 8), (16, 4, 4), (16, 2, 2)])


def model_classes(form: str) -> tuple[type, ...]:
    return tuple(in_form(cls, form) for cls in (RepVGGModel, RepVGGForImageClassification, RepVGGBackbone))


class BranchesTest(CommonTests, unittest.TestCase):
    form, all_model_classes = "branches", model_classes("branches")


class FusedTest(CommonTests, unittest.TestCase):
    form, all_model_classes = "fused", model_classes("fused")


class QuantizedTest(CommonTests, unittest.TestCase):
    form, all_model_classes = "quantized", model_classes("quantized")


class QATTest(CommonTests, unittest.TestCase):
    form, all_model_classes = "qat", model_classes("qat")


class BackboneTests(BackboneTesterMixin):
    form: str
    has_attentions = False
    config_class = RepVGGConfig

    def setUp(self):
        self.model_tester = RepVGGTester(self, self.form)


class BranchesBackboneTest(BackboneTests, unittest.TestCase):
    form, all_model_classes = "branches", (RepVGGBackbone,)


class FusedBackboneTest(BackboneTests, unittest.TestCase):
    form, all_model_classes = "fused", (RepVGGBackbone,)


class QuantizedBackboneTest(BackboneTests, unittest.TestCase):
    form, all_model_classes = "quantized", (in_form(RepVGGBackbone, "quantized"),)


class QATBackboneTest(BackboneTests, unittest.TestCase):
    form, all_model_classes = "qat", (in_form(RepVGGBackbone, "qat"),)
