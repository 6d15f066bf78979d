"""Packages of engines: optional, imported where they are used, named with the extra that installs them."""

import importlib
from types import ModuleType


def require(name: str, extra: str) -> ModuleType:
    """Import the module called `name`, such as `"onnxruntime"` or `"coremltools.models"`, and return it.

    Raises `ImportError` naming the `extra` of this package that installs it, if it is missing, and what it said, if it
    is there and can't be imported.

    Example:
    ```python
    >>> from repvgg_hf.interop.extras import require

    >>> onnx = require("onnx", extra="onnx")
    ```"""
    package = name.partition(".")[0]
    install = f"pip install 'repvgg-hf[{extra}]'"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = f"{name} lacks {error.name}"
        if error.name == package:
            missing = f"{package} is not installed"
        elif name.startswith(str(error.name)):
            missing = f"{package} has no {error.name}"
        raise ImportError(f"{missing}, and this needs it: `{install}`.") from error
    except Exception as error:  # a build for another system or Python, or of a package that it needs
        raise ImportError(f"{name} is installed and can't be imported ({error}): `{install} --upgrade`.") from error


__all__ = ["require"]
