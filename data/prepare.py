"""Preparation: corpora -> texts -> tokenizer -> packed shards -> manifest, fanned out, resumable, deterministic.

How files are divided among tasks depends on the inputs alone, so any runner and any number of tasks at a time give
the same bytes. Each task leaves a receipt in `work/`; a preparation that was killed goes on from those. The manifest
is written last and `work/` removed after it.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cluster.storage import Storage
from configs.errors import DataError, RunStopped, TelarError
from configs.schema import RunConfig
from data.duplicates import digest as digest_of_pair
from data.duplicates import drop_duplicates
from data.encode import TOKENIZER, Encoded, EncodeTask, encode
from data.extract import Chunk, EncodeImage, Extracted, ExtractTask, check_not_empty, extract
from data.files import SourceFile
from data.held_out import HeldOutWriter, held_out_files, iterate_rows
from data.inputs import Group, data_digest, digest_of, group_of, list_inputs, read_given_tokenizer
from data.manifest import NAME, CorpusInfo, Manifest, ShardInfo, folder_of
from data.rows import RowFormat
from data.runners import Progress, Runner, nobody
from data.templates import literal_start
from data.tokenizer import Tokenizer
from data.tokenizer_training import TrainingTask, train_tokenizer

__all__ = ["data_digest", "prepare", "ray_tasks"]

LEAST_PART_BYTES, MOST_PART_BYTES, PARTS = 4 * 2**20, 64 * 2**20, 64
STOP_SECONDS = 1.0


def prepare(
    config: RunConfig,
    storage: Storage,
    run_tasks: Runner,
    report: Callable[[str], None],
    encode_image: EncodeImage | None = None,
) -> Manifest:
    """Prepare the data of `config` below `storage`, or find it prepared (then nothing is reported).

    `encode_image` makes codes of pictures where corpora have some; it travels to tasks. Raises DataError naming the
    corpus field and the file when an input cannot be used.
    """
    inputs = list_inputs(config)
    digest = digest_of(config, inputs)
    folder = folder_of(digest)
    found = _prepared(storage, folder)
    if found is not None:
        _check_codebook(found, storage, encode_image)
        return found
    try:
        return _prepare(config, storage, run_tasks, report, inputs, digest, encode_image)
    except DataError:
        # Input that cannot be used stays so until it changes, and then it has another digest: nothing to go on from.
        storage.remove(folder)
        raise
    except FileNotFoundError:
        # Another process that prepared the same data finished first and removed work/ under our feet.
        found = _prepared(storage, folder)
        if found is None:
            raise
        return found


def ray_tasks(limit: int, should_stop: Callable[[], bool] = lambda: False) -> Runner:
    """A runner of Ray tasks with one CPU each, at most `limit` at a time; the first error ends the rest.

    Raises RunStopped within STOP_SECONDS when `should_stop` says so; what is finished by then is kept.
    """

    def run(
        function: Callable[..., Any], arguments: Sequence[tuple], done: Callable[[int], None] = nobody
    ) -> list[Any]:
        import ray

        remote = ray.remote(num_cpus=1, max_retries=2)(_call)
        results: dict[int, Any] = {}
        running: dict[ray.ObjectRef, int] = {}
        waiting = list(enumerate(arguments))[::-1]
        try:
            while waiting or running:
                while waiting and len(running) < limit:
                    number, each = waiting.pop()
                    running[remote.remote(function, each)] = number
                ended, _ = ray.wait(list(running), num_returns=1, timeout=STOP_SECONDS)
                if should_stop():
                    raise RunStopped("stopped on request while data were prepared; what was finished is kept")
                if not ended:
                    continue
                number = running.pop(ended[0])
                try:
                    results[number] = ray.get(ended[0])
                    done(number)
                except ray.exceptions.RayTaskError as error:
                    if isinstance(error.cause, TelarError):
                        raise error.cause from error
                    raise
        finally:
            for reference in running:
                ray.cancel(reference)
        return [results[number] for number in range(len(arguments))]

    return run


def _call(function: Callable[..., Any], arguments: tuple) -> Any:
    # The task asked Ray for one CPU; the tokenizers library would take a thread per core.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(*arguments)


def _prepared(storage: Storage, folder: str) -> Manifest | None:
    """The manifest, if it is there and so are all files that it lists; their digests are checked by who reads them."""
    if not storage.exists(f"{folder}/{NAME}"):
        return None
    manifest = Manifest.read(storage, folder)
    paths = [TOKENIZER, *(file.path for file in manifest.files())]
    folders = {path.rpartition("/")[0] for path in paths}
    present = {f"{below}/{name}".lstrip("/") for below in folders for name in storage.names(f"{folder}/{below}")}
    return manifest if present.issuperset(paths) else None


def _check_codebook(found: Manifest, storage: Storage, encode_image: EncodeImage | None) -> None:
    """Raise DataError when the codes of prepared pictures are not those of the codebook that is there now.

    It was removed and trained again where other bits came of it, on another machine for example.
    """
    now = encode_image.digest if encode_image is not None else None
    if found.codebook_digest != now:
        raise DataError(
            f"{storage.url}/{found.folder}: its pictures are codes of codebook {found.codebook_digest}, the one there "
            f"now is {now}; put the first one back, or remove the folder and prepare the data again"
        )


def _prepare(
    config: RunConfig,
    storage: Storage,
    run_tasks: Runner,
    report: Callable[[str], None],
    inputs: dict[Group, list[SourceFile]],
    digest: str,
    encode_image: EncodeImage | None,
) -> Manifest:
    folder = folder_of(digest)
    tasks = [replace(task, encode_image=encode_image) for task in extract_tasks(config, storage, folder, inputs)]
    size = sum(file.bytes for files in inputs.values() for file in files)
    report(
        f"preparing {folder}: {sum(map(len, inputs.values()))} files, {size / 1e6:.1f} MB, {len(tasks)} reading tasks"
    )
    sizes = [sum(file.bytes for file in task.files) for task in tasks]
    extracted: list[Extracted] = run_tasks(extract, [(task,) for task in tasks], Progress("read", sizes, report))
    chunks: dict[str, list[Chunk]] = defaultdict(list)
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in extracted:
        for chunk in result.chunks:
            chunks[chunk.corpus].append(chunk)
        for name, count in result.counts.items():
            counts[name].update(count)
    inside = storage.child(folder)
    held_out: dict[str, ShardInfo] = {}
    for corpus in config.data.corpora:
        held_out[corpus.name], digests = _held_out(inside, corpus.name, extracted, config.data.deduplicate)
        if config.data.deduplicate:
            chunks[corpus.name], removed = drop_duplicates(
                storage.url,
                folder,
                corpus.name,
                digests,
                chunks[corpus.name],
                run_tasks,
                config.data.prepare_memory_bytes,
            )
            repeated = counts[corpus.name]["records held out"] - held_out[corpus.name].rows
            counts[corpus.name].update({**removed, "duplicate records held out": repeated})
        check_not_empty(corpus, counts[corpus.name], sum(chunk.records for chunk in chunks[corpus.name]))

    pictures = tuple(corpus.name for corpus in config.data.corpora if corpus.image_column is not None)
    if config.data.tokenizer.path is not None:
        inside.write_bytes(TOKENIZER, read_given_tokenizer(config.data.tokenizer))
    else:
        samples = tuple(_tokenizer_samples(config, chunks))
        run_tasks(train_tokenizer, [(TrainingTask(storage.url, folder, samples, config.data.tokenizer, pictures),)])
    tokenizer = Tokenizer.load(inside.read_bytes(TOKENIZER))
    if config.images is not None and len(tokenizer.image_codes) != config.images.codes:
        raise DataError(
            f"data.tokenizer.path: {config.data.tokenizer.path} has {len(tokenizer.image_codes)} tokens <image_N>, the "
            f"codebook has {config.images.codes} entries; set images.codes, or take another tokenizer"
        )
    report(f"tokenizer: {tokenizer.vocabulary_size} entries, digest {tokenizer.digest}")

    encode_tasks = [
        EncodeTask(
            storage.url,
            folder,
            chunk,
            number,
            RowFormat(
                config.data.layout,
                config.data.packing,
                config.data.source_tokens,
                config.data.target_tokens,
                keep_head=not corpus.continuation or bool(corpus.source),
            ),
            tokenizer.prefix_of(literal_start(corpus)),
            config.data.shard_rows,
            config.data.block_rows,
            corpus.name in pictures,
        )
        for corpus in config.data.corpora
        for number, chunk in enumerate(chunks[corpus.name])
    ]
    encoded: dict[str, list[Encoded]] = defaultdict(list)
    progress = Progress("tokenize", [task.chunk.characters for task in encode_tasks], report)
    for task, result in zip(encode_tasks, run_tasks(encode, [(task,) for task in encode_tasks], progress), strict=True):
        encoded[task.chunk.corpus].append(result)
    corpora = []
    for corpus in config.data.corpora:
        count = counts[corpus.name]
        count["records"] = sum(chunk.records for chunk in chunks[corpus.name])
        count["targets cut in pieces"] = sum(result.cut_targets for result in encoded[corpus.name])
        count["source tokens cut off"] = sum(result.truncated_source_tokens for result in encoded[corpus.name])
        corpora.append(
            CorpusInfo(
                name=corpus.name,
                weight=corpus.weight,
                task=corpus.task,
                pairs=sum(result.pairs for result in encoded[corpus.name]),
                shards=tuple(shard for result in encoded[corpus.name] for shard in result.shards),
                held_out=held_out[corpus.name],
                counts=dict(sorted(count.items())),
            )
        )
    manifest = Manifest(
        digest=digest,
        tokenizer_digest=tokenizer.digest,
        vocabulary_size=tokenizer.vocabulary_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        source_capacity=config.data.source_tokens,
        target_capacity=config.data.target_tokens,
        corpora=tuple(corpora),
        layout=config.data.layout,
        packing=config.data.packing,
        codebook_digest=encode_image.digest if encode_image is not None else None,
    ).write(storage)
    inside.remove("work")
    _remove_orphans(inside, manifest)
    for line in manifest.summary():
        report(line)
    return manifest


def _remove_orphans(inside: Storage, manifest: Manifest) -> None:
    """Remove what a preparation that was killed left beside the files of the manifest."""
    kept = {file.path for file in manifest.files()}
    for folder in ("", "held_out", *(f"shards/{corpus.name}" for corpus in manifest.corpora)):
        inside.remove_unfinished(folder)
        for name in inside.names(folder) if folder else ():
            if f"{folder}/{name}" not in kept:
                inside.remove(f"{folder}/{name}")


def extract_tasks(
    config: RunConfig, storage: Storage, folder: str, inputs: dict[Group, list[SourceFile]]
) -> list[ExtractTask]:
    """The inputs in parts, each file told whether it is held out."""
    tasks: list[ExtractTask] = []
    for group, files in inputs.items():
        corpora = tuple(corpus for corpus in config.data.corpora if group_of(corpus) == group)
        fraction = 0.0 if corpora[0].held_out is not None else config.data.held_out_fraction
        by_record = len(files) == 1 or corpora[0].held_out_key is not None
        relatives, sizes = [file.relative for file in files], [file.bytes for file in files]
        chosen = held_out_files(relatives, 0.0 if by_record else fraction, sizes)
        files = [replace(file, held_out=file.held_out or file.relative in chosen) for file in files]
        part_bytes = min(max(sum(file.bytes for file in files) // PARTS, LEAST_PART_BYTES), MOST_PART_BYTES)
        parts: list[list[SourceFile]] = [[]]
        taken = 0
        for file in files:
            if parts[-1] and taken + file.bytes > part_bytes:
                parts.append([])
                taken = 0
            parts[-1].append(file)
            taken += file.bytes
        for part in parts:
            tasks.append(
                ExtractTask(
                    storage.url,
                    folder,
                    len(tasks),
                    corpora,
                    tuple(part),
                    fraction if by_record else 0.0,
                    config.data.encoder_tokens,
                )
            )
    return tasks


def _tokenizer_samples(config: RunConfig, chunks: dict[str, list[Chunk]]) -> list[tuple[Chunk, int]]:
    """Characters to take from each chunk: `sample_bytes` divided among corpora by weight, within one by size."""
    total_weight = sum(corpus.weight for corpus in config.data.corpora)
    samples = []
    for corpus in config.data.corpora:
        characters = sum(chunk.characters for chunk in chunks[corpus.name])
        share = config.data.tokenizer.sample_bytes * corpus.weight / total_weight
        samples.extend((chunk, round(share * chunk.characters / characters)) for chunk in chunks[corpus.name])
    return samples


def _held_out(
    inside: Storage, corpus: str, extracted: list[Extracted], deduplicate: bool
) -> tuple[ShardInfo, dict[bytes, None]]:
    """The file of all held-out rows of a corpus, each once where asked for, and their digests in that case."""
    seen: dict[bytes, None] = {}
    with HeldOutWriter(inside, f"held_out/{corpus}.parquet") as writer:
        for result in extracted:
            if corpus not in result.held_out:
                continue
            for row in iterate_rows(inside, result.held_out[corpus]):
                if deduplicate:
                    found = digest_of_pair(row["source"], row["target"])
                    if found in seen:
                        continue
                    seen[found] = None
                writer.add(row)
        return writer.close(), seen
