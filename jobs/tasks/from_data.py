"""A task made of its definition: requests from templates, metrics by name, by group, and between two groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from configs.errors import DataError
from configs.schema import RunConfig, TaskSection
from data.held_out import HeldOut
from jobs.intervals import difference_interval
from jobs.tasks.base import (
    Attempts,
    Choices,
    Example,
    Explain,
    Generate,
    LogLikelihood,
    Measure,
    Metric,
    Request,
    Row,
    TrainingFacts,
    metric_of,
)
from jobs.tasks.choosing import scores
from jobs.tasks.metrics import MEASURES, Answered, further_metrics, passages_of, right_candidates, stopped
from jobs.tasks.rows import digest_of_definition, rendered, where

# To be raised when requests or metrics of the same definition change their meaning.
VERSION = 1
# Tokens of an explanation that samples show.
SHOWN = 8


class DataTask:
    """A `TaskSection` at work; its cell is named after the definition, and the task after the metric."""

    version = VERSION

    def __init__(self, definition: TaskSection) -> None:
        self.definition = definition
        self.name = definition.metric
        how = {
            "generate": "decoding as in the settings",
            "choices": f"eos included, compared by {definition.normalise}",
            "explain": "eos included, integrated gradients",
            "loglikelihood": "eos included",
        }[definition.request]
        digest = digest_of_definition(definition)[:12]
        self.signature = f"task {definition.name}, {definition.request}, {how}; definition {digest}"
        self.headline = _headline(definition.metric)

    def limit(self, config: RunConfig) -> int:
        """The definition's own limit, else `evaluate.generate_records` or `evaluate.likelihood_records`."""
        if self.definition.limit is not None:
            return self.definition.limit
        evaluate = config.evaluate
        costly = self.definition.request in ("generate", "explain")
        return evaluate.generate_records if costly else evaluate.likelihood_records

    def max_new_tokens(self, config: RunConfig) -> int:
        """The longest output of this task."""
        return self.definition.max_new_tokens or config.evaluate.max_new_tokens

    def examples(self, records: Sequence[HeldOut], corpus_task: str, config: RunConfig) -> list[Example]:
        """One request per row; raises DataError, naming field and row, for what no request or score can be made of."""
        task = self.definition
        examples = [Example(record, (self._request(record),)) for record in records]
        if task.answer:
            examples = [self._with_target(example) for example in examples]
        for example in examples if task.rationale else ():
            passages_of(task, example)
        groups = set(self.keys("group", examples)) if task.group else set()
        if task.gap is not None and not groups.issuperset(task.gap):
            raise DataError(f"{where(task, 'gap')}: rows have the groups {', '.join(sorted(groups))}, not {task.gap}")
        if task.pair_by:
            self._check_pairs(examples)
        return examples

    def keys(self, field: str, examples: Sequence[Example]) -> list[str]:
        """The text of template `group` or `pair_by` for each example."""
        template = getattr(self.definition, field)
        return [rendered(self.definition, field, template, e.record.fields, e.record.index) for e in examples]

    def score(
        self,
        examples: Sequence[Example],
        rows: Sequence[Row],
        facts: TrainingFacts,
        corpus: str,
        config: RunConfig,
    ) -> list[Metric]:
        """The metric's figures, its first one for each group, and the gap between two groups."""
        answered = Answered(self.definition, examples, rows)
        measures = MEASURES[self.name](answered) if self.name in MEASURES else []
        further = further_metrics(answered, facts, config)
        said = {metric.name for metric in further}
        metrics = [*(metric_of(measure, config) for measure in measures if measure.name not in said), *further]
        if self.definition.group and measures:
            metrics += self._by_group(measures[0], examples, config)
        return metrics

    def measure(self, examples: Sequence[Example], rows: Sequence[Row]) -> Measure:
        """The first measure of the metric."""
        return MEASURES[self.name](Answered(self.definition, examples, rows))[0]

    def output(self, example: Example, row: Row) -> str | None:
        """What was written up to a stop, or the candidate that was chosen; None where a text was scored."""
        task = self.definition
        if task.attempts > 1:
            return stopped(row.answers[0]["texts"][0], task.stop)
        if task.request == "generate":
            return stopped(row.answers[0]["text"], task.stop)
        if task.request == "choices":
            return example.requests[0].targets[int(np.argmax(scores(row.answers[0], task.normalise)))]
        if task.request == "explain":
            answer = row.answers[0]
            strongest = np.argsort(-np.asarray(answer["attribution"]), kind="stable")[:SHOWN]
            chosen = example.requests[0].targets[answer["chosen"]]
            return f"{chosen}, resting on: {' | '.join(answer['pieces'][i].strip() for i in strongest)}"
        return None

    def _request(self, record: HeldOut) -> Request:
        task = self.definition
        if task.attempts > 1:
            return Attempts(record.source, task.attempts, task.temperature, record.index)
        if task.request == "generate":
            return Generate(record.source)
        if task.request == "loglikelihood":
            if not record.target:
                raise DataError(f"{where(task, 'target')}: row {record.index} has an empty text, which has no bits")
            return LogLikelihood(record.source, record.target)
        candidates = self._candidates(record)
        if len(candidates) < 2 or not all(candidates):
            raise DataError(f"{where(task, 'choices')}: row {record.index} needs two candidates or more, none empty")
        return (Explain if task.request == "explain" else Choices)(record.source, candidates)

    def _candidates(self, record: HeldOut) -> tuple[str, ...]:
        task = self.definition
        if not isinstance(task.choices, str):
            return tuple(
                rendered(task, f"choices.{i}", template, record.fields, record.index)
                for i, template in enumerate(task.choices)
            )
        text = rendered(task, "choices", task.choices, record.fields, record.index)
        try:
            found = json.loads(text)
        except json.JSONDecodeError:
            found = None
        if not isinstance(found, list) or not all(isinstance(part, str) for part in found):
            raise DataError(f"{where(task, 'choices')}: row {record.index}: {text[:200]!r} is no JSON list of texts")
        return tuple(found)

    def _with_target(self, example: Example) -> Example:
        """The example with its right candidates as the record's target, where samples show them."""
        right = right_candidates(self.definition, example)
        candidates = example.requests[0].targets
        target = "\n".join(candidates[i] for i in np.flatnonzero(right))
        return replace(example, record=replace(example.record, target=target))

    def _check_pairs(self, examples: Sequence[Example]) -> None:
        """Raise DataError when one side of a pairing has a key twice, so that it is unclear what belongs together."""
        task, keys = self.definition, self.keys("pair_by", examples)
        sides = self.keys("group", examples) if task.gap is not None else [""] * len(keys)
        seen: set[tuple[str, str]] = set()
        for side, key in zip(sides, keys, strict=True):
            if (side, key) in seen and (task.gap is None or side in task.gap):
                raise DataError(
                    f"{where(task, 'pair_by')}: {key!r} stands twice in {side or 'the rows'}; use more fields"
                )
            seen.add((side, key))

    def _by_group(self, measure: Measure, examples: Sequence[Example], config: RunConfig) -> list[Metric]:
        groups = np.array(self.keys("group", examples))
        found = []
        for group in sorted(set(groups.tolist())):
            part = measure.of(np.flatnonzero(groups == group))
            if part.denominators.sum() > 0:
                named = Measure(
                    **{**vars(part), "name": f"{measure.name}:{group}", "label": f"{measure.label}, {group}"}
                )
                found.append(metric_of(named, config))
        gap = self._gap(measure, groups, examples, config)
        return [*found, gap] if gap is not None else found

    def _gap(
        self, measure: Measure, groups: np.ndarray, examples: Sequence[Example], config: RunConfig
    ) -> Metric | None:
        task = self.definition
        if task.gap is None or not set(groups.tolist()).issuperset(task.gap):
            return None
        sides = [np.flatnonzero(groups == name) for name in task.gap]
        if task.pair_by:
            keys = self.keys("pair_by", examples)
            sides = list(paired([keys[i] for i in sides[0]], [keys[i] for i in sides[1]], *sides))
            if not sides[0].size:
                return None
        first, second = (measure.of(side) for side in sides)
        found = difference_interval(
            (first.numerators, first.denominators),
            (second.numerators, second.denominators),
            bool(task.pair_by),
            config.evaluate.bootstrap_rounds,
            config.run.seed,
        )
        label = f"{measure.label}, {task.gap[0]} minus {task.gap[1]}"
        return Metric("gap", label, found.value, found.low, found.high, found.n, measure.unit, None)


def paired(
    first_keys: Sequence[str], second_keys: Sequence[str], first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Entries of `first` and `second` whose keys stand on both sides, in the order of the first."""
    places = {key: number for number, key in enumerate(second_keys)}
    shared = [(i, places[key]) for i, key in enumerate(first_keys) if key in places]
    numbers = np.array(shared, dtype=np.int64).reshape(-1, 2)
    return np.asarray(first)[numbers[:, 0]], np.asarray(second)[numbers[:, 1]]


def _headline(metric: str) -> str | None:
    # Their figures may be absent: nothing that counts was written, or was left of the source.
    if metric not in MEASURES or metric in ("plausibility", "unsupported"):
        return None
    return {
        "bbq": "accuracy",
        "squad": "exact_match",
        "faithfulness": "comprehensiveness",
        "pass_at_k": "pass_at_1",
    }.get(metric, metric)
