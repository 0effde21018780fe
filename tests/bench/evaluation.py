"""Telar's evaluator against lm-evaluation-harness: `python -m tests.bench.evaluation`; prints a table, writes a JSON.

A decoder of Llama's shape with random weights is exported and loaded by lm-eval, so both compute with the same numbers.
Both answer the same rows in turns, float32, one thread, in this process: (a) which of four candidates is likeliest, (b)
what is written greedily. A turn is from rows in memory to scores; reading rows, loading the model and importing are
start-up. Candidates end with <eos>, which Telar always scores. The peer's batches have as many rows as Telar's.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from cluster.storage import Storage
from configs.load import parse_config
from configs.schema import RunConfig
from data.tokenizer import Tokenizer
from jobs.answers import ROWS_AT_ONCE, ModelAnswers
from jobs.evaluator import Evaluator
from jobs.harness import begin_with_bos
from jobs.machine import hardware, versions
from jobs.ngrams import count
from jobs.slices import cut, read_rows
from jobs.tasks.base import TrainingFacts
from jobs.tasks.from_data import DataTask
from jobs.tasks.rows import read_rows_of
from model.export import SpecialTokens, export
from model.transformer import Transformer, build_model
from tests.bench.figures import ratio, spread
from tests.bench.generate import LLAMA
from tests.bench.report import show

POSITIONS, CHOICES = 256, 4
KINDS = ("choices", "generate")
WORDS = "red green blue white river stone cloud bread house light seven small large quiet open under over sing walk"
Rows = list[dict[str, Any]]


def make_rows(number: int, context_words: int, choice_words: int) -> Rows:
    """Contexts and candidates of random words; both lengths vary by half of what is given."""
    random, words = np.random.default_rng(7), WORDS.split()

    def text(length: int) -> str:
        return " ".join(random.choice(words, random.integers(max(1, length // 2), length + length // 2 + 1)))

    rows = []
    for i in range(number):
        choices = [f" {text(choice_words)}" for _ in range(CHOICES)]
        rows.append({"ask": f"row {i}: {text(context_words)}", "choices": choices, "right": int(random.integers(4))})
        rows[-1] |= {"ended": [f"{choice}<eos>" for choice in choices], "written": "nothing"}
    return rows


def settings(file: Path, d_model: int, layers: int, new_tokens: int) -> RunConfig:
    """The configuration with both tasks as data."""
    shared = {"kind": "jsonl", "path": str(file), "source": "{ask}", "limit": 1_000_000}
    tasks = [
        {**shared, "name": "choices", "request": "choices", "choices": "{choices}", "answer": "{right}"},
        {**shared, "name": "generate", "request": "generate", "target": "{written}", "max_new_tokens": new_tokens},
    ]
    tasks[0]["metric"], tasks[1]["metric"] = "accuracy", "exact_match"
    sizes = {"d_model": d_model, "heads": max(1, d_model // 64), "d_ff": 4 * d_model, "decoder_layers": layers}
    tree = {
        "model": {**sizes, **LLAMA},
        "data": {
            "corpora": [{"name": "none", "kind": "text", "path": "/nowhere", "target": "{text}"}],
            "layout": "sequence",
            "target_tokens": POSITIONS,
        },
        "train": {"steps": 1, "global_batch_sequences": 1, "micro_batch_sequences": 1},
        "evaluate": {"definitions": tasks},
    }
    return parse_config(tree, "tests.bench.evaluation")


def greedily(model: Transformer, tokenizer: Tokenizer, ask: str, new_tokens: int) -> str:
    """What the model writes, one whole forward for each token: an answer that neither side computed."""
    ids = [tokenizer.bos_id, *tokenizer.encode(ask)]
    first, nothing = len(ids), torch.zeros((1, 0), dtype=torch.int64)
    with torch.no_grad():
        while len(ids) - first < new_tokens and ids[-1] != tokenizer.eos_id:
            written = torch.tensor([ids])
            places = torch.arange(len(ids))[None]
            inputs = (nothing, nothing, nothing, written, places, torch.ones_like(written))
            ids.append(int(model.logits(inputs)[0, -1].argmax()))
    return tokenizer.decode(ids[first:])


class Telar:
    """The product's evaluator on the rows of one file."""

    def __init__(self, config: RunConfig, model: Transformer, tokenizer: Tokenizer) -> None:
        started = time.perf_counter()
        self._config, self._answers = config, ModelAnswers(model, tokenizer, config)
        self._facts = TrainingFacts(count([np.array([3, 4])], tokenizer.vocabulary_size, 1))
        self._cells = {}
        for definition in config.evaluate.definitions:
            task = DataTask(definition)
            rows = read_rows_of(definition, task.limit(config), 0)
            self._cells[definition.name] = (task, task.examples(rows, definition.name, config))
        self.start_seconds = time.perf_counter() - started

    def turn(self, kind: str, folder: Storage) -> tuple[float, list[Any]]:
        """Score, and log-likelihoods of all candidates or the text of each row; answers are kept as in a run."""
        task, examples = self._cells[kind]
        size, config = self._config.evaluate.slice_records, self._config
        slices = cut(kind, task.name, task.version, examples, size, task.max_new_tokens(config), {})
        evaluator = Evaluator(self._answers, folder)
        for piece in slices:
            evaluator.work(piece)
        rows = [row for piece in slices for row in read_rows(folder, piece) or []]
        wrong = next((row.error for row in rows if row.error), None)
        assert wrong is None, wrong
        score = task.score(examples, rows, self._facts, kind, config)[0].value
        order = np.argsort([row.index for row in rows])
        answers = [rows[i].answers[0] for i in order]
        return score, [[-x for x in a["nll"]] if kind == "choices" else a["text"] for a in answers]


class Harness:
    """lm-eval on the exported model, with task files of its own form and without index or cache."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, file: Path, batch: int, new_tokens: int) -> None:
        started = time.perf_counter()
        # Offline; set before the peer's libraries are imported.
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(file.parent / "hf")}
        from lm_eval import evaluator
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        logging.disable(logging.WARNING)
        self._evaluate, folder = evaluator.evaluate, file.parent / "model"
        exported(model, tokenizer, folder)
        self._model = HFLM(
            pretrained=str(folder),
            device="cpu",
            dtype="float32",
            batch_size=batch,
            add_bos_token=True,
            max_length=POSITIONS,
        )
        manager = TaskManager(include_defaults=False)
        self._tasks = {kind: manager.load([str(task_file(kind, file, new_tokens))]) for kind in KINDS}
        self.start_seconds = time.perf_counter() - started

    def turn(self, kind: str, _folder: Storage) -> tuple[float, list[Any]]:
        """As `Telar.turn`."""
        found = self._evaluate(self._model, self._tasks[kind], bootstrap_iters=0, log_samples=True)
        samples = sorted(found["samples"][kind], key=lambda sample: sample["doc_id"])
        responses = [sample["resps"] for sample in samples]
        key = "acc,none" if kind == "choices" else "exact_match,none"
        rows = [[float(x[0][0]) for x in r] if kind == "choices" else r[0][0] for r in responses]
        return found["results"][kind][key], rows


def task_file(kind: str, file: Path, new_tokens: int) -> Path:
    """The task in lm-eval's form, beside the rows."""
    how = {
        "choices": {"output_type": "multiple_choice", "doc_to_target": "right", "doc_to_choice": "ended"},
        "generate": {
            "output_type": "generate_until",
            "doc_to_target": "written",
            "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": new_tokens, "do_sample": False},
        },
    }[kind]
    metric = {"choices": "acc", "generate": "exact_match"}[kind]
    task = {
        "task": kind,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "ask",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True}],
        **how,
    }
    path = file.parent / f"{kind}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def exported(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """The model as transformers reads it, its tokenizer with bos before every text."""
    folder.mkdir()
    tokens = SpecialTokens(tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found = export(model.section, parameters, tokenizer.vocabulary_size, tokens, POSITIONS)
    save_file(found.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    named |= {f"{kind}_token": f"<{kind}>" for kind in ("pad", "bos", "eos")}
    for name, content in (
        ("config", found.config),
        ("generation_config", found.generation),
        ("tokenizer_config", named),
    ):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "tokenizer.json").write_bytes(tokenizer.to_bytes())
    begin_with_bos(folder)


def differences(kind: str, ours: tuple[float, list[Any]], theirs: tuple[float, list[Any]]) -> dict[str, float]:
    """How far the scores are apart, and single rows: nats at most, or the share of rows with another text."""
    score = abs(ours[0] - theirs[0])
    if kind == "generate":
        other = [a.strip() != b.strip() for a, b in zip(ours[1], theirs[1], strict=True)]
        return {"score": score, "rows": sum(other) / len(other)}
    return {"score": score, "rows": float(np.abs(np.array(ours[1]) - np.array(theirs[1])).max())}


def measure(contest: dict[str, Callable[[Storage], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, by repeat, in turns; who ended a repeat begins the next. The first turn of each does not count.

    Each turn has an empty folder for its answers.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contest}
    order = list(contest)
    for repeat in range(repeats + 1):
        for name in order:
            with tempfile.TemporaryDirectory() as place:
                started = time.perf_counter()
                contest[name](Storage(place))
                if repeat:
                    seconds[name].append(time.perf_counter() - started)
        order.reverse()
    return seconds


def prepared(
    folder: Path, number: int, d_model: int, layers: int, words: tuple[int, int], new_tokens: int
) -> tuple[RunConfig, Transformer, Tokenizer, Path]:
    """Rows in a file, a tokenizer of their words and a model; each eighth row expects what the model does write."""
    rows, file = make_rows(number, *words), folder / "rows.jsonl"
    tokenizer = Tokenizer.train([row["ask"] for row in rows], 400)
    config = settings(file, d_model, layers, new_tokens)
    model = build_model(config.model, tokenizer.vocabulary_size, 0).eval()
    for row in rows[::8]:
        row["written"] = greedily(model, tokenizer, row["ask"], new_tokens)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config, model, tokenizer, file


def main() -> int:
    """Measure, check, print, write; exit code 1 where scores or rows differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.evaluation", description=__doc__)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context-words", type=int, default=60)
    parser.add_argument("--choice-words", type=int, default=6)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=ROWS_AT_ONCE, help="rows of the peer's batches")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench-evaluation.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    with tempfile.TemporaryDirectory() as place:
        words = options.context_words, options.choice_words
        made = prepared(Path(place), options.rows, options.d_model, options.layers, words, options.new_tokens)
        config, model, tokenizer, file = made
        telar = Telar(config, model, tokenizer)
        harness = Harness(model, tokenizer, file, options.batch, options.new_tokens)
        print(f"start-up: telar {telar.start_seconds:.2f} s (imported before), lm-eval {harness.start_seconds:.2f} s")
        print("| task | requests | telar, s per 1,000 | lm-eval, s per 1,000 | lm-eval / telar | score | differences |")
        print("|---|---|---|---|---|---|---|")
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as answers:
                ours = telar.turn(kind, Storage(answers))
                apart = differences(kind, ours, harness.turn(kind, Storage(answers)))
            sides = {"telar": telar, "lm-eval": harness}
            seconds = measure({n: lambda f, s=s, k=kind: s.turn(k, f) for n, s in sides.items()}, options.repeats)
            requests = options.rows * (CHOICES if kind == "choices" else 1)
            found = ratio(seconds["lm-eval"], seconds["telar"])
            runs.append(
                {"task": kind, "requests": requests, "seconds": seconds, "score": ours[0], "differences": apart}
            )
            shown = [show(seconds[name], scale=1000 / requests, digits=2) for name in sides]
            quotient = f"{found.middle:.2f} ({found.low:.2f} to {found.high:.2f})"
            unlike = f"score {apart['score']:.1e}, rows {apart['rows']:.1e}"
            cells = [kind, requests, *shown, quotient, f"{ours[0]:.4f}", unlike]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    content = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "settings": {**vars(options), "out": str(options.out), "threads": torch.get_num_threads()},
        "start_seconds": {"telar": telar.start_seconds, "lm-eval": harness.start_seconds},
        "runs": runs,
        "medians": [{"task": r["task"], **{n: spread(s).middle for n, s in r["seconds"].items()}} for r in runs],
        "load": os.getloadavg(),
        "hardware": hardware(),
        "versions": versions(),
    }
    options.out.write_text(json.dumps(content, indent=1))
    return int(any(max(run["differences"].values()) > 1e-4 for run in runs))


if __name__ == "__main__":
    sys.exit(main())
