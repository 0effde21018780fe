"""SQuAD's exact match and F1 (Rajpurkar et al. 2016, section 6.1), its articles also those of Spanish.

The official script strips English articles only, so that "el gato" and "gato" would differ.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

ARTICLES = {"en": ("a", "an", "the"), "es": ("el", "la", "los", "las", "un", "una", "unos", "unas")}
# Beside the ASCII signs those of Spanish texts and of typeset ones.
PUNCTUATION = frozenset(string.punctuation + "¿¡«»“”‘’…–—")


def normalise(text: str, languages: Sequence[str] = ("en", "es")) -> str:
    """Lower case, without punctuation, without the articles of `languages`, white space as single blanks."""
    lowered = "".join(c for c in unicodedata.normalize("NFC", text).lower() if c not in PUNCTUATION)
    articles = "|".join(article for language in languages for article in ARTICLES[language])
    return " ".join(re.sub(rf"\b(?:{articles})\b", " ", lowered).split())


def exact(output: str, references: Sequence[str], languages: Sequence[str] = ("en", "es")) -> float:
    """1.0 when the output is one of the references after `normalise`, else 0.0."""
    found = normalise(output, languages)
    return float(any(found == normalise(reference, languages) for reference in references))


def f1(output: str, references: Sequence[str], languages: Sequence[str] = ("en", "es")) -> float:
    """F1 over the words that output and reference share, the best of the references; 0 to 1.

    Where one of the two has no words after `normalise`, it is 1.0 if neither has (as in SQuAD 2.0's script).
    """
    words = normalise(output, languages).split()
    return max(_f1(words, normalise(reference, languages).split()) for reference in references)


def _f1(output: list[str], reference: list[str]) -> float:
    if not output or not reference:
        return float(output == reference)
    shared = (Counter(output) & Counter(reference)).total()
    if shared == 0:
        return 0.0
    precision, recall = shared / len(output), shared / len(reference)
    return 2 * precision * recall / (precision + recall)
