"""Tasks of lm-evaluation-harness on a checkpoint: exported, answered by one Ray task each, kept as JSON.

The harness is an optional extra; what it starts with and what is kept is in `jobs.harness_tasks`.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch

from cluster.storage import Storage
from configs.errors import ConfigError, RunStopped
from configs.schema import RunConfig
from jobs.commands.exporting import export_run
from jobs.commands.runs import RunPlace
from jobs.harness_results import cells_of, missing_cell
from jobs.harness_tasks import check_installed, folder_digest, key_of, task_file
from jobs.tasks.definitions import is_file
from model.export import SpecialTokens, export
from model.transformer import build_model

ROWS_AT_ONCE = 16
SEED = 1234
BOOTSTRAP_ROUNDS = 1000
POLL_SECONDS = 0.5

Answer = Callable[..., None]
Runner = Callable[[Answer, Sequence[tuple], Callable[[], bool]], dict[int, str]]


def check_harness(config: RunConfig, where: str | None) -> None:
    """Raise ConfigError when `evaluate.lm_eval` names tasks that this run's model cannot be judged by.

    With `where` (a machine, for the message) the extra must be installed here and every task be found here.
    """
    if not config.evaluate.lm_eval:
        return
    check_exportable(config)
    if where is not None:
        check_installed(where)
        for entry in config.evaluate.lm_eval:
            task_file(entry)


def check_exportable(config: RunConfig) -> None:
    """Raise ConfigError, naming the field, when no class of transformers computes what this model computes."""
    if any(corpus.task == "text_to_image" for corpus in config.data.corpora):
        raise ConfigError("evaluate.lm_eval: lm-eval has no tasks for a model of pictures; leave --lm-eval out")
    # Shapes are enough; no weights are made.
    with torch.device("meta"):
        model = build_model(config.model, config.data.tokenizer.vocabulary_size, config.run.seed)
    parameters = dict(model.named_parameters())
    positions = max(config.data.source_tokens, config.data.target_tokens) + 1
    try:
        export(config.model, parameters, config.data.tokenizer.vocabulary_size, SpecialTokens(0, 1, 2), positions)
    except ConfigError as error:
        raise ConfigError(f"evaluate.lm_eval: lm-eval reads the exported model, but {error}") from error


def harness_results(
    config: RunConfig,
    storage: Storage,
    run: str,
    step: int,
    checkpoint_digest: str,
    should_stop: Callable[[], bool],
    runner: Runner | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells of all tasks of `evaluate.lm_eval`, and what each was answered with; both empty when none are named.

    Tasks that this checkpoint answered already are read. One that the harness fails on is a cell with status missing.
    Raises ConfigError as `check_harness`, and RunStopped when `should_stop` says so.
    """
    entries = config.evaluate.lm_eval
    if not entries:
        return [], []
    check_harness(config, "the node of the run's controller")
    folder, paths = storage.child(run), [key_of(entry, checkpoint_digest) for entry in entries]
    todo = [number for number, path in enumerate(paths) if not folder.exists(path)]
    arguments = [(storage.url, run, config, step, entries[number], paths[number]) for number in todo]
    problems = (runner or on_ray)(answer, arguments, should_stop)
    problems = {todo[number]: problem for number, problem in problems.items()}
    cells, facts = [], []
    for number, (entry, path) in enumerate(zip(entries, paths, strict=True)):
        if number in problems:
            cells.append(missing_cell(entry, problems[number]))
            continue
        kept = json.loads(folder.read_text(path))
        cells += kept["cells"]
        facts.append({**kept["facts"], "entry": entry, "rows": path, "reused": number not in todo})
    return cells, facts


def answer(storage_url: str, run: str, config: RunConfig, step: int, entry: str, path: str) -> None:
    """Export the checkpoint, let the harness answer one task on the CPU, and leave cells and rows at `path`."""
    check_installed("a node of the cluster")
    started = time.monotonic()
    # Seconds to import, and only here.
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    storage, version = Storage(storage_url), importlib.metadata.version("lm_eval")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="telar-lm-eval-") as place:
        folder = Path(place) / "model"
        exported = export_run(RunPlace(storage, run), str(folder), step, config.evaluate.average_checkpoints)
        alone = config.model.architecture == "decoder"
        if alone:
            begin_with_bos(folder)
        model = HFLM(
            pretrained=str(folder),
            device="cpu",
            dtype="float32",
            batch_size=ROWS_AT_ONCE,
            add_bos_token=True if alone else None,
            max_length=config.data.target_tokens,
        )
        file = task_file(entry)
        manager = TaskManager(include_defaults=False, include_path=None if is_file(entry) else str(file.parent))
        ready = time.monotonic()
        found = simple_evaluate(
            model,
            tasks=[entry],
            task_manager=manager,
            use_cache=None,
            cache_requests=False,
            log_samples=True,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
    facts = {
        "lm_eval": version,
        "file": str(file),
        "files_digest": folder_digest(file),
        "exported_as": exported["class"],
        "steps": exported["steps"],
        "batch": ROWS_AT_ONCE,
        "dtype": "float32",
        "seconds_to_start": round(ready - started, 3),
        "seconds": round(time.monotonic() - ready, 3),
    }
    content = {"facts": facts, "cells": cells_of(found, version), "samples": found["samples"]}
    storage.child(run).write_text(path, json.dumps(content, default=str, ensure_ascii=False))


def begin_with_bos(folder: Path) -> None:
    """Let the exported tokenizer put bos before every text, as our decoders read it."""
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing

    file = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    tokenizer.save(file)


def on_ray(work: Answer, arguments: Sequence[tuple], should_stop: Callable[[], bool]) -> dict[int, str]:
    """Run `work` as Ray tasks of one CPU each, again where a worker or node is lost; returns problems by number.

    Raises RunStopped when `should_stop` says so.
    """
    # Else Ray would look for some cluster of this machine, which may be another user's.
    assert ray.is_initialized(), "the caller is connected to the run's own cluster"
    environment = {"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}
    remote = ray.remote(num_cpus=1, max_retries=2, runtime_env=environment)(work)
    running = {remote.remote(*each): number for number, each in enumerate(arguments)}
    problems: dict[int, str] = {}
    try:
        while running:
            if should_stop():
                raise RunStopped("stopped on request during evaluation by lm-eval; finished tasks are kept")
            done, _ = ray.wait(list(running), num_returns=1, timeout=POLL_SECONDS)
            for reference in done:
                number = running.pop(reference)
                try:
                    ray.get(reference)
                except ray.exceptions.RayError as error:
                    problems[number] = str(error).strip().splitlines()[-1]
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    return problems
