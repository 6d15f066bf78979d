"""Option dataclasses whose errors name the option that was meant."""

import dataclasses
import difflib
import functools
import os
from collections.abc import Iterable


def unknown_option(name: str, known: Iterable[str], where: str) -> str:
    """Return the message for an option `name` that `where` does not have, with what it may have been meant to be."""
    known = sorted(known)
    similar = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {similar[0]!r}?" if similar else f"it takes {', '.join(known)}."
    return f"{where} has no option {name!r}: {hint}"


def is_misspelt(name: str, meant: str) -> bool:
    """Tell whether `name` is `meant` with one slip: a character more, less or wrong, or two neighbors swapped."""
    if name == meant or abs(len(name) - len(meant)) > 1:
        return False
    start = len(os.path.commonprefix([name, meant]))
    rest, wanted = name[start:], meant[start:]
    swapped = rest[:2] == wanted[1::-1] and rest[2:] == wanted[2:]
    return swapped or rest[1:] == wanted or rest == wanted[1:] or rest[1:] == wanted[1:]


def suggest_options(cls):
    """Make a dataclass raise `TypeError` with a suggestion for an unknown keyword argument; a class decorator."""
    accept = cls.__init__
    known = [field.name for field in dataclasses.fields(cls) if field.init]

    @functools.wraps(accept)
    def __init__(self, *args, **kwargs):
        for name in kwargs:
            if name not in known:
                raise TypeError(unknown_option(name, known, cls.__name__))
        accept(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


__all__ = ["is_misspelt", "suggest_options", "unknown_option"]
