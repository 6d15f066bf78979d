"""Finding the sums of parallel branches in a recorded network: what outlier-aware batch normalization can bound.

A *branch* is one summand: a convolution of the sum's source followed by batch normalization, or batch normalization of
the source alone (the identity). A *dense* branch has the largest kernel of the sum and mixes channels; the others add
to few entries of the fused kernel, and make outliers there.
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from .operations import Affine, Convolution, Operation, Sum, operation_of
from .recording import Recording


@dataclass(frozen=True)
class NormedBranch:
    """A summand that ends in batch normalization: the names of its norm and of its convolution, `None` for identity."""

    norm: str
    convolution: str | None


@dataclass(frozen=True)
class BranchSum:
    """A sum of branches with one source: the dense ones, and those whose contributions are bounded by them."""

    name: str
    dense: tuple[NormedBranch, ...]
    others: tuple[NormedBranch, ...]


@dataclass(frozen=True)
class _Term:
    """A summand, followed back to where it begins.

    Attributes:
        source: number of the node that it begins at.
        norm: name of the module of its batch norm; `None` if it ends in none.
        convolution: name of the module of its convolution, if it has one.
        taps: pixels that its kernel reads.
        mixes: whether an output reads several channels.
    """

    source: int
    norm: str | None = None
    convolution: str | None = None
    taps: int = 1
    mixes: bool = False


class SumFinder:
    """The sums of branches in a recording: `found` and `normed`, and those `left`, with the reason, by name.

    `normed` are all whose branches end in batch norm; `found` are those of them in which some can be bounded.
    """

    def __init__(self, model: nn.Module, recording: Recording):
        self.model, self.recording = model, recording
        self.operations = {number: operation_of(recording, number) for number in range(len(recording.nodes))}
        self.found: list[BranchSum] = []
        self.normed: list[BranchSum] = []
        self.left: dict[str, str] = {}
        for root in self._roots():
            self._judge(root)
        self._drop_shared()

    def _roots(self) -> list[int]:
        """Return the sums that are no summand of another sum, in order."""
        sums = {number: op for number, op in self.operations.items() if isinstance(op, Sum)}
        summands = (summand for operation in sums.values() for summand in (operation.first, operation.second))
        inner = {self._skip(summand) for summand in summands}
        return [number for number in sums if number not in inner]

    def _skip(self, number: int, source: int | None = None) -> int:
        """Go back over nodes that change nothing, such as dropout in eval mode, but not beyond `source`."""
        while number != source and self._changes_nothing(number):
            number = self.recording.nodes[number].inputs[0]
        return number

    def _changes_nothing(self, number: int) -> bool:
        operation = self.operations[number]
        return isinstance(operation, Affine) and operation.is_identity and not self._is_norm(number)

    def _is_norm(self, number: int) -> bool:
        return self.recording.nodes[number].name == "batch_norm"

    def _terms(self, number: int, source: int | None = None) -> list[_Term]:
        """Return the summands of the sum at a node, followed back no further than to `source`."""
        number = self._skip(number, source)
        operation = self.operations[number]
        if number != source and isinstance(operation, Sum) and abs(operation.factor) == 1:
            return [*self._terms(operation.first, source), *self._terms(operation.second, source)]
        return [_Term(number) if number == source else self._term(number)]

    def _term(self, number: int) -> _Term:
        norm = None
        if self._is_norm(number) and self.operations[number] is not None:
            norm = self._module_with("running_var", number)
            number = self._skip(self.recording.nodes[number].inputs[0])
        operation = self.operations[number]
        if not isinstance(operation, Convolution) or operation.pools:
            return _Term(number, norm)
        (source,) = self.recording.nodes[number].inputs
        return _Term(self._skip(source), norm, self._module_with("weight", number), *_reach(operation))

    def _module_with(self, attribute: str, number: int) -> str | None:
        """Return the name of the module that runs the node, if it has what the node computes with."""
        modules = self.recording.nodes[number].modules
        name = modules[-1] if modules else ""
        return name if getattr(self.model.get_submodule(name), attribute, None) is not None else None

    def _judge(self, root: int) -> None:
        """Note the sum at a node as one of branches, or why it is left; other sums of one source are no matter."""
        sources = [term.source for term in self._terms(root) if term.convolution is not None]
        terms = self._terms(root, max(sources, default=None))
        if not sources or len({term.source for term in terms}) > 1 or len(terms) < 2:
            self._judge_summands(root)
            return
        convolutions = [term for term in terms if term.convolution is not None]
        modules = self.recording.nodes[root].modules
        name = modules[-1] if modules else ""
        most = max(term.taps for term in convolutions)
        dense = [term for term in convolutions if term.taps == most and (most > 1 or term.mixes)]
        others = [term for term in terms if term not in dense]
        if len(dense) + len(others) < len(terms):  # the same branch twice: its modules run twice
            self.left[name] = "a branch is added twice"
        elif not dense:
            self.left[name] = "it has no branch that is denser than the others"
        elif unnormed := [term.convolution or "the identity" for term in terms if term.norm is None]:
            self.left[name] = f"{unnormed[0]} has no batch norm of its own whose weight could be bounded"
            self._judge_summands(root)
        else:
            branches = [tuple(NormedBranch(term.norm, term.convolution) for term in group) for group in (dense, others)]
            self._note(BranchSum(name, *branches))

    def _note(self, branches: BranchSum) -> None:
        self.normed.append(branches)
        fixed = [branch.norm for branch in branches.others if not _is_trainable(self.model.get_submodule(branch.norm))]
        if not branches.others:
            self.left[branches.name] = "all branches are dense: none adds to few entries alone"
        elif fixed:
            self.left[branches.name] = f"the weight of {fixed[0]} is no parameter that trains"
        else:
            self.found.append(branches)

    def _judge_summands(self, root: int) -> None:
        """Look at the sums that are summands: branches inside of a residual connection."""
        for summand in (self._skip(number) for number in self.recording.nodes[root].inputs):
            if isinstance(self.operations[summand], Sum):
                self._judge(summand)

    def _drop_shared(self) -> None:
        """Leave sums with a norm that runs more than once: one bound can't fit both places."""
        uses = Counter(branch.norm for found in self.found for branch in (*found.dense, *found.others))
        for found in list(self.found):
            norms = [branch.norm for branch in (*found.dense, *found.others)]
            shared = [norm for norm in norms if uses[norm] > 1 or len(self.recording.calls.get(norm, ())) > 1]
            if shared:
                self.found.remove(found)
                self.left[found.name] = f"{shared[0]} runs more than once in a forward pass"


def _reach(operation: Operation) -> tuple[int, bool]:
    """Return how many pixels a convolution's output reads, and whether it reads several channels."""
    taps = operation.weight.shape[2] * operation.weight.shape[3]
    return taps, operation.weight.shape[1] > 1


def _is_trainable(norm: nn.Module) -> bool:
    return isinstance(norm.weight, nn.Parameter) and norm.weight.requires_grad


__all__ = ["BranchSum", "NormedBranch", "SumFinder"]
