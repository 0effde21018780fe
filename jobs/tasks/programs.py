"""Programs that a model completes, judged by running them against their tests: pass@k (Chen et al. 2021)."""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from configs.schema import TaskSection
from jobs.tasks.base import Example, Measure
from jobs.tasks.rows import rendered
from jobs.tasks.sandbox import Outcome, run_programs

# The field of a row under which `program` finds what was written.
COMPLETION = "completion"


def pass_at_k(attempts: int, passed: int, k: int) -> float:
    """The chance that one of `k` of `attempts` drawn without replacement passes, `passed` of which do.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of Chen et al. 2021, equation 1. Raises ValueError unless
    1 <= k <= attempts and 0 <= passed <= attempts.
    """
    if not (1 <= k <= attempts and 0 <= passed <= attempts):
        raise ValueError(f"pass@{k} of {attempts} attempts, {passed} passed: k must lie in 1 .. attempts")
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


def parses(program: str) -> bool:
    """Whether a text is valid Python; nothing is run. What the parser gives up on (nesting, null bytes) is not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ast.parse(program)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return False
    return True


def program_of(task: TaskSection, fields: Mapping[str, str], number: int, completion: str) -> str:
    """The program of a row with `completion` in it."""
    return rendered(task, "program", task.program, {**fields, COMPLETION: completion}, number)


def written_part(task: TaskSection, fields: Mapping[str, str], number: int, completion: str) -> str:
    """What is judged for syntax: the text that precedes the completion in `program`, and the completion."""
    before = task.program.partition("{" + COMPLETION + "}")[0]
    return rendered(task, "program", before, fields, number) + completion


def code_measures(
    task: TaskSection,
    examples: Sequence[Example],
    texts: Sequence[Sequence[str]],
    run: Callable[[Sequence[str]], list[Outcome]] = run_programs,
) -> list[Measure]:
    """pass@1 and further k beside the canonical solutions, which are run each time, and the share that parses.

    `texts` are the attempts at each example, equally many. A control below 1 says that the sandbox, its limits or the
    data keep right programs from passing.
    """
    attempts = len(texts[0])
    records = [example.record for example in examples]

    def programs(make: Callable[..., str], groups: Sequence[Sequence[str]]) -> list[list[str]]:
        return [
            [make(task, r.fields, r.index, text) for text in group] for r, group in zip(records, groups, strict=True)
        ]

    controls = [[record.target] for record in records]
    asked = [each for group in (*programs(program_of, texts), *programs(program_of, controls)) for each in group]
    ended = run(asked)
    # Those that were stopped cannot say; one that had a network speaks for all.
    where = "with limits alone" if any(outcome.apart is False for outcome in ended) else "without network"
    outcomes = [float(outcome.passed) for outcome in ended]
    found = np.array(outcomes[: len(records) * attempts]).reshape(len(records), attempts)
    control = np.array(outcomes[len(records) * attempts :])
    ones = np.ones(len(records))
    measures = [
        Measure(
            f"pass_at_{k}",
            f"pass@{k} of {attempts} attempts, run {where}",
            "share",
            True,
            np.array([pass_at_k(attempts, int(row.sum()), k) for row in found]),
            ones,
            {"canonical solutions": control},
        )
        for k in task.pass_at
    ]
    syntax = [np.mean([parses(each) for each in group]) for group in programs(written_part, texts)]
    right = [float(parses(group[0])) for group in programs(written_part, controls)]
    beside = {"canonical solutions": np.array(right)}
    return [*measures, Measure("parses", "completions that parse", "share", True, np.array(syntax), ones, beside)]
