"""Making the package known to Transformers, at next to no cost until a model is loaded.

The quantization method must be known before any model is loaded: of a quantized checkpoint whose method it doesn't
know, Transformers warns, and then leaves the weights random. Importing its table of methods takes as long as all of
its modeling code, which `import repvgg_hf` alone doesn't need. So the method is entered when that table is first
imported, by whoever loads the first model.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.util import find_spec

_TABLE = "transformers.quantizers.auto"


class _AfterImport(MetaPathFinder, Loader):
    """The finder that runs `action` once the module called `name` has been imported, and is gone then."""

    def __init__(self, name: str, action):
        self.name, self.action = name, action

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action()


def register_quantizer() -> None:
    """Enter the `cluster` method into the table of Transformers: now if that is imported, else once it is."""

    def register():
        from .runtime import quantizer_cluster  # noqa: F401  which does it when it is imported

    if _TABLE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport(_TABLE, register))


def register_models() -> None:
    """Enter RepVGG's classes into the Auto classes of Transformers."""
    import transformers
    from transformers import AutoImageProcessor, BitImageProcessorPil
    from transformers.utils import is_torchvision_available

    from .runtime.modeling_repvgg import AUTO_CLASSES, RepVGGConfig

    for auto_class, model_class in AUTO_CLASSES.items():
        getattr(transformers, auto_class).register(RepVGGConfig, model_class)
    processors = {"pil": BitImageProcessorPil}
    if is_torchvision_available():  # without it the name of the other class gives this one, with a warning
        processors["torchvision"] = transformers.BitImageProcessor
    AutoImageProcessor.register(RepVGGConfig, image_processor_classes=processors)
