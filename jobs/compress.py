"""Compressing a run: its checkpoint, quantized or pruned, becomes a run of its own beside it, with measured figures.

The new run has config.yaml, manifest.json, status.json, one committed checkpoint and compression.json, and is written
whole or not at all. A structurally pruned checkpoint keeps the optimizer's moments of what remains when it is to
recover, so training goes on from it as after any other checkpoint; a recovery that is cut off leaves a run that can be
resumed, without figures. Training before quantizing is a run too, NAME-float: it holds the weights before rounding.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import closing, redirect_stdout
from dataclasses import replace
from typing import Any

from torch import Tensor

from cluster.commit import Committed
from cluster.storage import Storage
from configs.errors import ConfigError, TelarError
from configs.schema import ModelSection, RunConfig
from configs.section import NAME_PATTERN
from data.loader import Loader
from data.shard_server import plain_opener
from jobs.batches import to_model
from jobs.compressed_run import RECORD, compressed_config, write_compressed
from jobs.compression import Compression
from jobs.compression_figures import Subject, figures, measured_how
from jobs.loading import Trained, choose_checkpoints, load_trained
from jobs.machine import hardware, versions
from model.batch import ModelBatch
from model.checkpoint import CheckpointReader, load_state
from model.fragments import WEIGHT, Fragment
from model.prune import choose, cut, importance, pruned_section
from model.quantize import model_fragments, quantize
from model.rounding import ROUNDED_AS
from model.sparsify import PATTERN_OF, sparsify
from model.transformer import Transformer, build_model

CALIBRATION_BATCHES = 16


class CompressionError(TelarError):
    """Training of what is compressed failed."""


def compress(
    storage: Storage,
    run: str,
    config: RunConfig,
    compression: Compression,
    step: int | None = None,
    name: str | None = None,
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Compress the checkpoint of `step` (default: the latest) of `run` into the run `name`; content of its RECORD.

    `name` is by default the run's with the compression's label. Raises ConfigError for what cannot be done, before
    anything is written, CheckpointError for a damaged checkpoint, CompressionError when the training after it fails.
    """
    compression.check()
    committed = choose_checkpoints(storage, run, step)[-1]
    name = name or f"{run}-{compression.label}"
    _check_place(storage, name)
    _check_source(storage, run, config, compression)
    before = load_trained(storage, run, config, committed.step)
    report(f"{storage.url}/{run}: step {committed.step}, {compression.label}")
    if compression.quantize is not None and compression.recover_steps:
        return _trained_then_quantized(storage, run, name, before, committed, compression, report)
    section, pieces = _compressed(storage, run, before, committed, compression)
    made = compressed_config(config, name, section, committed.step + compression.recover_steps)
    write_compressed(storage, run, name, made, committed, pieces, compression)
    try:
        return _measured(storage, name, before, made, committed, compression, report)
    except BaseException:
        # Without its figures it would look like a finished run; one that was to recover goes on from where it is.
        if not compression.recover_steps:
            storage.remove(name)
        raise


def _trained_then_quantized(
    storage: Storage,
    run: str,
    name: str,
    before: Trained,
    committed: Committed,
    compression: Compression,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Go on from `committed` on rounded weights, as a run of its own, and quantize what comes of it."""
    config, own = before.config, f"{name}-float"
    _check_place(storage, own)
    steps = committed.step + compression.recover_steps
    training = compressed_config(config, own, config.model, steps, ROUNDED_AS[compression.quantize])
    with CheckpointReader(storage.child(run, "checkpoints"), committed) as reader:
        states = sorted(set().union(*reader.states().values()))
        pieces = [piece for state in states for piece in _pieces(state, load_state(reader, state))]
    write_compressed(storage, run, own, training, committed, pieces, None)
    _recover(storage, own, training, report)
    last = choose_checkpoints(storage, own)[-1]
    made = compressed_config(config, name, config.model, last.step)
    packed = _packed(load_trained(storage, own, training), compression)
    write_compressed(storage, own, name, made, last, model_fragments(packed), compression)
    subjects = [
        Subject("before", before),
        Subject(compression.kind, replace(before, model=_packed(before, compression))),
        Subject(f"{compression.kind}, {compression.recover_steps} steps before", load_trained(storage, name, made)),
    ]
    return _recorded(storage, name, subjects)


def _measured(
    storage: Storage,
    name: str,
    before: Trained,
    made: RunConfig,
    committed: Committed,
    compression: Compression,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Train the new run to its last step and add its figures to its RECORD; returns the content."""
    subjects = [
        Subject("before", before),
        Subject(compression.label, load_trained(storage, name, made, committed.step)),
    ]
    if compression.recover_steps:
        _recover(storage, name, made, report)
        subjects.append(
            Subject(f"{compression.label}, {compression.recover_steps} more steps", load_trained(storage, name, made))
        )
    return _recorded(storage, name, subjects)


def _recorded(storage: Storage, name: str, subjects: list[Subject]) -> dict[str, Any]:
    """Measure the subjects in turn and add their figures to the RECORD of the run `name`; returns the content."""
    record = {
        "run": name,
        **json.loads(storage.read_text(f"{name}/{RECORD}")),
        "rows": figures(storage, name, subjects),
        "measured": measured_how(),
        "versions": versions(),
        "hardware": hardware(),
        "finished_unix": time.time(),
    }
    storage.write_text(f"{name}/{RECORD}", json.dumps(record, indent=1))
    return record


def _check_place(storage: Storage, name: str) -> None:
    if not NAME_PATTERN.fullmatch(name) or name == "data":
        raise ConfigError(f"--name: {name!r} cannot name a run; use letters, digits, '.', '_' and '-', not 'data'")
    if storage.names(name):
        raise ConfigError(f"--name: {name!r} exists in {storage.url}; choose another name")


def _check_source(storage: Storage, run: str, config: RunConfig, compression: Compression) -> None:
    if config.model.architecture == "encoder":
        raise ConfigError(f"{storage.url}/{run}: an encoder classifies; only models that write text are compressed")
    if compression.pattern and (config.model.d_model % PATTERN_OF or config.model.d_ff % PATTERN_OF):
        raise ConfigError("--pattern: 2:4 needs model.d_model and model.d_ff that are multiples of 4")
    try:
        done = json.loads(storage.read_text(f"{run}/{RECORD}"))["compression"]
    except FileNotFoundError:
        return
    if done["quantize"] is not None or compression.prune is not None:
        raise ConfigError(
            f"RUN: {storage.url}/{run} is compressed already ({done['label']}); compress the run it was made of. Only "
            "quantizing a pruned run is possible"
        )


def _compressed(
    storage: Storage, run: str, before: Trained, committed: Committed, compression: Compression
) -> tuple[ModelSection, list[Fragment]]:
    """The model section and the fragments of the compressed model; `before` stays as it is."""
    config = before.config
    if compression.prune is not None and compression.method == "structured":
        kept = choose(
            before.model, importance(before.model, _calibration(storage, before, committed)), compression.prune
        )
        section = pruned_section(config.model, kept)
        if (section.heads, section.d_ff) == (config.model.heads, config.model.d_ff):
            raise ConfigError(
                f"--prune: {compression.prune:g} of {config.model.heads} heads and of {config.model.d_ff} feed-forward "
                "units rounds to none; give a larger share"
            )
        pieces = []
        with CheckpointReader(storage.child(run, "checkpoints"), committed) as reader:
            states = sorted(set().union(*reader.states().values())) if compression.recover_steps else [WEIGHT]
            for state in states:
                pieces += _pieces(state, cut(load_state(reader, state), config.model, kept))
        return section, pieces
    if compression.quantize is not None:
        return config.model, model_fragments(_packed(before, compression))
    batches = _calibration(storage, before, committed) if compression.method == "wanda" else ()
    model = _copy(before)
    sparsify(model, compression.method, compression.prune, compression.pattern is not None, batches)
    return config.model, model_fragments(model)


def _copy(trained: Trained) -> Transformer:
    config = trained.config
    model = build_model(config.model, trained.manifest.vocabulary_size, config.run.seed).eval()
    model.load(dict(trained.model.named_parameters()))
    return model


def _packed(trained: Trained, compression: Compression) -> Transformer:
    """A quantized copy of the model."""
    model = _copy(trained)
    quantize(model, compression.quantize, compression.group)
    return model


def _pieces(state: str, tensors: dict[str, Tensor]) -> list[Fragment]:
    return [Fragment(name, state, tuple(tensor.shape), 0, tensor.flatten()) for name, tensor in tensors.items()]


def _calibration(storage: Storage, trained: Trained, committed: Committed) -> list[ModelBatch]:
    """The micro-batches of training data that training would take next, CALIBRATION_BATCHES of them."""
    data = trained.config.data
    opener = plain_opener(
        storage,
        trained.manifest,
        cache_bytes=data.cache_bytes,
        timeout_seconds=data.fetch_timeout_seconds,
        quarantine_fraction=data.quarantine_fraction,
    )
    batches: list[ModelBatch] = []
    with closing(Loader(trained.manifest, trained.config, opener, 0, 1)) as loader:
        loader.load_state(committed.manifest["data_state"])
        while len(batches) < CALIBRATION_BATCHES:
            for batch in map(to_model, loader.next_step()):
                # The loader writes its arrays over.
                inputs = tuple(tensor.clone() for tensor in batch.inputs)
                batches.append(
                    ModelBatch(batch.index, inputs, batch.labels.clone(), batch.loss_weight.clone()).trimmed()
                )
    return batches[:CALIBRATION_BATCHES]


def _recover(storage: Storage, name: str, config: RunConfig, report: Callable[[str], None]) -> None:
    """Train the run to its last step in plain processes on this machine; lines go to stderr."""
    from jobs.train_local import train_locally

    report(f"training {storage.url}/{name} to step {config.train.steps}")
    with redirect_stdout(sys.stderr):
        code = train_locally(config, storage, name)
    if code:
        raise CompressionError(
            f"{storage.url}/{name}: training ended early (exit code {code}); "
            f"`telar submit --resume {name}` goes on from its last checkpoint"
        )
