"""Numbers and names that an output states and its source lacks; a detector by rules, without a model.

How good it is, labelled rows say: the share of unfaithful texts that it flags, beside that of faithful ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from jobs.tasks.base import Measure

NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
SENTENCE_END = re.compile(r"[.!?:\n][\"'\u201d\u2019)]*\s*$")
SPELLED = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
# Capitalised wherever it stands, and no name.
PRONOUN = ("I", "I'm", "I've", "I'll", "I'd")


def numbers(text: str) -> list[str]:
    """Numbers written in digits: `1,000` as 1000, `3,5` as 3.5, `2.50` as 2.50, each as often as it stands."""
    found = []
    for match in NUMBER.finditer(text):
        digits = match[0]
        found.append(digits.replace(",", "") if THOUSANDS.fullmatch(digits) else digits.replace(",", "."))
    return found


def names(text: str) -> list[str]:
    """Capitalised words, each as often as it stands, without a possessive's end.

    The first word of a sentence is one if it is the whole text's only word, the next word is capitalised too, or it has
    another capital: elsewhere a capital there says nothing.
    """
    words = list(WORD.finditer(text))
    found = []
    for place, match in enumerate(words):
        word = match[0].replace("\u2019", "'")
        if not word[0].isupper() or word in PRONOUN:
            continue
        first = place == 0 or SENTENCE_END.search(text[words[place - 1].end() : match.start()] + " ") is not None
        beside = place + 1 < len(words) and text[match.end() : words[place + 1].start()] == " "
        named = beside and words[place + 1][0][0].isupper()
        if not first or named or len(words) == 1 or any(letter.isupper() for letter in word[1:]):
            found.append(_bare(word))
    return found


def unsupported_numbers(source: str, text: str) -> tuple[int, int]:
    """Numbers of `text` that the source has neither in digits nor, up to twelve, in English words; and all numbers."""
    known = set(numbers(source))
    known |= {str(SPELLED.index(word)) for word in _words(source) if word in SPELLED}
    found = numbers(text)
    return sum(each not in known for each in found), len(found)


def unsupported_names(source: str, text: str) -> tuple[int, int]:
    """Names of `text` that are no word of the source, whatever their case; and all names."""
    known = _words(source)
    found = names(text)
    return sum(each.casefold() not in known for each in found), len(found)


def flagged(source: str, text: str) -> bool:
    """Whether a text states a number or a name that its source lacks."""
    return unsupported_numbers(source, text)[0] + unsupported_names(source, text)[0] > 0


def unsupported_measures(
    sources: Sequence[str], outputs: Sequence[str], references: Sequence[str] | None
) -> list[Measure]:
    """Share of unsupported ones among all names, then among all numbers, that were written; not of what never was.

    Their baseline is the same outputs held against the source of the next row. With references also the share of
    outputs that are flagged, beside that of references.
    """
    found = []
    shifted = [*sources[1:], *sources[:1]]
    kinds: tuple[tuple[str, Callable[[str, str], tuple[int, int]]], ...] = (
        ("names", unsupported_names),
        ("numbers", unsupported_numbers),
    )
    for kind, count in kinds:
        own = np.array([count(source, text) for source, text in zip(sources, outputs, strict=True)], dtype=float)
        if own[:, 1].sum() == 0:
            continue
        beside = {"sources exchanged": [count(source, text)[0] for source, text in zip(shifted, outputs, strict=True)]}
        baselines = {name: np.array(values, dtype=float) for name, values in beside.items()}
        name = f"unsupported_{kind}"
        found.append(Measure(name, f"unsupported {kind}", "share", False, own[:, 0], own[:, 1], baselines))
    if references is not None:
        marks = [_marks(sources, texts) for texts in (outputs, references)]
        beside = {"references": marks[1]}
        label = "outputs with an unsupported name or number"
        found.append(Measure("flagged", label, "share", False, marks[0], np.ones(len(sources)), beside))
    return found


def calibration_measure(sources: Sequence[str], faithful: Sequence[str], unfaithful: Sequence[str]) -> Measure:
    """The share of unfaithful texts that is flagged, beside that of faithful ones: a blind detector has them equal."""
    found, false_alarms = _marks(sources, unfaithful), _marks(sources, faithful)
    label = "unfaithful texts that the detector flags"
    return Measure("detector", label, "share", True, found, np.ones(len(found)), {"faithful texts": false_alarms})


def _marks(sources: Sequence[str], texts: Sequence[str]) -> np.ndarray:
    return np.array([float(flagged(source, text)) for source, text in zip(sources, texts, strict=True)])


def _bare(word: str) -> str:
    return word[:-2] if word.endswith("'s") else word


def _words(text: str) -> set[str]:
    """Words in lower case, without a possessive's end; of those with a hyphen also the parts."""
    found = {_bare(match[0].replace("\u2019", "'")).casefold() for match in WORD.finditer(text)}
    return found | {part for word in found for part in word.split("-")}
