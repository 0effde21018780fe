"""Records of Python source: one per function whose signature and body compile by themselves.

A function without docstring has empty `docstring`, `summary` and `text`, so templates that need those leave it out.

Text is taken from the file as it stands and moved to the left margin by the indentation of the `def` line, so that
`compile(signature + "\\n" + body)` succeeds for every record. Lines of multi-line strings move with it.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator

from configs.errors import DataError

FIELDS = ("name", "words", "signature", "docstring", "summary", "body", "context", "text", "path")
CONTEXT_CHARACTERS = 600
SUMMARY_WORDS = 3
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+|[^\W\d_]+")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def python_records(content: bytes, relative: str, counts: Counter[str], origin: str) -> Iterator[dict[str, str]]:
    """Records of one file in the order of their `def` lines.

    Counts what is left out: `files that do not parse`, `functions without body` (only a docstring, or all on one
    line), `functions that do not compile alone` (a `nonlocal` of an outer function, say).
    Raises DataError, with `origin` in front, when the file is not UTF-8 and declares no other encoding.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            text = decode_source(content, origin)
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            counts["files that do not parse"] += 1
            return
        # str.splitlines would also split at form feeds and Unicode line ends, where ast counts no new line.
        lines = text.split("\n")
        functions = sorted((node for node in ast.walk(tree) if isinstance(node, Function)), key=lambda n: n.lineno)
        for function in functions:
            record = _record(function, lines, relative, counts)
            if record is not None:
                yield record


def decode_source(content: bytes, origin: str) -> str:
    """Text of a Python file in UTF-8 or the encoding it declares, lines ended by a newline; else raises DataError."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        except SyntaxError:
            encoding = "utf-8"
        if encoding in ("utf-8", "utf-8-sig"):
            raise DataError(
                f"{origin} is not UTF-8 (byte {error.start}) and declares no other encoding; convert the file "
                "(iconv -t UTF-8) or exclude it"
            ) from error
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as other:
            raise DataError(f"{origin} is not {encoding} as it declares (byte {other.start}); mend the file") from other
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _record(function: Function, lines: list[str], relative: str, counts: Counter[str]) -> dict[str, str] | None:
    docstring = ast.get_docstring(function, clean=False) or ""
    first = function.body[0]
    one_line = _first_line(first) == function.lineno or not _starts_its_line(first, lines)
    only_docstring = bool(docstring) and len(function.body) == 1
    if one_line or only_docstring or (docstring and _first_line(function.body[1]) <= first.end_lineno):
        counts["functions without body"] += 1
        return None
    def_line = lines[function.lineno - 1]
    margin = def_line[: len(def_line) - len(def_line.lstrip())]
    signature = _moved(lines[function.lineno - 1 : _first_line(first) - 1], margin).rstrip()
    body_start = first.end_lineno if docstring else _first_line(first) - 1
    body = _moved(lines[body_start : function.end_lineno], margin).strip("\n").rstrip()
    if not _compiles(f"{signature}\n{body}"):
        counts["functions that do not compile alone"] += 1
        return None
    cleaned = inspect.cleandoc(docstring).strip()
    summary = cleaned.split("\n", 1)[0].strip()
    return {
        "name": function.name,
        "words": name_words(function.name),
        "signature": signature,
        "docstring": cleaned,
        "summary": summary if len(summary.split()) >= SUMMARY_WORDS and not summary.startswith(">>>") else "",
        "body": body,
        "context": _context(lines, function.lineno - 1, margin),
        "text": cleaned,
        "path": relative,
    }


def name_words(name: str) -> str:
    """The words of an identifier in lower case, blanks between: `HTTPServer_setUp2` -> `http server set up 2`."""
    return " ".join(WORD.findall(name)).lower()


def _first_line(statement: ast.stmt) -> int:
    decorators = getattr(statement, "decorator_list", None)
    return decorators[0].lineno if decorators else statement.lineno


def _starts_its_line(statement: ast.stmt, lines: list[str]) -> bool:
    """Whether only white space precedes a statement on its line (`col_offset` counts UTF-8 bytes)."""
    return not lines[statement.lineno - 1].encode()[: statement.col_offset].strip()


def _moved(lines: list[str], margin: str) -> str:
    return "\n".join(line.removeprefix(margin) if line.strip() else "" for line in lines)


def _context(lines: list[str], end: int, margin: str) -> str:
    """The last lines before line `end`, at most CONTEXT_CHARACTERS of them together, each ended by a newline."""
    taken: list[str] = []
    room = CONTEXT_CHARACTERS
    for line in reversed(lines[:end]):
        line = line.removeprefix(margin) if line.strip() else ""
        if len(line) + 1 > room:
            break
        room -= len(line) + 1
        taken.append(line + "\n")
    return "".join(reversed(taken)).lstrip("\n")


def _compiles(source: str) -> bool:
    try:
        compile(source, "<record>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
