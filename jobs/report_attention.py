"""Explanations in the report: the source's words under attributions, and attention as heat maps in inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

# Side of a cell and room for the words beside, pixels.
CELL, ROOM = 10, 74
WORD_CHARACTERS = 13
# Fainter cells are not drawn.
FAINTEST = 0.02


def explanation_card(found: dict[str, Any]) -> str:
    """One record: its choice, its words coloured, its maps."""
    maps = "".join(
        heat_map(title, rows, *_words(title, found["pieces"], found["written"]))
        for title, rows in found["maps"].items()
    )
    return (
        f'<article class="card sample"><p><b>{escape(found["choice"])}</b> &ensp;{escape(found["corpus"])} '
        f'<span class="soft">held-out record {escape(found["record"])}</span></p>'
        f'{_coloured(found["pieces"], found["attribution"], found["rollout"])}<div class="maps">{maps}</div></article>'
    )


def _words(title: str, source: Sequence[str], written: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Words of rows and of columns."""
    if title.startswith("decoder to encoder"):
        return written, source
    words = source if title.startswith("encoder") else written
    return words, words


def _coloured(pieces: Sequence[str], attribution: Sequence[float], rollout: Sequence[float]) -> str:
    strongest = max(map(abs, attribution), default=0.0) or 1.0
    most = max(rollout, default=0.0) or 1.0
    words = "".join(
        f'<span title="attribution {each:+.4f}, rollout {share:.4f}" style="background:'
        f"color-mix(in srgb, var(--{'good' if each >= 0 else 'bad'}) {55 * abs(each) / strongest:.0f}%, transparent);"
        f'border-color:color-mix(in srgb, var(--accent) {100 * share / most:.0f}%, transparent)">{escape(piece)}</span>'
        for piece, each, share in zip(pieces, attribution, rollout, strict=True)
    )
    return f'<div class="words">{words}</div>'


def heat_map(title: str, rows: Sequence[Sequence[float]], row_words: Sequence[str], column_words: Sequence[str]) -> str:
    """A figure of weights `[rows, columns]`; the strongest weight has full colour, and each cell says its own."""
    weights = np.asarray(rows, dtype=np.float64)
    height, width = weights.shape
    strongest = float(weights.max()) or 1.0
    cells = "".join(
        f'<rect x="{ROOM + column * CELL}" y="{ROOM + row * CELL}" width="{CELL}" height="{CELL}" '
        f'opacity="{weights[row, column] / strongest:.2f}"><title>{weights[row, column]:.3f}</title></rect>'
        for row, column in np.argwhere(weights >= FAINTEST * strongest)
    )
    left = "".join(
        f'<text x="{ROOM - 4}" y="{ROOM + (i + 0.8) * CELL:.0f}" text-anchor="end">{_short(word)}</text>'
        for i, word in enumerate(row_words)
    )
    top = "".join(
        f'<text transform="translate({ROOM + (i + 0.8) * CELL:.0f} {ROOM - 4}) rotate(-90)">{_short(word)}</text>'
        for i, word in enumerate(column_words)
    )
    across, down = ROOM + width * CELL + 1, ROOM + height * CELL + 1
    frame = f'<rect class="frame" x="{ROOM}" y="{ROOM}" width="{width * CELL}" height="{height * CELL}"/>'
    return (
        f"<figure><figcaption>{escape(title)} (full colour {strongest:.2f})</figcaption>"
        f'<svg width="{across}" height="{down}" viewBox="0 0 {across} {down}" role="img" '
        f'aria-label="{escape(title)}">{cells}{frame}{left}{top}</svg></figure>'
    )


def _short(word: str) -> str:
    text = word.strip() or "\u00b7"
    return escape(text if len(text) <= WORD_CHARACTERS else text[: WORD_CHARACTERS - 1] + "\u2026")
