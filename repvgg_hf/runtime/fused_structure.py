"""What fusing did to a network, as a list that a configuration can store, and putting the same into a fresh network.

`repvgg_hf.fuse` replaces modules: one by the fused convolution, the others of the same sum by modules that do nothing.
Each replacement is an *entry*, a dictionary of JSON's types. In the order of the list:

    {"name": "layer1.0.conv1", "kind": "conv2d", "in_channels": 64, "out_channels": 64, "kernel_size": [3, 3],
     "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1, "padding_mode": "zeros"}
    {"name": "layer1.0.bn1", "kind": "identity"}                     returns its input
    {"name": "head.0", "kind": "biased"}                             the same layer, with a bias: a norm's shift
    {"name": "block.conv2", "kind": "nothing"}                       a summand that another convolution has taken in
    {"name": "layer1.0.copy", "kind": "alias", "of": "layer1.0.conv1"}   the same module under a second name

A fused convolution has a bias. With `"then": ["act"]` a `conv2d` or `identity` goes on with children that the replaced
module had, in that order: it becomes an `nn.Sequential` in which the convolution is called `fused`, and the children
keep their names.
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

_PAIRS = ("kernel_size", "stride", "padding", "dilation")
_COUNTS = ("in_channels", "out_channels", "groups")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
_KEYS = {
    "conv2d": {*_PAIRS, *_COUNTS, "padding_mode"},
    "identity": set(),
    "biased": set(),
    "nothing": set(),
    "alias": {"of"},
}
_TAKES_CHILDREN = ("conv2d", "identity")
CONVOLUTION = "fused"  # its name in an nn.Sequential
_FIX = "the configuration was edited or is damaged: fuse and quantize the float model again."


class Nothing:
    """The value of a branch that was fused into another: whatever it is added to stays as it is, at no cost."""

    def _other(self, other):
        return self if isinstance(other, (int, float)) else other  # sum() begins with 0

    __add__ = __radd__ = __iadd__ = __rsub__ = _other

    def _itself(self, other=None):
        return self

    __mul__ = __rmul__ = __imul__ = __truediv__ = __itruediv__ = __neg__ = __pos__ = _itself

    def __fx_create_arg__(self, tracer):
        return 0


class FusedAway(nn.Module):
    """A branch whose share another module of the same sum has taken over: it gives [`Nothing`].

    While the model is compiled or exported it gives the number 0, which a compiler adds at no cost.
    """

    def forward(self, *args, **kwargs):
        return 0 if torch.compiler.is_compiling() else Nothing()


def describe_convolution(name: str, convolution: nn.Conv2d, then: Sequence[str] = ()) -> dict:
    """Return the entry of a fused `convolution` in the place of the module called `name`, followed by its children."""
    entry = {"name": name, "kind": "conv2d"}
    entry |= {key: [int(size) for size in getattr(convolution, key)] for key in _PAIRS}
    entry |= {key: int(getattr(convolution, key)) for key in _COUNTS}
    entry["padding_mode"] = convolution.padding_mode
    return entry | ({"then": list(then)} if then else {})


def check_fused_structure(entries: Sequence[dict]) -> None:
    """Raise `ValueError` naming the entry and the field of a list that can't be what fusing a network left.

    Whether a network has modules of these names, only [`rebuild_fused`] can tell.
    """
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"fused_structure must be a list of entries, got {entries!r}; {_FIX}")
    for position, entry in enumerate(entries):
        where = f"fused_structure[{position}]"
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be a dictionary with 'name' and 'kind', got {entry!r}; {_FIX}")
        name, kind = entry.get("name"), entry.get("kind")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where} must have the dotted 'name' of a module, got {name!r}; {_FIX}")
        where = f"{where}, of {name!r},"
        if not isinstance(kind, str) or kind not in _KEYS:
            raise ValueError(f"{where} must have a 'kind' among {', '.join(_KEYS)}, got {kind!r}; {_FIX}")
        _check_keys(where, entry)
        if kind == "conv2d":
            _check_convolution(where, entry)
        if kind == "alias" and (not isinstance(entry["of"], str) or not entry["of"]):
            raise ValueError(f"{where} must have the name of another module in 'of', got {entry['of']!r}; {_FIX}")
        then = entry.get("then", [])
        if not isinstance(then, (list, tuple)) or not all(isinstance(child, str) and child for child in then):
            raise ValueError(f"{where} must have a list of children's names in 'then', got {then!r}; {_FIX}")
        if CONVOLUTION in then or len(set(then)) < len(then):
            raise ValueError(
                f"{where} must have other and different names than 'fused' in 'then', got {then!r}; {_FIX}"
            )


def _check_keys(where: str, entry: dict) -> None:
    """Raise `ValueError` for a field that an entry lacks, or has and should not."""
    wanted = {"name", "kind"} | _KEYS[entry["kind"]]
    allowed = wanted | ({"then"} if entry["kind"] in _TAKES_CHILDREN else set())
    for key in sorted(wanted - entry.keys()):
        raise ValueError(f"{where} is a {entry['kind']} and has no {key!r}; {_FIX}")
    for key in sorted(map(str, entry.keys() - allowed)):
        raise ValueError(f"{where} is a {entry['kind']} and has an unknown field {key!r}; {_FIX}")


def _is_count(value, lowest: int) -> bool:
    return type(value) is int and value >= lowest


def _check_convolution(where: str, entry: dict) -> None:
    """Raise `ValueError` for sizes that no convolution has."""
    for key in _COUNTS:
        if not _is_count(entry[key], 1):
            raise ValueError(f"{where} must have a positive integer {key!r}, got {entry[key]!r}; {_FIX}")
    for key in _PAIRS:
        pair, lowest = entry[key], 0 if key == "padding" else 1
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(_is_count(size, lowest) for size in pair):
            raise ValueError(f"{where} must have two integers of at least {lowest} in {key!r}, got {pair!r}; {_FIX}")
    for key in ("in_channels", "out_channels"):
        if entry[key] % entry["groups"]:
            raise ValueError(f"{where} has {key}={entry[key]}, which groups={entry['groups']} must divide; {_FIX}")
    if entry["padding_mode"] not in _PADDING_MODES:
        modes = ", ".join(_PADDING_MODES)
        raise ValueError(f"{where} must have a 'padding_mode' among {modes}, got {entry['padding_mode']!r}; {_FIX}")


def with_bias(layer: nn.Module) -> nn.Module:
    """Return a copy of a linear layer or convolution that has a bias, of zeros where it had none."""
    layer = copy.deepcopy(layer)
    if layer.bias is None:
        size = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        layer.bias = nn.Parameter(layer.weight.new_zeros(size), layer.weight.requires_grad)
    return layer


def make_module(entry: dict, replaced: nn.Module, convolution: nn.Conv2d | None = None) -> nn.Module:
    """Return the module that a checked `entry` puts in the place of the `replaced` one, in the same mode.

    `convolution` is the fused one; without it a `conv2d` entry makes one with random weights, of the device and dtype
    of the `replaced` module, and a `biased` entry a copy of that.
    """
    if entry["kind"] == "nothing":
        return FusedAway().train(replaced.training)
    children = OrderedDict((name, replaced.get_submodule(name)) for name in entry.get("then", ()))
    if entry["kind"] == "identity":
        module = nn.Sequential(children) if children else nn.Identity()
    elif entry["kind"] == "biased":
        module = with_bias(replaced) if convolution is None else convolution
    else:
        module = _new_convolution(entry, replaced) if convolution is None else convolution
        module = nn.Sequential(OrderedDict([(CONVOLUTION, module), *children.items()])) if children else module
    module.training = replaced.training  # its children are in their modes
    for child in module.children():
        child.training = child.training if child in children.values() else replaced.training
    return module


def _new_convolution(entry: dict, replaced: nn.Module) -> nn.Conv2d:
    sizes = {key: tuple(entry[key]) for key in _PAIRS} | {key: entry[key] for key in (*_COUNTS, "padding_mode")}
    tensor = next((tensor for tensor in replaced.parameters() if tensor.is_floating_point()), torch.empty(0))
    return nn.Conv2d(**sizes, device=tensor.device, dtype=tensor.dtype)


def replace_modules(
    model: nn.Module, entries: Sequence[dict], convolutions: dict[str, nn.Conv2d]
) -> list[tuple[str, nn.Module]]:
    """Put into `model` what checked `entries` say, with the fused `convolutions` by name.

    Returns names and modules for [`restore_modules`]. Raises `ValueError` naming the entry of a module that `model` has
    not; the model is then unchanged.
    """
    replaced = []
    for position, entry in enumerate(entries):
        name = entry["name"]
        try:
            before = model.get_submodule(name)
            if entry["kind"] == "alias":
                module = model.get_submodule(entry["of"])
            else:
                module = make_module(entry, before, convolutions.get(name))
        except AttributeError as error:
            restore_modules(model, replaced)
            raise ValueError(
                f"fused_structure[{position}] is of the module {name!r}, and this {type(model).__name__} has no such "
                f"({error}): the checkpoint is of another class or configuration."
            ) from error
        model.set_submodule(name, module)
        replaced.append((name, before))
    return replaced


def restore_modules(model: nn.Module, replaced: Sequence[tuple[str, nn.Module]]) -> None:
    """Undo what [`replace_modules`] did, from the list that it returned."""
    for name, module in reversed(replaced):
        model.set_submodule(name, module)


def rebuild_fused(model: nn.Module, entries: Sequence[dict]) -> None:
    """Fuse a fresh `model`, also one on the meta device, as the one was from which `entries` are; weights are random.

    Sets `model.fused_structure`. Raises `ValueError` naming the entry that is malformed, or of a module that the model
    has not; the model is then unchanged.
    """
    check_fused_structure(entries)
    replace_modules(model, entries, {})
    model.fused_structure = [dict(entry) for entry in entries]


__all__ = [
    "FusedAway",
    "Nothing",
    "check_fused_structure",
    "describe_convolution",
    "make_module",
    "rebuild_fused",
    "replace_modules",
    "restore_modules",
    "with_bias",
]
