"""Records of JSON Lines files and of JSON documents, nested ones through a dotted path."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from configs.errors import DataError

# A document is parsed whole; what is larger belongs in JSON Lines, which are not.
MOST_DOCUMENT_CHARACTERS = 256 * 2**20


def objects(lines: Iterable[str], path: str, origin: str) -> Iterator[dict[str, str]]:
    """Records of lines of one JSON object each; raises DataError, `origin` in front, naming the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{origin} line {number} is no JSON ({error.msg} at column {error.colno}); "
                "each line must hold one object: mend or remove the line"
            ) from error
        if not isinstance(value, dict):
            raise DataError(
                f"{origin} line {number} holds a {type(value).__name__}; each line must "
                'hold one object such as {"text": "..."}'
            )
        yield from _walk(value, path.split(".") if path else [], {}, f"{origin} line {number}")


def document(lines: Iterable[str], path: str, origin: str) -> Iterator[dict[str, str]]:
    """Records of a file that is one JSON document; raises DataError, `origin` in front."""
    parts, characters = [], 0
    for line in lines:
        parts.append(line)
        characters += len(line)
        if characters > MOST_DOCUMENT_CHARACTERS:
            raise DataError(
                f"{origin} is a JSON document of more than {MOST_DOCUMENT_CHARACTERS:,} characters, which would be "
                "held in memory whole; convert it to JSON Lines (jq -c '.[]') and use kind: jsonl"
            )
    try:
        value = json.loads("".join(parts))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin} is no JSON document ({error.msg} at line {error.lineno} column {error.colno}); mend it, or use "
            "kind: jsonl when each line is an object of its own"
        ) from error
    yield from _walk(value, path.split(".") if path else [], {}, origin)


def _walk(value: Any, steps: list[str], outer: dict[str, Any], origin: str) -> Iterator[dict[str, str]]:
    """Records at the end of `steps`; each has the fields of the objects passed on the way, the inner ones first."""
    if isinstance(value, list):
        for item in value:
            yield from _walk(item, steps, outer, origin)
    elif not steps:
        own = value if isinstance(value, dict) else {"text": value}
        yield {name: as_text(item) for name, item in {**outer, **own}.items()}
    elif isinstance(value, dict) and steps[0] == "*":
        for name, item in value.items():
            yield from _walk(item, steps[1:], {**outer, "key": name}, origin)
    elif isinstance(value, dict) and steps[0] in value:
        passed = {name: item for name, item in value.items() if name != steps[0]}
        yield from _walk(value[steps[0]], steps[1:], {**outer, **passed}, origin)
    else:
        there = f"; fields there: {', '.join(value)}" if isinstance(value, dict) else f": a {type(value).__name__}"
        raise DataError(f"{origin}: the path of `records` asks for {steps[0]!r} where there is none{there}")


def as_text(value: object) -> str:
    """A text as it is, nothing for null, all else in its JSON spelling."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False, default=str)
