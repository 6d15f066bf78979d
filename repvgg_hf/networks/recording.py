"""One forward pass of any network, recorded as the graph of PyTorch functions that its example passes through.

A *node* is one call of a PyTorch function with a result that depends on the example, or an input itself. Weights, and
what is computed from them alone, are constants. What could depend on the example in a way that is not seen (a tensor
that came from nowhere, random numbers) is a node without inputs, so that nothing is taken for constant that is not.
"""

import dataclasses
import weakref
from collections import defaultdict
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

OUTSIDE = -1  # the user of a node that is part of the model's output

# functions that give a number for a tensor: what depends on it isn't seen
_READS_VALUES = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "item", "tolist", "numpy",
    "is_nonzero", "equal", "allclose",
}  # fmt: skip
RANDOM = ("rand", "bernoulli", "normal", "multinomial", "poisson", "uniform", "exponential", "cauchy", "geometric")
# of their further tensors these read dtype, device or shape alone
_LIKE_ANOTHER = {"to", "type_as", "expand_as", "view_as", "reshape_as"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
# in float64 these change nothing
SAME = {"to", "float", "half", "double", "bfloat16", "type", "type_as", "contiguous", "clone", "detach", "cpu", "cuda"}


class Ref(int):
    """The number of a node, in the place of its tensor among the arguments of another one."""


@dataclass
class Node:
    """A call of a PyTorch function on tensors that depend on the example.

    Attributes:
        function, args, kwargs: the call, with a [`Ref`] for each tensor that depends on the example.
        inputs: the numbers of the nodes among them.
        modules: names of the modules in whose `forward` it is, from the outermost.
        in_place: whether it overwrites its first argument.
        shape, dtype: of its result, and `None` where that isn't one tensor.
        padded_by: the module whose padding with other than zeros it includes, if it is such a convolution.
        users: the numbers of the nodes that take its result; `OUTSIDE` if the model returns it.
        weights: ids of the modules' tensors that it reads, or that constants among its arguments are computed from.
    """

    function: Any
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    in_place: bool = False
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    padded_by: nn.Conv2d | None = None
    users: set[int] = field(default_factory=set)
    weights: frozenset[int] = frozenset()

    @property
    def name(self) -> str:
        """The function's name; the empty one for an input of the model, or a tensor from nowhere."""
        return getattr(self.function, "__name__", "")


@dataclass
class Call:
    """A call of a module: the nodes of the tensors it takes and returns, and the nodes inside, `first` to `last - 1`.

    `source` is the node of the tensor that is its only argument, and `result` that of the one tensor that it returns;
    `None` where it takes or returns anything else.
    """

    source: int | None
    first: int
    result: int | None = None
    last: int = 0


@dataclass
class Recording:
    """The nodes of one forward pass in order, and the calls of every module by its name.

    Attributes:
        output: what the model returned.
        results: the numbers of the nodes of the tensors in it, `None` for a constant.
        inputs: the number of tensors in the example; their nodes are the first.
        computed: the function, arguments and keyword arguments of each constant that was computed from others.
        weights_read: ids of the modules' tensors whose values the model's code reads as numbers, or which it returns.
        repeats: whether it is known that another pass gives the same, so that no tensor from nowhere is random.
    """

    nodes: list[Node]
    calls: dict[str, list[Call]]
    output: Any
    results: list[int | None]
    inputs: int
    computed: MutableMapping[torch.Tensor, tuple]
    weights_read: set[int]
    repeats: bool = False

    def exact(self, value: Any) -> Any:
        """Return a constant in float64 on the CPU: computed again, if it was computed; anything else as it is.

        A kernel that the model combines from others, in float32, is then as exact as what it is compared with.
        """
        if type(value) in (tuple, list):
            return type(value)(map(self.exact, value))
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value.cpu() if isinstance(value, torch.Tensor) else value
        function, args, kwargs = self.computed.get(value, (None, (), {}))
        if getattr(function, "__name__", None) in SAME:
            return self.exact(args[0])
        if function is not None:
            try:
                again = function(*self.exact(args), **{key: self.exact(given) for key, given in kwargs.items()})
            except (RuntimeError, TypeError, ValueError):  # it does not take float64
                again = None
            if isinstance(again, torch.Tensor) and again.shape == value.shape:
                again = again.detach().to("cpu", torch.float64)
                self.computed[value] = (_get, (again,), {})  # once is enough
                return again
        return value.detach().to("cpu", torch.float64)

    def live(self) -> set[int]:
        """Return the numbers of the nodes that the model's output depends on."""
        found: set[int] = set()
        waiting = [number for number, node in enumerate(self.nodes) if OUTSIDE in node.users]
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += self.nodes[number].inputs
        return found


def _get(value: torch.Tensor) -> torch.Tensor:
    return value


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists, dictionaries and dataclasses, in order."""
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(tuple(values.values()))
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif dataclasses.is_dataclass(values) and not isinstance(values, type):
        yield from tensors_in(tuple(vars(values).values()))


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was overwritten; inference tensors don't count it, nor may they be overwritten."""
    return 0 if tensor.is_inference() else tensor._version


def counted(value: Any) -> Any:
    """Return inputs with a copy in the place of each inference tensor, so that what overwrites it is seen."""
    if isinstance(value, torch.Tensor):
        return value.clone() if value.is_inference() else value
    if type(value) in (tuple, list):
        return type(value)(map(counted, value))
    return {key: counted(entry) for key, entry in value.items()} if type(value) is dict else value


class _Recorder(TorchFunctionMode):
    """Notes every call of a PyTorch function while a model runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.nodes: list[Node] = []
        self.stack: list[tuple[str, nn.Module]] = []
        self.numbers = WeakIdKeyDictionary()  # tensor: number of its node, or None for a constant
        self.computed = WeakIdKeyDictionary()  # constant: how it was computed from others
        self.weights = WeakIdKeyDictionary()  # constant: ids of the modules' tensors that it is computed from
        self.weights_read: set[int] = set()
        self.sharing = defaultdict(list)  # address of the memory: weak references to tensors
        for module in model.modules():
            for tensor in [*vars(module).values(), *module._parameters.values(), *module._buffers.values()]:
                if isinstance(tensor, torch.Tensor):
                    self.register(tensor, None)
                    self.weights[tensor] = frozenset((id(tensor),))

    def register(self, tensor: torch.Tensor, number: int | None) -> None:
        if tensor not in self.numbers:
            self.sharing[_address(tensor)].append(weakref.ref(tensor))
        self.numbers[tensor] = number

    def add(self, tensor: torch.Tensor | None, node: Node) -> int:
        """Append a node, whose result is `tensor`; returns its number."""
        number = len(self.nodes)
        self.nodes.append(node)
        for source in node.inputs:
            self.nodes[source].users.add(number)
        if tensor is not None:
            node.shape, node.dtype = tuple(tensor.shape), tensor.dtype
            self.register(tensor, number)
        return number

    def number_of(self, tensor: torch.Tensor) -> int | None:
        """Return the number of the node that `tensor` is from, `None` for a constant."""
        if tensor not in self.numbers:
            self.add(tensor, Node(None, modules=self.names()))  # from nowhere: it may depend on the example
        return self.numbers[tensor]

    def weights_of(self, tensors: list[torch.Tensor]) -> frozenset[int]:
        return frozenset().union(*(self.weights.get(tensor, ()) for tensor in tensors))

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.stack)

    def reference(self, value: Any) -> Any:
        """Return an argument with a [`Ref`] in the place of every tensor that depends on the example."""
        if isinstance(value, torch.Tensor):
            number = self.number_of(value)
            return value if number is None else Ref(number)
        if type(value) in (tuple, list):
            return type(value)(map(self.reference, value))
        return value

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = list(tensors_in((args, kwargs)))
        refs = self.reference(args), {key: self.reference(value) for key, value in kwargs.items()}
        inputs = tuple(number for number in map(self.number_of, given) if number is not None)
        if inputs and name in _READS_VALUES:
            raise ValueError(self._reads_values(name))
        weights = self.weights_of(given[:1] if name in _LIKE_ANOTHER else given)
        if name in _READS_VALUES:
            self.weights_read |= weights
        versions = [_version(tensor) for tensor in given]
        result = function(*args, **kwargs)
        changed = [tensor for tensor, version in zip(given, versions) if _version(tensor) != version]
        self._note(Node(function, *refs, inputs, self.names(), weights=weights), name, result, changed)
        return result

    def _note(self, node: Node, name: str, result: Any, changed: list[torch.Tensor]) -> None:
        """Make nodes of what a function returned or overwrote, or constants if neither depends on the example."""
        depends = bool(node.inputs) or (name.startswith(RANDOM) or name.removesuffix("_").endswith(RANDOM))
        if name in _SHAPE_ONLY and not changed:
            depends = False
        for tensor in changed:
            self.computed.pop(tensor, None)
            self.weights[tensor] = frozenset() if depends else node.weights
            if depends:
                self._overwritten(node, tensor)
        changed_ids = set(map(id, changed))
        if isinstance(result, torch.Tensor) and self._is_conv_padding(name):
            self.register(result, node.inputs[0] if node.inputs else None)  # one node: the padding and convolution
            return
        results = [tensor for tensor in tensors_in(result) if id(tensor) not in changed_ids]
        for tensor in results:
            if tensor in self.numbers:  # one of the arguments, as contiguous() may return
                continue
            if not depends:
                self.register(tensor, None)
                self.weights[tensor] = node.weights if name not in _SHAPE_ONLY else frozenset()
                if isinstance(result, torch.Tensor) and not changed:
                    self.computed[tensor] = (node.function, node.args, node.kwargs)
            elif isinstance(result, torch.Tensor):
                node.padded_by = self._padding_convolution() if name == "conv2d" else None
                self.add(tensor, node)
            else:
                self.add(tensor, Node(None, inputs=node.inputs, modules=node.modules, weights=node.weights))

    def _overwritten(self, node: Node, tensor: torch.Tensor) -> None:
        """Make the node the new value of `tensor`; other tensors with the same memory have changed as well."""
        address = _address(tensor)
        aliases = [alias for ref in self.sharing[address] if (alias := ref()) is not None and alias is not tensor]
        # a weight that was laid out anew (`data = `) is elsewhere by now, and its old memory may be this tensor's
        aliases = [alias for alias in aliases if _address(alias) == address]
        first = node.args[0] if node.args and isinstance(node.args[0], Ref) else None
        if first is not None and not aliases and self.numbers.get(tensor) == first:
            number = self.add(tensor, dataclasses.replace(node, in_place=True, users=set()))
        else:
            number = self.add(tensor, Node(None, inputs=node.inputs, modules=node.modules, weights=node.weights))
        for alias in aliases:
            before = self.numbers.get(alias)
            inputs = (number,) if before is None else (number, before)
            self.add(alias, Node(None, inputs=inputs, modules=node.modules))

    def _padding_convolution(self) -> nn.Conv2d | None:
        """Return the module that is running if it is a convolution that pads by other than zeros."""
        module = self.stack[-1][1] if self.stack else None
        return module if type(module) is nn.Conv2d and module.padding_mode != "zeros" else None

    def _is_conv_padding(self, name: str) -> bool:
        return name == "pad" and self._padding_convolution() is not None

    def _reads_values(self, name: str) -> str:
        where, module = self.stack[-1] if self.stack else ("", None)
        return (
            f"{where or 'The model'} ({type(module).__name__}) has data-dependent control flow: its forward() reads "
            f"the values of a tensor ({name}), so that other inputs may take another way than the recorded one. Fuse "
            "the parts without it, such as fuse(model.backbone, example)."
        )


def _address(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins; tensors without any don't share it."""
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _hook(recorder: _Recorder, calls: dict[str, list[Call]], name: str, module: nn.Module) -> list:
    """Note when `module` is called; returns the handles of the hooks."""

    def before(module, args, kwargs):
        alone = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
        calls.setdefault(name, []).append(Call(recorder.number_of(args[0]) if alone else None, len(recorder.nodes)))
        recorder.stack.append((name, module))

    def after(module, args, kwargs, result):
        recorder.stack.pop()
        # the call that ends is the last that has not ended: a module may call itself
        call = next(call for call in reversed(calls[name]) if not call.last)
        call.result = recorder.number_of(result) if isinstance(result, torch.Tensor) else None
        call.last = max(len(recorder.nodes), 1)

    return [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]


def arguments_of(example: Any) -> tuple[tuple, dict]:
    """Return the positional and keyword arguments that an `example` stands for.

    It is a tensor, a tuple of positional arguments, or a dictionary of keyword arguments; raises `TypeError` for
    anything else, or one without a tensor.
    """
    if isinstance(example, torch.Tensor):
        return (example,), {}
    if isinstance(example, Mapping):  # transformers' BatchFeature, too
        example = dict(example)
    if next(tensors_in(example), None) is not None:
        if isinstance(example, tuple):
            return example, {}
        if isinstance(example, dict):
            return (), example
    raise TypeError(
        f"example must be a tensor, a tuple of positional inputs or a dictionary of keyword inputs with at least one "
        f"tensor, got {type(example).__name__}."
    )


@torch.inference_mode(False)
@torch.no_grad()
def record(model: nn.Module, example: Any) -> Recording:
    """Run `model` once on an `example`, see [`arguments_of`], and return what it did.

    Raises `ValueError` if the model does not run on it, or has control flow that depends on the example's values.
    """
    args, kwargs = map(counted, arguments_of(example))
    recorder, calls, handles = _Recorder(model), {}, []
    try:
        for name, module in model.named_modules():
            handles += _hook(recorder, calls, name, module)
        for tensor in tensors_in((args, kwargs)):
            recorder.add(tensor, Node(None))
        with recorder:
            output = model(*args, **kwargs)
    except Exception as error:
        if isinstance(error, ValueError) and "data-dependent control flow" in str(error):
            raise
        raise ValueError(_failed(model, recorder, (args, kwargs), error)) from error
    finally:
        for handle in handles:
            handle.remove()
    results = [recorder.number_of(tensor) for tensor in tensors_in(output)]
    for number in results:
        if number is not None:
            recorder.nodes[number].users.add(OUTSIDE)
    recorder.weights_read |= recorder.weights_of(
        [tensor for tensor in tensors_in(output) if tensor in recorder.weights]
    )
    count = sum(1 for _ in tensors_in((args, kwargs)))
    return Recording(recorder.nodes, calls, output, results, count, recorder.computed, recorder.weights_read)


def _failed(model: nn.Module, recorder: _Recorder, example: tuple, error: Exception) -> str:
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors_in(example))
    where, module = recorder.stack[-1] if recorder.stack else ("", model)
    return (
        f"{type(model).__name__} does not run on the example (tensors of {shapes}): {type(error).__name__} in "
        f"{where or 'its forward()'} ({type(module).__name__}): {error}. Give inputs as the model takes them: a "
        "tensor, a tuple of positional inputs or a dictionary of keyword inputs, on the model's device."
    )
