"""Where in a network a region's one convolution goes, and what becomes of the other modules that it was computed by.

In order of preference: in the place of a module that is the region; in that of a convolution whose result passes
through modules that become identities; in that of a module that is the region followed by children of its own, such as
an activation; in that of one branch, while the others give nothing (`FusedAway`) to the sum. What a module computes in
its own `forward` can't be replaced: a region is left where that is in the way.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from ..runtime.fused_structure import CONVOLUTION
from .operations import OPERATORS, Affine, Convolution, Sum
from .recording import Call
from .regions import Graph, Region
from .report import FusedRegion


@dataclass(frozen=True)
class Edit:
    """What becomes of a module: the `kind` of an entry, see `fused_structure.py`, and the children it goes on with."""

    kind: str
    then: tuple[str, ...] = ()


@dataclass
class Found:
    """A region with what takes its place, and the entries that say what becomes of which module."""

    nodes: frozenset[int]  # the last of which is its result
    source: int
    region: FusedRegion
    entries: list[dict]
    convolution: nn.Module


class Placement:
    """Finds where fused convolutions go in a recorded `model`."""

    def __init__(self, model: nn.Module, graph: Graph):
        self.model, self.graph, self.calls = model, graph, graph.recording.calls
        self.modules = dict(model.named_modules())
        self.owners = Counter(id(tensor) for module in self.modules.values() for tensor in module._parameters.values())
        self.readers = defaultdict(set)  # by the id of a module's tensor: the nodes that read it
        for number, node in enumerate(graph.recording.nodes):
            for weight in node.weights if number in graph.live else ():
                self.readers[weight].add(number)
        self.names = defaultdict(list)  # every name of a module
        for name, module in model.named_modules(remove_duplicate=False):
            self.names[id(module)].append(name)

    def reason_to_leave(self, region: Region) -> str | None:
        """Tell why the region's modules can't be replaced wherever they are, `None` if they can."""
        outside = self.graph.used_outside(region)
        if outside:
            return f"what {self._label(outside[0])} gives is used elsewhere as well"
        for number in sorted(region.form.nodes):
            node, operation = self.graph.recording.nodes[number], self.graph.operations[number]
            for name in node.modules[::-1]:
                if len(self.calls[name]) > 1:
                    return f"{name} runs {len(self.calls[name])} times in one pass, with the same weights"
            if isinstance(operation, Convolution) and self.owners[id(operation.weight)] > 1:
                return f"{node.modules[-1] or 'the model'} shares its weight with another module"
        return None

    def _label(self, number: int) -> str:
        node = self.graph.recording.nodes[number]
        name = f"{node.name}()" if node.name else "a function of several results"
        return f"{name} in {node.modules[-1] or 'the model'}" if node.modules else name

    def find(self, region: Region) -> dict[str, Edit] | str:
        """Return the edits by module name, one of which is the convolution, or the reason why there are none."""
        inside = self._modules_inside(region)
        exact = [name for name, call in inside.items() if _ends(call) == (region.form.source, region.result)]
        innermost = max(exact, key=len, default=None)
        edits = self._spread(region, _outermost(inside)) if innermost is None else {innermost: Edit("conv2d")}
        if edits is None:
            return f"its nodes are computed by forward() of {self._common_module(region)} itself, not by modules in it"
        reasons = (self.reason_to_keep(*replaced, region.form.nodes) for replaced in self._replaced(edits))
        return next(filter(None, reasons), edits)

    def reason_to_keep(self, name: str, module: nn.Module, nodes: frozenset[int]) -> str | None:
        """Tell what would be lost with a module that computes among `nodes` alone, `None` if nothing."""
        for hooks, kind in (
            (module._forward_hooks or module._forward_pre_hooks, "forward"),
            (module._backward_hooks or module._backward_pre_hooks, "backward"),
        ):
            if hooks:
                return f"{name} has {kind} hooks (pruning, offloading or another tool's), which would be lost"
        for key, tensor in {**module._parameters, **module._buffers}.items():
            others = self.readers[id(tensor)] - nodes if tensor is not None else ()
            if others or (tensor is not None and id(tensor) in self.graph.recording.weights_read):
                where = f"by {self._label(min(others))}" if others else "as a number or output"
                return f"the model reads {name}.{key} elsewhere as well, {where}"
        return None

    def _replaced(self, edits: dict[str, Edit]) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules that edits take out of the model, with their names."""
        for name, edit in edits.items():
            kept = [f"{name}.{child}" for child in edit.then]
            for inner, module in self.modules[name].named_modules(prefix=name):
                if not any(_is_below(inner, child) for child in kept):
                    yield inner, module

    def _common_module(self, region: Region) -> str:
        """Return the name of the innermost module that all of the region is in."""
        stacks = [self.graph.recording.nodes[number].modules for number in region.form.nodes]
        common = [names[0] for names in zip(*stacks) if len(set(names)) == 1]
        return (common or [""])[-1] or "the model"

    def _modules_inside(self, region: Region) -> dict[str, Call]:
        """Return the modules that compute nodes of the region and nothing else, from one tensor to one."""
        nodes, found = region.form.nodes, {}
        around = {name for number in nodes for name in self.graph.recording.nodes[number].modules}
        for name in sorted(around):
            calls = self.calls[name]
            call = calls[0]
            ends_inside = call.result in nodes and (call.source in nodes or call.source == region.form.source)
            if name and len(calls) == 1 and ends_inside and call.first < call.last and self._is_in(call, nodes):
                found[name] = call
        return found

    def _is_in(self, call: Call, nodes: frozenset[int]) -> bool:
        """Tell whether a module computes nothing but these nodes, what nobody needs (to read its shape) aside."""
        return all(number in nodes or number not in self.graph.live for number in range(call.first, call.last))

    def _spread(self, region: Region, inside: dict[str, Call]) -> dict[str, Edit] | None:
        """Find edits of several modules, or of one that does more than the region."""
        path = _Path(self, region, inside)
        along = path.edits()
        if along is not None and not path.left_over(along):
            return along
        followed = self._followed(region)
        for name, children in followed.items():
            if self.calls[name][0].source == region.form.source:
                return {name: Edit("conv2d", children)}
        if along is None:
            return None
        return along | {name: Edit("nothing") for name in path.left_over(along)}

    def _followed(self, region: Region) -> dict[str, tuple[str, ...]]:
        """Return the modules that compute the region's result and then run children of their own on it, in a row.

        The innermost is first.
        """
        found = {}
        for name in self.graph.recording.nodes[region.result].modules[::-1]:
            call = self.calls[name][0]
            starts = call.source in region.form.nodes or call.source == region.form.source
            if name and len(self.calls[name]) == 1 and starts and call.result is not None:
                children = self._children_after(name, call, region)
                if children:
                    found[name] = children
        return found

    def _children_after(self, name: str, call: Call, region: Region) -> tuple[str, ...] | None:
        """Return the children that the module runs after the region, if there is nothing else in it."""
        rest = set(range(call.first, call.last)) - region.form.nodes
        children = []
        for child, _ in self.modules[name].named_children():
            calls = self.calls.get(f"{name}.{child}", [])
            if len(calls) == 1 and set(range(calls[0].first, calls[0].last)) & rest:
                children.append((calls[0].first, child, calls[0]))
        current = self._unchanged(name, region.result, rest)
        for _, _, inner in sorted(children, key=lambda entry: entry[0]):
            if inner.source != current or inner.result is None:
                return None
            rest -= set(range(inner.first, inner.last))
            current = self._unchanged(name, inner.result, rest)
        names = tuple(child for _, child, _ in sorted(children, key=lambda entry: entry[0]))
        return names if current == call.result and not rest and CONVOLUTION not in names else None

    def _unchanged(self, name: str, number: int, rest: set[int]) -> int:
        """Follow nodes of a module's own that change nothing, such as `y += 0`, and take them out of `rest`."""
        for following in sorted(rest):
            node, operation = self.graph.recording.nodes[following], self.graph.operations.get(following)
            unchanged = isinstance(operation, Affine) and operation.is_identity
            if unchanged and node.modules[-1] == name and node.inputs == (number,):
                rest.discard(following)
                number = following
        return number


class _Path:
    """A way back from a region's result to its source through modules that can be replaced."""

    def __init__(self, placement: Placement, region: Region, inside: dict[str, Call]):
        self.graph, self.region, self.inside = placement.graph, region, inside
        self.by_result = {call.result: (name, call.source, ()) for name, call in inside.items()}
        for name, children in placement._followed(region).items():
            source = placement.calls[name][0].source
            if source != region.form.source:
                self.by_result.setdefault(region.result, (name, source, children))

    def edits(self) -> dict[str, Edit] | None:
        return self._back(self.region.result)

    def left_over(self, edits: dict[str, Edit]) -> list[str]:
        """Return the modules of the region that none of the edits is of: they are other branches."""
        return [name for name in self.inside if not any(_is_below(name, other) for other in edits)]

    def _back(self, number: int) -> dict[str, Edit] | None:
        """Return the edits that make the node `number` what the region's one convolution gives."""
        if number in self.by_result:
            name, source, children = self.by_result[number]
            if source == self.region.form.source:
                return {name: Edit("conv2d", children)}
            before = self._back(source)
            return None if before is None else before | {name: Edit("identity", children)}
        operation = self.graph.operations.get(number) if number in self.region.form.nodes else None
        if isinstance(operation, Sum):
            ways = [(operation.first, operation.second)]
            ways += [(operation.second, operation.first)] if operation.factor == 1 else []
            for main, other in ways:
                edits = self._back(main) if self._may_be_nothing(other) else None
                if edits is not None:
                    return edits
        if isinstance(operation, Affine) and operation.is_identity:
            return self._back(self.graph.recording.nodes[number].inputs[0])
        return None

    def _may_be_nothing(self, number: int) -> bool:
        """Tell whether a node is computed by modules, or by operators on what modules give."""
        if number in self.by_result:
            return True
        node, operation = self.graph.recording.nodes[number], self.graph.operations.get(number)
        if number not in self.region.form.nodes or node.name not in OPERATORS:
            return False
        if isinstance(operation, Affine):
            return not operation.shift.any() and self._may_be_nothing(node.inputs[0])
        return isinstance(operation, Sum) and operation.factor == 1 and all(map(self._may_be_nothing, node.inputs))


def _ends(call: Call) -> tuple[int | None, int | None]:
    return call.source, call.result


def _is_below(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _outermost(inside: dict[str, Call]) -> dict[str, Call]:
    """Return the modules that are in no other, and of modules that only call another the one that they call."""
    lengths = {name: call.last - call.first for name, call in inside.items()}
    found = {}
    for name, call in inside.items():
        above = [other for other in inside if other != name and _is_below(name, other)]
        below = [other for other in inside if other != name and _is_below(other, name)]
        same = any(lengths[other] == lengths[name] for other in below)
        if not same and all(lengths[other] == lengths[name] for other in above):
            found[name] = call
    return found
