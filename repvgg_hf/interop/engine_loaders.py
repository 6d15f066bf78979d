"""How each engine loads a classifier: (path, threads) -> what runs images `[images, ...]` to logits, and its ends."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .engine_ends import Ends, Tensor, find_ends
from .extras import require
from .openvino import load_openvino
from .programs import load_program
from .torch_int8 import compile_int8

Run = Callable[[np.ndarray], np.ndarray]


def load_checkpoint(path: Path) -> torch.nn.Module:
    """Return the classifier in a folder, in evaluation. Raises `ValueError` if there is none."""
    from transformers import AutoModelForImageClassification

    try:
        model = AutoModelForImageClassification.from_pretrained(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path} can't be loaded as a classifier's checkpoint ({reason:.300}).") from error
    return model.eval()


def _model_ends(model: torch.nn.Module) -> Ends:
    channels = getattr(model.config, "num_channels", 3)
    return Ends(Tensor("pixel_values", "float32", (None, channels, None, None)), "logits")


def _load_pytorch(path: Path, threads: int | None) -> tuple[Run, Ends]:
    if threads is not None:
        torch.set_num_threads(threads)
    model = load_checkpoint(path)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).logits.float().numpy()

    return run, _model_ends(model)


def _load_inductor(path: Path, threads: int | None) -> tuple[Run, Ends]:
    """Compile when called, for that number of images; later calls with fewer are filled up, but for a single one."""
    if threads is not None:
        torch.set_num_threads(threads)
    model, programs = load_checkpoint(path), {}

    def run(images: np.ndarray) -> np.ndarray:
        size = images.shape[1:]
        known = [count for count, shape in programs if shape == size and count >= len(images) > 1]
        count = min(known, default=len(images))
        filled = torch.from_numpy(np.concatenate([images, np.zeros((count - len(images), *size), images.dtype)]))
        if (count, size) not in programs:
            programs[count, size] = compile_int8(model, filled)
        return programs[count, size](filled)[: len(images)].numpy()

    return run, _model_ends(model)


def _load_torch(path: Path, threads: int | None) -> tuple[Run, Ends]:
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        program = load_program(path).module()
    except Exception as error:  # of many kinds
        raise ValueError(f"{path} can't be loaded by PyTorch ({_reason(error)}): write it anew.") from error

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        return program(torch.from_numpy(images)).numpy()

    return run, Ends(Tensor("pixel_values", "float32", (None, None, None, None)), "logits")


def _load_onnxruntime(path: Path, threads: int | None) -> tuple[Run, Ends]:
    runtime = require("onnxruntime", extra="onnx")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads or 0, 1
    options.log_severity_level = 3  # errors
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of a class for each kind of fault
        raise ValueError(
            f"{path} can't be loaded by ONNX Runtime {runtime.__version__} ({_reason(error)}): the file is damaged, or "
            "needs a newer one, `pip install --upgrade 'repvgg-hf[onnx]'`."
        ) from error
    ends = find_ends(
        path,
        [Tensor(entry.name, entry.type, entry.shape) for entry in session.get_inputs()],
        [Tensor(entry.name, entry.type, entry.shape) for entry in session.get_outputs()],
    )

    def run(images: np.ndarray) -> np.ndarray:
        return session.run([ends.logits], {ends.image.name: images})[0]

    return run, ends


def _load_openvino(path: Path, threads: int | None) -> tuple[Run, Ends]:
    compiled = load_openvino(path, threads=threads)

    def described(port) -> Tensor:
        sizes = [size.get_length() if size.is_static else None for size in port.get_partial_shape()]
        name = next(iter(port.get_names()), "")
        return Tensor(name, port.get_element_type().get_type_name(), sizes)

    inputs, outputs = [described(port) for port in compiled.inputs], [described(port) for port in compiled.outputs]
    ends = find_ends(path, inputs, outputs)
    index = [output.name for output in outputs].index(ends.logits)
    request = compiled.create_infer_request()

    def run(images: np.ndarray) -> np.ndarray:
        return request.infer({0: images}, share_inputs=True)[compiled.outputs[index]].copy()

    return run, ends


def _load_executorch(path: Path, threads: int | None) -> tuple[Run, Ends]:
    runtime = require("executorch.runtime", extra="executorch").Runtime.get()
    if threads is not None:
        _set_executorch_threads(threads)
    try:
        method = runtime.load_program(path.read_bytes()).load_method("forward")
        info = method.metadata
        shapes = [info.input_tensor_meta(index).sizes() for index in range(info.num_inputs())]
    except Exception as error:
        raise ValueError(f"{path} can't be loaded by ExecuTorch ({_reason(error)}): write it anew.") from error
    ends = find_ends(path, [Tensor("", "float32", shape) for shape in shapes], [Tensor("logits", "float32", (0, 0))])

    def run(images: np.ndarray) -> np.ndarray:
        return method.execute([torch.from_numpy(images)])[0].numpy().copy()

    return run, ends


def _set_executorch_threads(threads: int) -> None:
    """Let XNNPACK compute with so many threads, where this build of ExecuTorch can be told."""
    bindings = require("executorch.extension.pybindings.portable_lib", extra="executorch")
    if hasattr(bindings, "_unsafe_reset_threadpool"):
        bindings._unsafe_reset_threadpool(threads)


def _load_litert(path: Path, threads: int | None) -> tuple[Run, Ends]:
    interpreters = require("ai_edge_litert.interpreter", extra="litert")
    try:
        interpreter = interpreters.Interpreter(str(path), num_threads=threads)
        interpreter.allocate_tensors()
    except Exception as error:
        raise ValueError(f"{path} can't be loaded by LiteRT ({_reason(error)}): write it anew.") from error
    (inputs, outputs) = (interpreter.get_input_details(), interpreter.get_output_details())
    ends = find_ends(path, [_described(entry) for entry in inputs], [_described(entry) for entry in outputs])
    index = next(entry["index"] for entry in outputs if entry["name"] == ends.logits)

    def run(images: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(inputs[0]["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(index).copy()

    return run, ends


def _described(details: dict) -> Tensor:
    return Tensor(details["name"], np.dtype(details["dtype"]).name, [int(size) for size in details["shape"]])


def _reason(error: Exception) -> str:
    """The last line of what an engine says, which has the fault itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[-1] if lines else type(error).__name__:.300}"


LOADERS: dict[str, Callable[[Path, int | None], tuple[Run, Ends]]] = {
    "pytorch": _load_pytorch,
    "inductor": _load_inductor,
    "onnxruntime": _load_onnxruntime,
    "openvino": _load_openvino,
    "executorch": _load_executorch,
    "litert": _load_litert,
    "torch": _load_torch,
}

__all__ = ["LOADERS", "Run", "load_checkpoint"]
