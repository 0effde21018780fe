"""Tasks by name, and which of them judge a corpus."""

from __future__ import annotations

from configs.schema import CorpusSection
from jobs.tasks.base import Task
from jobs.tasks.completion import Completion
from jobs.tasks.likelihood import Likelihood
from jobs.tasks.question import QuestionAnswering
from jobs.tasks.sentiment import Sentiment
from jobs.tasks.summary import Summary
from jobs.tasks.text_generation import TextGeneration
from jobs.tasks.text_to_image import TextToImage
from jobs.tasks.translation import Translation

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Likelihood(),
        Summary(),
        Completion(),
        Translation(),
        Sentiment(),
        QuestionAnswering(),
        TextGeneration(),
        TextToImage(),
    )
}


def tasks_of(corpus: CorpusSection, writes: bool = True) -> list[Task]:
    """Likelihood for every corpus of a model that writes, then the corpus's own task."""
    return [TASKS[name] for name in dict.fromkeys(["likelihood", corpus.task] if writes else [corpus.task])]
