"""Records of JSON Lines files and of JSON documents, nested ones through a dotted path."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from configs.errors import DataError
from configs.schema import CorpusSection
from data.opening import not_text
from data.templates import where

# A document is parsed whole; what is larger belongs in JSON Lines, which are not.
MOST_DOCUMENT_BYTES = 256 * 2**20
# Half of a character outside the basic plane; one without its other half is valid JSON and no Unicode text.
HALF = re.compile(r"\\u[dD][89a-fA-F]")


def objects(lines: Iterable[str], path: str, origin: str) -> Iterator[dict[str, str]]:
    """Records of lines of one JSON object each; raises DataError, `origin` in front, naming the line."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = _parsed(line)
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


def document(stream: IO[bytes], corpus: CorpusSection, url: str) -> Iterator[dict[str, str]]:
    """Records of a file that is one JSON document; raises DataError that names corpus and file."""
    origin = f"{where(corpus, 'path')}: {url}"
    content = stream.read(MOST_DOCUMENT_BYTES + 1)
    if len(content) > MOST_DOCUMENT_BYTES:
        raise DataError(
            f"{origin} is a JSON document of more than {MOST_DOCUMENT_BYTES:,} bytes, which would be held in memory "
            "whole; convert it to JSON Lines (jq -c '.[]') and use kind: jsonl"
        )
    try:
        value = _parsed(content.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise not_text(corpus, url, error.start) from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{origin} is no JSON document ({error.msg} at line {error.lineno} column {error.colno}); mend it, or use "
            "kind: jsonl when each line is an object of its own"
        ) from error
    yield from _walk(value, corpus.records.split(".") if corpus.records else [], {}, origin)


def _parsed(text: str) -> Any:
    """The value of a JSON text; a half of a character without the other becomes U+FFFD."""
    value = json.loads(text)
    return _mended(value) if HALF.search(text) else value


def _mended(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return {_mended(name): _mended(item) for name, item in value.items()} if isinstance(value, dict) else value


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
    """A text as it is, nothing for null; numbers, truth values, lists and objects in their JSON spelling.

    What JSON has no spelling for (dates, times, decimal numbers) is spelled as Python's `str` does.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | int | float | list | tuple | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
