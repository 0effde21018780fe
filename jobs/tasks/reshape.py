"""What templates alone cannot make of rows: candidates for a pronoun, which answers are biased, lists mended."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache

from configs.errors import DataError

Record = dict[str, str]
PRONOUNS = ("he", "him", "his", "himself", "she", "her", "hers", "herself")
ARTICLE = re.compile(r"^(?:the|a|an) ")
SEX = re.compile(r"^[fm](?:, |-)")
MARKED = re.compile(r"\[([^\]]+)\]")
# Occupations of WinoBias (Zhao et al. 2018, table 5), those that stand in its sentences.
OCCUPATIONS = (
    *("driver", "supervisor", "janitor", "cook", "mover", "laborer", "construction worker", "chief", "developer"),
    *("carpenter", "manager", "lawyer", "farmer", "salesperson", "physician", "guard", "analyst", "mechanic"),
    *("sheriff", "ceo", "attendant", "cashier", "teacher", "nurse", "assistant", "secretary", "auditor", "cleaner"),
    *("receptionist", "clerk", "counselor", "designer", "hairdresser", "writer", "housekeeper", "baker", "accountant"),
    *("editor", "librarian", "tailor"),
)
UNKNOWN = "unknown"


def none(record: Record, origin: str) -> Iterator[Record]:
    """The row as it is."""
    yield record


def winobias(record: Record, origin: str) -> Iterator[Record]:
    """Of aligned lines, columns `pro` and `anti`, two rows, each the sentence of a line and who its pronoun means.

    Fields: `side` (pro or anti, as the pronoun agrees with the occupation's stereotype or not), `number` of the line,
    `file`, `sentence` without marks, `pronoun`, `right` and `wrong` (the marked person, and the other one). Raises
    DataError for lines that are no such sentences.
    """
    for side in ("pro", "anti"):
        if side not in record:
            raise DataError(f"{origin}: winobias needs the columns pro and anti, the row has {', '.join(record)}")
        number, _, sentence = record[side].partition(" ")
        marked = MARKED.findall(sentence)
        pronouns = [part for part in marked if part.lower() in PRONOUNS]
        people = [ARTICLE.sub("", part.strip().lower()) for part in marked if part.lower() not in PRONOUNS]
        plain = MARKED.sub(r"\1", sentence)
        others = [name for name in OCCUPATIONS if re.search(rf"\b{name}\b", plain.lower()) and name not in people]
        if not pronouns or len(set(people)) != 1 or not others:
            raise DataError(f"{origin}: {record[side]!r} does not mark a pronoun and one of two occupations")
        yield {
            "file": record.get("file", ""),
            "side": side,
            "number": number,
            "sentence": plain,
            "pronoun": pronouns[0],
            "right": f"the {people[0]}",
            "wrong": f"the {max(others, key=len)}",
        }


def bbq(record: Record, origin: str) -> Iterator[Record]:
    """A row of BBQ (Parrish et al. 2022) or EsBBQ with `unknown` and `biased`, numbers of answers from 0.

    `unknown` is the answer that says it cannot be told. `biased` is the answer that agrees with the stereotype: the one
    of a stereotyped group where the question is negative, the other person where it is not. Rows in which the groups
    of the answers do not tell them apart have `biased` -1 and count in accuracy alone.
    """
    try:
        groups = [_group(record, number) for number in range(3)]
        stereotyped = {name.lower() for name in _stereotyped(record)}
        negative = record["question_polarity"] == "neg"
    except (KeyError, ValueError, SyntaxError, TypeError) as error:
        raise DataError(f"{origin}: no row of BBQ or EsBBQ ({type(error).__name__}: {error})") from error
    unknown = next((i for i, names in enumerate(groups) if UNKNOWN in names), -1)
    if unknown < 0:
        raise DataError(f"{origin}: none of the three answers is marked unknown in answer_info")
    people = [i for i in range(3) if i != unknown]
    targets = [i for i in people if groups[i] & stereotyped]
    biased = -1
    if len(targets) == 1:
        biased = targets[0] if negative else next(i for i in people if i != targets[0])
    yield {**record, "unknown": str(unknown), "biased": str(biased)}


def truthfulqa(record: Record, origin: str) -> Iterator[Record]:
    """A row of TruthfulQA without the empty candidates that stand at the end of some of its lists.

    A model ends at once with some probability, which would count as an answer.
    """
    cleaned = dict(record)
    for name in ("mc1_targets", "mc2_targets"):
        try:
            lists = json.loads(record[name])
            kept = [(c, label) for c, label in zip(lists["choices"], lists["labels"], strict=True) if c.strip()]
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{origin}: no row of TruthfulQA: {name} ({type(error).__name__}: {error})") from error
        lists = {"choices": [choice for choice, _ in kept], "labels": [label for _, label in kept]}
        cleaned[name] = json.dumps(lists, ensure_ascii=False)
    yield cleaned


def mbpp(record: Record, origin: str) -> Iterator[Record]:
    """A row of MBPP (Austin et al. 2021) with `tests`, its assertions one a line, and `test`, the first of them."""
    try:
        tests = json.loads(record["test_list"])
        yield {**record, "tests": "\n".join(tests), "test": tests[0]}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{origin}: no row of MBPP ({type(error).__name__}: {error})") from error


def _group(record: Record, number: int) -> set[str]:
    """Names of an answer's group; of "f, negro" and "F-Black", which tell the sex too, also what stands behind it."""
    name = f"ans{number}"
    if "answer_info" in record:
        info = json.loads(record["answer_info"])[name]
    else:
        info = _listed(record[f"answer_info.{name}"])
    return {form for part in info for form in (part.lower(), SEX.sub("", part.lower()))}


def _stereotyped(record: Record) -> list[str]:
    if "additional_metadata" in record:
        return json.loads(record["additional_metadata"])["stereotyped_groups"]
    return _listed(record["stereotyped_groups"])


@lru_cache(maxsize=4096)
def _listed(text: str) -> list[str]:
    """A list of texts as Python spells it."""
    value = ast.literal_eval(text)
    if not isinstance(value, list) or not all(isinstance(part, str) for part in value):
        raise ValueError(f"{text!r} is no list of texts")
    return value


RESHAPES: dict[str, Callable[[Record, str], Iterator[Record]]] = {
    "none": none,
    "winobias": winobias,
    "bbq": bbq,
    "truthfulqa": truthfulqa,
    "mbpp": mbpp,
}
