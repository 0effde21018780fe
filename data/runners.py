"""How preparation's tasks are run; this process, one after the other, is the simplest way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

# Maps a module-level function over argument tuples; results come in the order of the arguments.
Runner = Callable[[Callable[..., Any], Sequence[tuple]], list[Any]]


def serial(function: Callable[..., Any], arguments: Sequence[tuple]) -> list[Any]:
    """Call `function` in this process for each tuple of arguments, in order."""
    return [function(*each) for each in arguments]
