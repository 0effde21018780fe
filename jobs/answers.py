"""A checkpoint loaded for evaluation: it answers generation and likelihood requests, batched in their order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cluster.storage import Storage
from configs.errors import DataError
from configs.schema import CorpusSection, RunConfig
from data.batches import Collator
from data.manifest import Manifest
from data.packing import Pair, cut_pairs, cut_sequence, fit_prompt, fit_source
from data.ring import Arrays
from data.templates import literal_start
from data.tokenizer import Tokenizer
from jobs.attributions import faithfulness, integrated_gradients
from jobs.batches import to_model
from jobs.classes import Classes
from jobs.codebook import load_codebook
from jobs.drawing import draw_pictures
from jobs.evaluator import Evaluator
from jobs.loading import load_trained
from jobs.looking import looked
from jobs.references import references
from jobs.tasks.base import Attempts, Choices, Draw, Explain, Generate, LogLikelihood, Request
from jobs.tasks.choosing import probabilities
from model.batch import ModelBatch
from model.beam import beam_search
from model.candidates import candidate_scores
from model.generation import Sampling, generate, greedy
from model.images import ImageTokenizer
from model.transformer import Transformer, token_scores

ROWS_AT_ONCE = 16
# Sources that are read together by candidates, and from how many tokens on a source is read once for all of them.
SOURCES_AT_ONCE = 8
SHARED_TOKENS = 8
# A held-out target is scored in pieces, cut as in training; what lies beyond the first pieces is not scored.
MOST_PIECES = 8


@dataclass(frozen=True)
class EvaluatorTask:
    """What an evaluator is told: which checkpoint of which run."""

    config: RunConfig
    storage_url: str
    run: str
    step: int


def load_evaluator(task: EvaluatorTask) -> Evaluator:
    """Read the verified checkpoint and the tokenizer; raises CheckpointError or DataError."""
    torch.set_num_threads(1)
    storage = Storage(task.storage_url)
    found = load_trained(storage, task.run, task.config, task.step, task.config.evaluate.average_checkpoints)
    codebook = codebook_of(task.config, storage, task.run, found.manifest)
    return Evaluator(ModelAnswers(found.model, found.tokenizer, task.config, codebook), storage.child(task.run))


def codebook_of(config: RunConfig, storage: Storage, run: str, manifest: Manifest) -> ImageTokenizer | None:
    """The codebook of a run that is judged by the pictures it draws, else None."""
    if all(corpus.task != "text_to_image" for corpus in config.data.corpora):
        return None
    return load_codebook(storage, references(storage.child(run))["codebook"], manifest.codebook_digest)


class ModelAnswers:
    """A model and its tokenizer; texts are encoded, cut and shortened the way training does it."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, config: RunConfig, codebook: ImageTokenizer | None = None
    ) -> None:
        self._codebook = codebook
        self._model, self._tokenizer, self._data = model, tokenizer, config.data
        self._evaluate = config.evaluate
        tasks = [task.corpus() for task in config.evaluate.definitions]
        self._corpora = {corpus.name: corpus for corpus in [*config.data.corpora, *tasks]}
        self._sequence = config.data.layout == "sequence"
        # A classifier scores a candidate by its class.
        self._classes = Classes(config.model.labels, tokenizer) if config.model.labels else None

    def answer(self, corpus: str, requests: Sequence[Request], max_new_tokens: int) -> list[dict[str, Any]]:
        """One answer per request in order, of the forms that `jobs.tasks.base` gives."""
        section = self._corpora[corpus]
        keep_head, pictures = keeps_head(section), section.image_column is not None
        prefix = self._tokenizer.prefix_of(literal_start(section))
        answers: dict[int, dict[str, Any]] = {}
        if self._classes is not None and any(isinstance(each, Generate | LogLikelihood) for each in requests):
            raise DataError("model.architecture: an encoder chooses among model.labels, it does not write text")
        writing = [i for i, request in enumerate(requests) if isinstance(request, Generate)]
        scoring = [i for i, request in enumerate(requests) if isinstance(request, LogLikelihood)]
        choosing = [i for i, request in enumerate(requests) if isinstance(request, Choices)]
        scored = [requests[i] for i in scoring]
        # Every candidate is one more pair of the same batch.
        candidates = [LogLikelihood(requests[i].source, target) for i in choosing for target in requests[i].targets]
        sources = [requests[i].source for i in writing]
        answers.update(zip(writing, self._generate(sources, prefix, keep_head, max_new_tokens, pictures), strict=True))
        found = iter(self._score([*scored, *candidates], prefix, keep_head, pictures))
        answers.update((i, next(found)) for i in scoring)
        answers.update((i, _of_candidates([next(found) for _ in requests[i].targets])) for i in choosing)
        drawing = [i for i, request in enumerate(requests) if isinstance(request, Draw)]
        captions = [requests[i].source for i in drawing]
        answers.update(zip(drawing, self._draw(captions, prefix, keep_head) if drawing else [], strict=True))
        trying = [i for i, request in enumerate(requests) if isinstance(request, Attempts)]
        answers.update((i, self._attempt(requests[i], prefix, keep_head, max_new_tokens)) for i in trying)
        explaining = [i for i, request in enumerate(requests) if isinstance(request, Explain)]
        answers.update((i, self._explain(requests[i], prefix, keep_head)) for i in explaining)
        return [answers[i] for i in range(len(requests))]

    def _attempt(self, request: Attempts, prefix: str | None, keep_head: bool, max_new_tokens: int) -> dict[str, Any]:
        """Several outputs of one source in one batch, so that what is drawn depends on the request alone."""
        source = self._prompts([request.source], prefix, keep_head, max_new_tokens)[0]
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        choose = Sampling(request.temperature, seed=request.seed)
        outputs = generate(self._model, [source] * request.number, bos, [eos], max_new_tokens, choose)
        return {"texts": [self._tokenizer.decode(each) for each in outputs], "tokens": sum(map(len, outputs))}

    def _draw(self, sources: Sequence[str], prefix: str | None, keep_head: bool) -> list[dict[str, Any]]:
        assert self._codebook is not None, "a run with the task text_to_image has a codebook"
        prompts = self._prompts(sources, prefix, keep_head, self._codebook.shape.tokens + 1)
        return draw_pictures(self._model, self._tokenizer, self._codebook, prompts)

    def _prompts(
        self, sources: Sequence[str], prefix: str | None, keep_head: bool, max_new_tokens: int
    ) -> list[list[int]]:
        """Ids of sources, shortened as in training."""
        data = self._data
        encoded = [
            fit_prompt(ids, max_new_tokens, data.target_tokens, keep_head)
            if self._sequence
            else fit_source(ids, data.source_tokens, keep_head)
            for ids in self._encode_sources(sources, prefix)
        ]
        return [ids.tolist() for ids in encoded]

    def _generate(
        self, sources: Sequence[str], prefix: str | None, keep_head: bool, max_new_tokens: int, pictures: bool
    ) -> list[dict[str, Any]]:
        tokenizer = self._tokenizer
        outputs = self._outputs(self._prompts(sources, prefix, keep_head, max_new_tokens), max_new_tokens)
        return [
            {
                "text": self._text(output, pictures),
                "tokens": len(output),
                "ended": bool(output) and output[-1] == tokenizer.eos_id,
            }
            for output in outputs
        ]

    def _outputs(self, sources: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        bos, eos = self._tokenizer.bos_id, self._tokenizer.eos_id
        beams, alpha = self._evaluate.beams, self._evaluate.length_penalty
        if beams == 1:
            return greedy(self._model, sources, bos, eos, max_new_tokens)
        found = beam_search(self._model, sources, bos, eos, max_new_tokens, beams, alpha)
        return [hypotheses[0].tokens if hypotheses else [] for hypotheses in found]

    def _text(self, ids: Sequence[int], pictures: bool) -> str:
        """The text of ids, or a picture's codes as text."""
        return " ".join(map(str, self._tokenizer.decode_codes(ids))) if pictures else self._tokenizer.decode(ids)

    def _score(
        self, requests: Sequence[LogLikelihood], prefix: str | None, keep_head: bool, pictures: bool
    ) -> list[dict[str, Any]]:
        sources = self._encode_sources([request.source for request in requests], prefix)
        written = [request.target for request in requests]
        targets = self._tokenizer.encode_codes(written) if pictures else self._encode(written)
        data, eos = self._data, self._tokenizer.eos_id
        cut = [
            (
                cut_sequence(source, target, eos, data.target_tokens, keep_head)
                if self._sequence
                else cut_pairs(source, target, eos, data.source_tokens, data.target_tokens, keep_head)
            )[:MOST_PIECES]
            for source, target in zip(sources, targets, strict=True)
        ]
        scored = iter(self._score_pairs([pair for pairs in cut for pair in pairs]))
        answers = []
        for pairs in cut:
            labels = np.concatenate([label for _, label in pairs])
            found = [next(scored) for _ in pairs]
            text = self._tokenizer.decode(labels)
            if self._classes is not None:
                labels = np.array([self._classes.of(labels.tolist())])
            answers.append(
                {
                    "labels": labels.tolist(),
                    "pieces": [len(nll) for nll, _ in found],
                    "nll": np.concatenate([nll for nll, _ in found]).tolist(),
                    "correct": (np.concatenate([best for _, best in found]) == labels).tolist(),
                    # Codes of a picture are no text, so there are no bits per byte of it.
                    "bytes": 0 if pictures else len(text.encode()),
                }
            )
        return answers

    def _explain(self, request: Explain, prefix: str | None, keep_head: bool) -> dict[str, Any]:
        """Integrated gradients of the likeliest candidate, alone in its batch; targets are cut to one piece."""
        (source,), targets = self._encode_sources([request.source], prefix), self._encode(request.targets)
        eos, data = self._tokenizer.eos_id, self._data
        labels = [np.append(target, eos).astype(np.int32)[: data.target_tokens // 2] for target in targets]
        longest = max(map(len, labels))
        if self._sequence:
            source = fit_prompt(source, longest, data.target_tokens, keep_head)
        else:
            source = fit_source(source, data.source_tokens, keep_head)
        nothing = self._nothing()

        def candidates(of: np.ndarray) -> list[Pair]:
            return [(of if len(of) else nothing, each) for each in labels]

        def shares(sources: Sequence[np.ndarray]) -> np.ndarray:
            """Probability of each candidate among all, `[sources, candidates]`."""
            scored = self._score_pairs([pair for of in sources for pair in candidates(of)])
            nats = np.array([nll.sum() for nll, _ in scored]).reshape(-1, len(labels))
            return np.array([probabilities(-row) for row in nats])

        chosen = int(np.argmax(shares([source])[0]))
        # In layout sequence bos stands before the source.
        start = 1 if self._sequence else 0
        batch = self._batch(candidates(source))
        place = slice(start, start + len(source))
        attribution, gap = integrated_gradients(self._model, batch, place, self._tokenizer.pad_id, chosen)
        only = self._batch([(source if len(source) else nothing, labels[chosen])])
        # Of a decoder's target side the source is a part.
        written = only.inputs[3][0].tolist()
        return {
            "written": [] if self._classes is not None else [self._tokenizer.decode([token]) for token in written],
            **looked(self._model, only.inputs, place, only.loss_weight[0] > 0),
            "chosen": chosen,
            "pieces": [self._tokenizer.decode([token]) for token in source],
            "attribution": attribution.tolist(),
            "gap": gap,
            **faithfulness(source, attribution, lambda sources: shares(sources)[:, chosen]),
        }

    def _score_pairs(self, pairs: Sequence[Pair]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Nats and most probable token at each label of each pair; rows of like length together.

        Pairs of one long source share what is computed of it; each other pair is a row by itself.
        """
        groups: dict[bytes, list[int]] = {}
        for i, (source, _) in enumerate(pairs):
            groups.setdefault(source.tobytes(), []).append(i)
        shared, others = [], []
        for group in groups.values():
            long = len(group) > 1 and len(pairs[group[0]][0]) >= SHARED_TOKENS
            (shared if long and self._classes is None else others).append(group)
        results = self._score_shared(pairs, shared)
        # A row of layout sequence is as long as both together.
        order = sorted(
            (i for group in others for i in group),
            key=lambda i: (len(pairs[i][1]) + len(pairs[i][0]) * self._sequence, len(pairs[i][0]), i),
        )
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            nll, best = token_scores(self._model, self._batch([pairs[i] for i in rows]))
            for row, i in enumerate(rows):
                # In layout sequence a row holds the source before the labels.
                first = len(pairs[i][0]) if self._sequence else 0
                kept = slice(first, first + len(pairs[i][1]))
                results[i] = (nll[row, kept].double().numpy(), best[row, kept].numpy())
        return [results[i] for i in range(len(pairs))]

    def _score_shared(
        self, pairs: Sequence[Pair], groups: Sequence[list[int]]
    ) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Scores by number of pair; pairs of a group have the same source."""
        results: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        order = sorted(groups, key=lambda group: (len(pairs[group[0]][0]), group[0]))
        for start in range(0, len(order), SOURCES_AT_ONCE):
            part = order[start : start + SOURCES_AT_ONCE]
            sources = [pairs[group[0]][0].tolist() for group in part]
            labels = [[pairs[i][1].tolist() for i in group] for group in part]
            scored = candidate_scores(self._model, sources, labels, self._tokenizer.bos_id)
            for group, found in zip(part, scored, strict=True):
                for i, (nll, best) in zip(group, found, strict=True):
                    results[i] = (nll.double().numpy(), best.numpy())
        return results

    def _batch(self, pairs: Sequence[Pair]) -> ModelBatch:
        tokenizer, data = self._tokenizer, self._data
        collator = Collator(
            self._sequence, len(pairs), data.source_tokens, data.target_tokens, tokenizer.pad_id, tokenizer.bos_id
        )
        rows = [(source, np.array([len(source)]), labels, np.array([len(labels)])) for source, labels in pairs]
        batch = to_model(collator.fill(rows, 0, Arrays.empty(*collator.sizes)))
        return (batch if self._classes is None else self._classes.batch(batch)).trimmed()

    def _encode_sources(self, texts: Sequence[str], prefix: str | None) -> list[np.ndarray]:
        """Sources as ids; an encoder, which must have something to attend to, reads an empty one as one eos."""
        return [ids if len(ids) else self._nothing() for ids in self._encode(texts, prefix)]

    def _nothing(self) -> np.ndarray:
        return np.array([] if self._sequence else [self._tokenizer.eos_id], dtype=np.int32)

    def _encode(self, texts: Sequence[str], prefix: str | None = None) -> list[np.ndarray]:
        """Token ids; texts that begin with the corpus's prefix have it as one token, as in training."""
        ids: list[np.ndarray] = []
        for text in texts:
            ids += self._tokenizer.encode_batch([text], prefix if prefix and text.startswith(prefix) else None)
        return ids


def _of_candidates(scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One answer of `Choices` from those of its candidates."""
    return {
        "nll": [math.fsum(each["nll"]) for each in scored],
        "tokens": [len(each["labels"]) for each in scored],
        "bytes": [each["bytes"] for each in scored],
    }


def keeps_head(corpus: CorpusSection) -> bool:
    """Whether a source that is too long keeps its head, which holds the task's prefix (as `data.prepare` decides)."""
    return not corpus.continuation or bool(corpus.source)
