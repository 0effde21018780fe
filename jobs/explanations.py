"""Explanations that the report draws: a few answers of cells that ask what a choice rests on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobs.results import Cell
from jobs.tasks.base import Explain

# Of each cell.
SHOWN = 2


def explanations(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The first SHOWN answers of each cell of `Explain` requests, those with heat maps first, in their order."""
    found = []
    for cell in cells:
        answered = cell.answered() if cell.rows else []
        explained = [(e, r) for e, r in answered if isinstance(e.requests[0], Explain)]
        for example, row in sorted(explained, key=lambda pair: not pair[1].answers[0]["maps"])[:SHOWN]:
            answer = row.answers[0]
            found.append(
                {
                    "corpus": cell.corpus,
                    "record": str(example.record.index),
                    "choice": example.requests[0].targets[answer["chosen"]],
                    **{key: answer[key] for key in ("pieces", "written", "attribution", "rollout", "maps")},
                }
            )
    return found
