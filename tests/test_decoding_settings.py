"""Evaluation with beams and averaged checkpoints."""

import torch

from jobs import evaluate as stage
from jobs.answers import EvaluatorTask, ModelAnswers, load_evaluator
from jobs.tasks.base import Generate, LogLikelihood
from tests.test_evaluate import RUN, trained  # noqa: F401 - a fixture


def test_outputs_come_from_beams_and_the_mean_of_checkpoints_where_asked(trained):  # noqa: F811
    wanted = {"beams": 3, "length_penalty": 1.0, "average_checkpoints": 2}
    config = trained.config.model_copy(update={"evaluate": trained.config.evaluate.model_copy(update=wanted)})
    storage, manifest = trained.storage, trained.manifest
    before = stage.plan(trained.config, storage, manifest, "same")
    assert {s.key for c in before for s in c.slices}.isdisjoint(
        s.key for c in stage.plan(config, storage, manifest, "same") for s in c.slices
    )
    model = load_evaluator(EvaluatorTask(config, storage.url, RUN, 6))._model
    for name, parameter in model._model.named_parameters():
        both = (dict(each.named_parameters())[name] for each in (trained.model, trained.earlier))
        torch.testing.assert_close(parameter, sum(both) / 2)
    sources = [f"summarize: def item_{i}():\n    return {i}" for i in range(8)]
    answers = [
        ModelAnswers(model._model, model._tokenizer, each).answer("summary", [Generate(s) for s in sources], 6)
        for each in (trained.config, config)
    ]
    greedy, found = ([answer["text"] for answer in each] for each in answers)
    assert found != greedy
    nll = [
        sum(sum(a["nll"]) for a in model.answer("summary", list(map(LogLikelihood, sources, each)), 6))
        for each in (greedy, found)
    ]
    assert nll[1] < nll[0], "beams find what is more likely than the greedy outputs"
