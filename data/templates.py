"""Turning a record (named strings) into the encoder's text and the text to predict."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Collection, Mapping

from configs.errors import DataError
from configs.schema import CorpusSection

# A continuation's first source holds at most this many characters per encoder position; text has more than one
# character per token, so the first source stays near the encoder's capacity.
CONTINUATION_CHARACTERS_PER_TOKEN = 2

# From the Thai block on most scripts put no blanks between words; Korean does.
FIRST_UNSPACED = "\u0e00"
HANGUL = ("\uac00", "\ud7a3")


def where(corpus: CorpusSection, field: str) -> str:
    """How messages name a field of a corpus: `data.corpora[NAME].FIELD`."""
    return f"{corpus.place}[{corpus.name}].{field}"


def image_field(column: str) -> str:
    """Field of a record that holds a picture's codes as text, `12 7 200 ...`, row by row."""
    return f"image:{column}"


class Template:
    """One parsed template: literal text and field names in braces; `{{` and `}}` stand for braces."""

    def __init__(self, corpus: CorpusSection, field: str) -> None:
        self._where = where(corpus, field)
        text = getattr(corpus, field)
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise DataError(
                f"{self._where}: {text!r} is no template ({error}); write field names in single braces and literal "
                "braces twice"
            ) from error
        pictures = corpus.image_column is not None and field == "target"
        if pictures:
            # One field, named as it is written, whose value extraction makes of the picture.
            parts = [("", image_field(corpus.image_column), "", None)]
        self._parts = [(literal, name) for literal, name, _, _ in parts]
        for _, name, spec, conversion in parts:
            if name is not None and (not name or spec or conversion):
                raise DataError(f"{self._where}: {text!r} has a brace pair that is not a plain field name")
        self.fields = tuple(dict.fromkeys(name for _, name in self._parts if name is not None))

    def check(self, available: Collection[str], origin: str) -> None:
        """Raise DataError when a field is named that records of `origin` lack; the message lists those there are."""
        for name in self.fields:
            if name not in available:
                raise DataError(
                    f"{self._where}: the template names {{{name}}}, which records of {origin} lack; fields there: "
                    f"{', '.join(sorted(available)) or 'none'}"
                )

    def render(self, record: Mapping[str, str]) -> str:
        """The text for one record that has all fields."""
        return "".join(literal + (record[name] if name is not None else "") for literal, name in self._parts)


def literal_start(corpus: CorpusSection) -> str:
    """What every source of a corpus begins with: its template up to the first field."""
    return next((literal for literal, *_ in string.Formatter().parse(corpus.source)), "")


class PairTemplate:
    """Source and target templates of a corpus.

    `source_tokens` is what an encoder reads; None: there is no encoder (`data.layout: sequence`), so sources may be
    empty and the text of a continuation is one target.
    """

    def __init__(self, corpus: CorpusSection, source_tokens: int | None) -> None:
        self._continuation = corpus.continuation
        self._lengths = (corpus.source_characters, corpus.target_characters)
        self._needs_source = source_tokens is not None or bool(corpus.source)
        # None: texts are not cut in two.
        self._most_characters = CONTINUATION_CHARACTERS_PER_TOKEN * source_tokens if source_tokens else None
        self._source, self._target = Template(corpus, "source"), Template(corpus, "target")
        if not self._target.fields:
            raise DataError(f"{where(corpus, 'target')}: the template names no field, so every target would be equal")
        if self._needs_source and not self._continuation and not corpus.source:
            raise DataError(
                f"{where(corpus, 'source')}: empty; give the encoder a template, or set continuation: true for prose"
            )

    def refusal(self, source: str, target: str) -> str | None:
        """Why the length filters leave a rendered pair out, as the manifest's counts call it; None: they do not."""
        if self._continuation:
            target = source + target
        for side, text, limits in zip(("source", "target"), (source, target), self._lengths, strict=True):
            if limits is not None and not limits[0] <= len(text) <= limits[1]:
                return f"records with a {side} that is too {'short' if len(text) < limits[0] else 'long'}"
        return None

    def check(self, available: Collection[str], origin: str) -> None:
        """Raise DataError when records with the fields `available` cannot be rendered."""
        self._source.check(available, origin)
        self._target.check(available, origin)

    def render(self, record: Mapping[str, str]) -> tuple[str, str] | None:
        """(source, target), or None when the target's fields, the target or a source that is needed are empty."""
        if not all(record[name].strip() for name in self._target.fields):
            return None
        source, target = self._source.render(record), self._target.render(record)
        if self._continuation and self._most_characters is not None:
            first, target = cut_in_two(target, self._most_characters)
            source += first
        if self._needs_source and not source.strip():
            return None
        return (source, target) if target.strip() else None


def cut_in_two(text: str, most_characters: int) -> tuple[str, str]:
    """Cut before white space, as near below half of `text` (or `most_characters`) as possible.

    Scripts without blanks (Thai, Chinese, Japanese and others) are cut between any two characters. The parts joined
    are `text`; the first is empty when there is no place to cut.
    """
    place = min(len(text) // 2, most_characters)
    while place > 0 and not _may_cut(text[place - 1], text[place]):
        place -= 1
    return text[:place], text[place:]


def _may_cut(before: str, after: str) -> bool:
    if after.isspace():
        return not before.isspace()
    if after < FIRST_UNSPACED or before < FIRST_UNSPACED:
        return False
    return unicodedata.category(before) == unicodedata.category(after) == "Lo" and not (
        HANGUL[0] <= before <= HANGUL[1] or HANGUL[0] <= after <= HANGUL[1]
    )
