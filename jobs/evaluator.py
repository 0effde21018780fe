"""Answering slices: requests of all examples in one batch, and one by one when a batch fails, to find the culprit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from cluster.storage import Storage
from configs.errors import TelarError
from jobs.energy import Meter
from jobs.slices import Slice, write_rows
from jobs.tasks.base import Example, Request, Row

RECORD_ERRORS = (TelarError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError, MemoryError)


class Answerer(Protocol):
    """A loaded model that answers requests."""

    def answer(self, corpus: str, requests: Sequence[Request], max_new_tokens: int) -> list[dict[str, Any]]:
        """One answer per request, in order; `corpus` decides how texts are shortened."""


class Evaluator:
    """A model and the run's folder; `work` answers a slice and leaves its Parquet."""

    def __init__(self, model: Answerer, folder: Storage) -> None:
        self._model, self._folder = model, folder

    def work(self, piece: Slice) -> None:
        """Answer one slice. Batches are formed from the slice alone, so answers do not depend on who works."""
        meter = Meter()
        rows = self.rows(piece)
        write_rows(self._folder, piece, rows, meter.stop())

    def rows(self, piece: Slice) -> list[Row]:
        """Rows of a slice in its order; an example that cannot be answered becomes a row with its error."""
        try:
            return self._together(piece, piece.examples)
        except RECORD_ERRORS:
            return [self._alone(piece, example) for example in piece.examples]

    def _together(self, piece: Slice, examples: Sequence[Example]) -> list[Row]:
        requests = [request for example in examples for request in example.requests]
        answers = iter(self._model.answer(piece.corpus, requests, piece.max_new_tokens))
        return [Row(example.record.index, tuple(next(answers) for _ in example.requests)) for example in examples]

    def _alone(self, piece: Slice, example: Example) -> Row:
        try:
            return self._together(piece, [example])[0]
        except RECORD_ERRORS as error:
            return Row(example.record.index, (), f"{type(error).__name__}: {error}"[:2000])
