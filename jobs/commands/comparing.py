"""`telar compare`: two checkpoints, of one run or of two, on the rows that both were evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.errors import TelarError
from jobs.commands.runs import RunPlace


def compare_runs(
    first: RunPlace, second: RunPlace, steps: tuple[int | None, int | None], only: Sequence[str], rounds: int, seed: int
) -> dict[str, Any]:
    """Both sides, and one result per cell; see `jobs.compare.compare`.

    Raises ConfigError when the rows cannot be paired, and TelarError when no cell has a figure on both sides.
    """
    from jobs.compare import compare, read_side

    sides = []
    for place, step in zip((first, second), steps, strict=True):
        config, manifest = place.config(), _manifest(place, step)
        sides.append(read_side(config, place.storage, place.name, manifest, step))
    cells = compare(sides[0], sides[1], only, rounds, seed)
    if not any(cell["status"] == "ok" for cell in cells):
        reasons = "\n  ".join(f"{c['task']} of {c['corpus']}: {c['status']}: {c['detail']}" for c in cells)
        raise TelarError(
            f"{sides[0].title} and {sides[1].title} have no figure in common; evaluate both first (telar evaluate RUN)"
            f"\n  {reasons}"
        )
    return {
        "first": sides[0].as_dict(),
        "second": sides[1].as_dict(),
        "rounds": rounds,
        "seed": seed,
        "cells": cells,
    }


def as_text(result: dict[str, Any]) -> str:
    """The table for the terminal."""
    from jobs.compare import lines

    return "\n".join(lines(result["first"]["checkpoint"], result["second"]["checkpoint"], result["cells"]))


def _manifest(place: RunPlace, step: int | None) -> Any:
    """The data that the checkpoint was trained on."""
    from data.manifest import Manifest, folder_of
    from jobs.loading import choose_checkpoints

    committed = choose_checkpoints(place.storage, place.name, step)
    return Manifest.read(place.storage, folder_of(committed[-1].manifest["data_digest"]))
