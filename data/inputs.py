"""What preparation starts from: the input files of a configuration, and the digest that names what comes of them."""

from __future__ import annotations

import hashlib
import json

import fsspec
import xxhash

from configs.errors import DataError
from configs.schema import CorpusSection, RunConfig, TokenizerSection
from data.extract import check_known_fields
from data.files import SourceFile, list_files
from data.manifest import FORMAT_VERSION
from data.sources import has_content
from data.templates import literal_start, where
from data.tokenizer import Tokenizer, with_our_names

# Fields that decide how data is served, not what it is.
OPERATIONAL = {
    *("cache_bytes", "fetch_timeout_seconds", "quarantine_fraction", "prepare_tasks", "prepare_memory_bytes"),
    *("datasets", "lanes", "window_blocks", "bucket_batches", "weight_changes"),
}

# Fields that decide which records there are and which of them are held out; templates and weights do not.
READING = ("kind", "path", "exclude", "columns", "quotes", "records", "subset", "split", "held_out", "held_out_key")

# Of how pictures are cut, sampled and trained on.
CODEBOOK_VERSION = 2

Group = tuple


def data_digest(config: RunConfig) -> str:
    """What prepared data is stored under: a hash of the data section and of path, size and version of each input.

    Operational fields do not enter. Raises DataError when a corpus or the tokenizer file cannot be found.
    """
    return digest_of(config, list_inputs(config))


def group_of(corpus: CorpusSection) -> Group:
    """What decides which files are read and how; corpora of one group share their records."""
    return tuple(getattr(corpus, field) for field in READING)


def list_inputs(config: RunConfig) -> dict[Group, list[SourceFile]]:
    """Files of each group, after a check of all templates; raises DataError naming the corpus field."""
    inputs: dict[Group, list[SourceFile]] = {}
    for prefix in config.data.tokenizer.prefixes:
        if not any(literal_start(corpus).startswith(prefix) for corpus in config.data.corpora):
            raise DataError(
                f"data.tokenizer.prefixes: no corpus has a source template that begins with {prefix!r}; correct or "
                "remove it"
            )
    for corpus in config.data.corpora:
        check_known_fields(corpus, config.data.encoder_tokens)
        if group_of(corpus) not in inputs:
            inputs[group_of(corpus)] = list_files(corpus)
    return inputs


def digest_of(config: RunConfig, inputs: dict[Group, list[SourceFile]]) -> str:
    """The digest of `config`'s data whose files are `inputs`; see `data_digest`."""
    section = config.data.model_dump(mode="json", exclude=OPERATIONAL)
    for corpus, dumped in zip(config.data.corpora, section["corpora"], strict=True):
        del dumped["path"], dumped["held_out"]
        dumped["files"] = [
            (file.relative, file.bytes, file.version, file.held_out) for file in inputs[group_of(corpus)]
        ]
    if config.data.tokenizer.path is not None:
        section["tokenizer"] = {"digest": xxhash.xxh3_128_hexdigest(read_given_tokenizer(config.data.tokenizer))}
    codebook = [] if config.images is None else [codebook_digest(config, inputs)]
    text = json.dumps([FORMAT_VERSION, section, *codebook], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def codebook_digest(config: RunConfig, inputs: dict[Group, list[SourceFile]]) -> str:
    """What the codebook of `config` is stored under: a hash of section, seed and of all files that hold its pictures.

    Raises ValueError without a section images.
    """
    if config.images is None:
        raise ValueError("images: a run without that section has no codebook")
    files = [
        (corpus.image_column, corpus.held_out_key, file.relative, file.bytes, file.version, file.held_out)
        for corpus in config.data.corpora
        if corpus.image_column is not None
        for file in inputs[group_of(corpus)]
    ]
    section = config.images.model_dump(mode="json")
    content = [CODEBOOK_VERSION, section, config.run.seed, config.data.held_out_fraction, files]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def read_given_tokenizer(section: TokenizerSection) -> bytes:
    """Content of `data.tokenizer.path` with our names for its special tokens.

    Raises DataError when it is absent or no usable tokenizer.
    """
    origin = f"data.tokenizer.path: {section.path}"
    try:
        with fsspec.open(section.path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{origin} cannot be read ({error}); correct the path") from error
    if section.bos is not None and section.eos is not None:
        content = with_our_names(content, section.bos, section.eos, section.pad, origin)
    Tokenizer.load(content, origin)
    return content


def check_readable(config: RunConfig, most_bytes: int) -> None:
    """Read up to `most_bytes` of the inputs and check encodings and emptiness, before a job is started for them.

    Raises DataError naming the corpus field and the file: path absent, no file matches, not UTF-8 or
    otherwise unreadable, only white space.
    """
    left = most_bytes
    for group, files in list_inputs(config).items():
        corpus = next(corpus for corpus in config.data.corpora if group_of(corpus) == group)
        if corpus.kind == "hf":
            # Its size is not known before it is read, and reading may be a download.
            continue
        blank = True
        for file in files:
            if left < file.bytes:
                blank = False
                break
            left -= file.bytes
            blank &= not has_content(corpus, file)
        if blank:
            raise DataError(
                f"{where(corpus, 'path')}: {corpus.path} holds no text ({len(files)} files, all empty); put content "
                "there or change the path"
            )
