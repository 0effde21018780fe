"""The metrics that a task as data names: what they make of answered rows, per row, before intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import DataError
from configs.schema import RunConfig, TaskSection
from jobs.tasks.base import Example, Measure, Metric, Row, TrainingFacts, statistic_metric
from jobs.tasks.bias import bias_metrics, first_preferred
from jobs.tasks.choosing import probabilities, scores, wins
from jobs.tasks.likelihood import bits_measure, likelihood_metrics
from jobs.tasks.plausibility import plausible_measures
from jobs.tasks.programs import code_measures
from jobs.tasks.question import answer_measures
from jobs.tasks.rows import rendered, where
from jobs.tasks.sentiment import label_metrics
from jobs.tasks.summary import rouge_l
from jobs.tasks.text_generation import diversity_metrics
from jobs.tasks.translation import FIGURES
from jobs.tasks.unsupported import calibration_measure, unsupported_measures


@dataclass(frozen=True)
class Answered:
    """A task with its examples and their rows, aligned; rows with an error are left out."""

    task: TaskSection
    examples: Sequence[Example]
    rows: Sequence[Row]

    @property
    def scores(self) -> list[np.ndarray]:
        """Scores of the candidates of each row, normalised as the task says."""
        return [scores(row.answers[0], self.task.normalise) for row in self.rows]

    @property
    def right(self) -> list[np.ndarray]:
        """A 1 for each right candidate of each row, `[candidates]`."""
        return [right_candidates(self.task, example) for example in self.examples]

    @property
    def outputs(self) -> list[str]:
        """What was written for each row, up to the first of the task's stops."""
        return [stopped(row.answers[0]["text"], self.task.stop) for row in self.rows]

    @property
    def references(self) -> list[str]:
        """The targets of the rows."""
        return [example.record.target for example in self.examples]

    @property
    def sources(self) -> list[str]:
        """What was read, as a baseline that copies it writes it."""
        return [example.record.source for example in self.examples]


def passages_of(task: TaskSection, example: Example) -> list[str]:
    """What people name as the reason; raises DataError where that is nothing, or no part of the source."""
    record = example.record
    passages = rendered(task, "rationale", task.rationale, record.fields, record.index).splitlines()
    strange = [passage for passage in passages if passage not in record.source]
    if strange or not passages:
        what = f"{strange[0][:100]!r} does not stand in the source" if strange else "no passage is named"
        raise DataError(f"{where(task, 'rationale')}: row {record.index}: {what}; mend the row or the template")
    return passages


def stopped(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops` in it."""
    return text[: min((place for stop in stops if stop and (place := text.find(stop)) >= 0), default=len(text))]


def right_candidates(task: TaskSection, example: Example) -> np.ndarray:
    """1 for right candidates, 0 for others, `[candidates]`; raises DataError for an answer that names none of them."""
    candidates = example.requests[0].targets
    text = rendered(task, "answer", task.answer, example.record.fields, example.record.index)
    found = np.zeros(len(candidates))
    if text in candidates:
        found[candidates.index(text)] = 1.0
        return found
    if text.isdecimal() and int(text) < len(candidates):
        found[int(text)] = 1.0
        return found
    try:
        labels = json.loads(text)
    except json.JSONDecodeError:
        labels = None
    if isinstance(labels, list) and len(labels) == len(candidates) and set(labels) <= {0, 1} and any(labels):
        return np.array(labels, dtype=np.float64)
    raise DataError(
        f"{where(task, 'answer')}: row {example.record.index}: {text[:200]!r} is none of the {len(candidates)} "
        f"candidates ({', '.join(map(repr, candidates[:4]))}), not the number of one from 0, and no list of a 0 or 1 "
        "for each"
    )


def accuracy(answered: Answered) -> list[Measure]:
    """The share of the highest score's weight that lies on right candidates; candidates with equal scores share it."""
    right = answered.right
    value = np.array([wins(s) @ r for s, r in zip(answered.scores, right, strict=True)])
    beside = {"chance": np.array([r.mean() for r in right])}
    if _same_candidates(answered):
        # A constant answer chosen with the judged rows in view: what must be beaten to tell rows apart.
        constant = int(np.argmax(np.sum(right, axis=0)))
        beside["best constant"] = np.array([r[constant] for r in right])
    return [Measure("accuracy", "accuracy", "share", True, value, np.ones(len(right)), beside)]


def true_mass(answered: Answered) -> list[Measure]:
    """Probability of the right candidates together, of all candidates' (TruthfulQA's MC2, Lin et al. 2022)."""
    right = answered.right
    value = np.array([probabilities(s) @ r for s, r in zip(answered.scores, right, strict=True)])
    beside = {"uniform": np.array([r.mean() for r in right])}
    label = "probability of right candidates"
    return [Measure("true_mass", label, "share", True, value, np.ones(len(right)), beside)]


def preferred(answered: Answered) -> list[Measure]:
    """How often the first candidate is the likelier one."""
    return [first_preferred(answered.scores)]


def written_match(answered: Answered) -> list[Measure]:
    """Whether output and reference are the same but for white space around them."""

    def values(texts: Sequence[str]) -> np.ndarray:
        pairs = zip(texts, answered.references, strict=True)
        return np.array([float(text.strip() == wanted.strip()) for text, wanted in pairs])

    beside = {"source copied": values(answered.sources)}
    own = values(answered.outputs)
    return [Measure("exact_match", "exact match", "share", True, own, np.ones(len(own)), beside)]


def squad(answered: Answered) -> list[Measure]:
    """SQuAD's exact match and F1."""
    references = [[reference] for reference in answered.references]
    return answer_measures(answered.outputs, references, {"source copied": answered.sources})


def rouge(answered: Answered) -> list[Measure]:
    """ROUGE-L F1."""
    own = rouge_l(answered.references, answered.outputs)
    beside = {"source copied": rouge_l(answered.references, answered.sources)}
    return [Measure("rouge_l", "ROUGE-L", "F1", True, own, np.ones(len(own)), beside)]


def bits(answered: Answered) -> list[Measure]:
    """Bits per byte of the targets."""
    return [bits_measure(answered.rows)]


def faithful(answered: Answered) -> list[Measure]:
    """Comprehensiveness and sufficiency of integrated gradients, beside tokens in random order."""
    answers = [row.answers[0] for row in answered.rows]
    ones = np.ones(len(answers))
    return [
        Measure(
            name,
            name,
            "probability",
            higher,
            np.array([answer[name] for answer in answers]),
            ones,
            {"random order": np.array([answer[f"random_{name}"] for answer in answers])},
        )
        for name, higher in (("comprehensiveness", True), ("sufficiency", False))
    ]


def plausible(answered: Answered) -> list[Measure]:
    """How far attributions and attention rollout fall on the passages that people name."""
    passages = [passages_of(answered.task, example) for example in answered.examples]
    return plausible_measures([row.answers[0] for row in answered.rows], passages)


def unsupported(answered: Answered) -> list[Measure]:
    """Names and numbers that were written and that the source lacks, and how good their detector is."""
    task = answered.task
    found = unsupported_measures(answered.sources, answered.outputs, answered.references if task.target else None)
    if task.faithful:
        faithful_texts, unfaithful_texts = (
            [rendered(task, field, template, e.record.fields, e.record.index) for e in answered.examples]
            for field, template in (("faithful", task.faithful), ("unfaithful", task.unfaithful))
        )
        found.append(calibration_measure(answered.sources, faithful_texts, unfaithful_texts))
    return found


def code(answered: Answered) -> list[Measure]:
    """pass@k and the share that parses; runs programs, which `evaluate.allow_code_execution` allowed at the start."""
    texts = [
        [stopped(text, answered.task.stop) for text in row.answers[0].get("texts") or [row.answers[0]["text"]]]
        for row in answered.rows
    ]
    return code_measures(answered.task, answered.examples, texts)


MEASURES: dict[str, Callable[[Answered], list[Measure]]] = {
    "accuracy": accuracy,
    "bbq": accuracy,
    "true_mass": true_mass,
    "first_preferred": preferred,
    "faithfulness": faithful,
    "plausibility": plausible,
    "exact_match": written_match,
    "squad": squad,
    "rouge_l": rouge,
    "bits_per_byte": bits,
    "unsupported": unsupported,
    "pass_at_k": code,
}


def further_metrics(answered: Answered, facts: TrainingFacts, config: RunConfig) -> list[Metric]:
    """What a metric says besides its measures: figures that are no means over rows, and n-gram models as baselines."""
    task = answered.task
    if task.metric == "bits_per_byte":
        return [m for m in likelihood_metrics(answered.rows, facts, config) if m.name != "next_token"]
    if task.metric == "bbq":
        return bias_metrics(answered.scores, answered.right, [e.record.fields for e in answered.examples], config)
    if task.metric == "diversity":
        return diversity_metrics(answered.outputs, answered.references if task.target else None, config)
    if task.metric == "bleu":
        return _translated(answered, config)
    if task.metric == "accuracy" and _same_candidates(answered) and all(r.sum() == 1 for r in answered.right):
        answers = [int(np.argmax(r)) for r in answered.right]
        found = label_metrics(answered.scores, answers, len(answered.right[0]), None, config)[1:]
        # Of log-likelihoods by byte or token no probabilities are made, so nothing is calibrated.
        return [m for m in found if m.name != "calibration_error" or task.normalise == "sum"]
    return []


def _translated(answered: Answered, config: RunConfig) -> list[Metric]:
    found = []
    for name, label, unit, sums_of, figure in FIGURES:
        own, copied = (sums_of(texts, answered.references) for texts in (answered.outputs, answered.sources))
        beside = {"source copied": copied}
        found.append(statistic_metric(name, label, unit, True, own, figure, beside, config.evaluate, config.run.seed))
    return found


def _same_candidates(answered: Answered) -> bool:
    return len({example.requests[0].targets for example in answered.examples}) == 1
