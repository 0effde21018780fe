"""Lengths of time as people write them: 45s, 30m, 3h, 30d, and back."""

from __future__ import annotations

import re

from configs.errors import ConfigError

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(text: str, option: str) -> float:
    """Seconds, more than 0; raises ConfigError that names the option."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhdw])", text.strip())
    seconds = float(found[1]) * SECONDS[found[2]] if found else 0.0
    if seconds <= 0:
        raise ConfigError(f"{option}: {text!r} is no length of time; write a number and one of s, m, h, d, w, like 3h")
    return seconds


def in_words(seconds: float) -> str:
    """Two or three figures and a unit: 380 ms, 42 s, 7.5 min, 3.2 h, 34 d."""
    for size, unit in ((86400.0 * 2, "d"), (3600.0 * 2, "h"), (120.0, "min"), (1.0, "s")):
        if seconds >= size:
            per_unit = {"d": 86400.0, "h": 3600.0, "min": 60.0, "s": 1.0}[unit]
            return f"{_figures(seconds / per_unit)} {unit}"
    return f"{_figures(seconds * 1000)} ms"


def _figures(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
