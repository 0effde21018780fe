"""Records of bAbI's story files (Weston et al. 2015): one per question, with the story told before it.

A line is `NUMBER SENTENCE`, or `NUMBER QUESTION<tab>ANSWER<tab>NUMBERS OF THE SUPPORTING SENTENCES`; a number that does
not grow begins a new story.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from configs.errors import DataError

FIELDS = ("story", "question", "answer", "supporting", "path")
LINE = re.compile(r"([0-9]+) (.*)")


def stories(lines: Iterable[str], relative: str, origin: str) -> Iterator[dict[str, str]]:
    """Records of a file: `story` (sentences joined by blanks, earlier questions left out), `question`, `answer`.

    `supporting` are the sentences that the answer rests on, one a line, in the story's order; `path` is `relative`.
    Raises DataError, `origin` in front, naming a line that is none of a story.
    """
    told: dict[int, str] = {}
    last = 0
    for place, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found = LINE.fullmatch(line.strip())
        if found is None:
            raise DataError(
                f"{origin} line {place} does not begin with a number and a blank; mend it, or exclude the file"
            )
        number, text = int(found[1]), found[2]
        if number <= last:
            told = {}
        last = number
        question, *rest = text.split("\t")
        if not rest:
            told[number] = text.strip()
            continue
        if len(rest) != 2 or not all(each.isdecimal() and int(each) in told for each in rest[1].split()):
            raise DataError(
                f"{origin} line {place}: after a question come a tab, its answer, a tab and numbers of sentences of "
                "the story; mend the line, or exclude the file"
            )
        supporting = [told[each] for each in sorted(map(int, rest[1].split()))]
        yield {
            "story": " ".join(told.values()),
            "question": question.strip(),
            "answer": rest[0].strip(),
            "supporting": "\n".join(supporting),
            "path": relative,
        }
