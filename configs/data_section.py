"""The data section: corpora, tokenizer, how records become samples, the order and the cache they are served from."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from configs.section import NAME_PATTERN, Fraction, PositiveInt, Section

# A target that is a picture.
IMAGE_TARGET = re.compile(r"\{image:([^{}]+)\}")


class CorpusSection(Section):
    """One corpus: where records come from and how a record becomes a (source, target) pair.

    Templates name fields of a record in braces. Fields by kind:
    `python`: one record per function: `signature`, `body` (without docstring; signature and body compile together),
    `name`, `words` (those of the name), `docstring`, `summary` (its first line), `text` (the docstring as prose),
    `context` (the code of the file before it), `path`; a record whose target fields are empty is left out.
    `text`: `text` and `path`, one record per group of whole paragraphs (2,000 characters or somewhat more; before more
    than 32,768 without a blank line are reached, a record ends at the end of a line, or after a blank in a long line).
    `jsonl`, `json`: each object's own fields; see `records` for nested ones. A `json` file holds one document of at
    most 256 MiB unpacked; a list at its top gives one record per entry. A line of `jsonl` has at most 256 MiB.
    `csv`, `tsv`: the columns of the first line, or those named in `columns`; empty lines are passed over.
    `parquet`, `arrow` (IPC file or stream): the columns; those that hold binary values are left out.
    `parallel`: line-aligned text files, one per column: `path: train.{column}.gz` with `columns: [en, de]`.
    `hf`: the columns of a data set that `datasets.load_dataset` streams; `path` is hf://OWNER/NAME (@REVISION may
    follow) on the Hugging Face Hub, or a local folder.
    `babi`: one record per question of bAbI's story files: `story`, `question`, `answer`, `supporting` (the sentences
    that the answer rests on, one a line), `path`.
    `shapes`: drawn pictures, no files: `path: shapes://24` is 3,456 combinations of `shape`, `colour`, `size`, `place`
    and `background` on 24 x 24 pixels, with `caption` and the picture `image`.
    Null is the empty text; numbers, truth values, lists and objects are spelled as JSON, dates and times as
    2024-05-31 13:30:00 (to the microsecond). Files are UTF-8; line ends of Windows become newlines. Folders are
    searched for .py; for .txt .md .rst; .jsonl .ndjson; .json; .csv; .tsv; .parquet; for .arrow .feather; each also
    with .gz; names that start with a dot are skipped. Files named by themselves or by a glob may have any suffix, and
    .gz is unpacked. A folder on a web server ends in a slash.
    """

    # Where messages say that a corpus stands.
    place: ClassVar[str] = "data.corpora"

    name: str = Field(description="name in manifests, metrics and tables")
    kind: Literal[
        "python", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "parallel", "hf", "babi", "shapes"
    ] = Field(description="how files are read")
    path: str = Field(
        description="file, folder or glob, any fsspec URL; python://stdlib is the running interpreter's library, "
        "shapes://SIDE are pictures that are drawn"
    )
    exclude: tuple[str, ...] = Field((), description="glob patterns of files or folders to leave out")
    columns: tuple[str, ...] = Field(
        (), description="csv, tsv: names of the columns of files without a header line; parallel: one per file"
    )
    quotes: bool = Field(True, description='csv, tsv: false takes " as an ordinary character, not as a quote')
    records: str = Field(
        "",
        description="json, jsonl: dotted path to nested records (data.paragraphs.qas; * is each entry of an object, "
        "its name the field `key`); lists are walked through, fields of outer objects stay, plain values are `text`",
    )
    subset: str | None = Field(None, description="hf: name of the data set's configuration")
    split: str = Field("train", description="hf: split to train on")
    held_out: str | None = Field(
        None,
        description="records kept for evaluation come from here: a path as in `path` (those files are not trained on); "
        "hf: a split; default: data.held_out_fraction decides",
    )
    held_out_key: str | None = Field(
        None,
        description="field whose hash decides which records are kept for evaluation, so that records that share its "
        "value never stand on both sides; default: hash of the file's path, in a corpus of one file of the record",
    )
    source: str = Field(
        "",
        description="template of the encoder's text, in layout sequence of the prompt; empty with "
        "`continuation: true`, or where texts have no prompt",
    )
    target: str = Field(description="template of the text to predict, or {image:COLUMN} for a column of pictures")
    continuation: bool = Field(
        False,
        description="true: plain prose; layout pairs cuts the target text in two and the first part becomes the "
        "source, layout sequence keeps it whole as the target, with no source but that of a template",
    )
    source_characters: tuple[int, int] | None = Field(
        None, description="[least, most] characters of the rendered source; records outside are left out and counted"
    )
    target_characters: tuple[int, int] | None = Field(
        None,
        description="[least, most] characters of the rendered target (with continuation: of the text before it is "
        "cut in two); records outside are left out and counted",
    )
    weight: float = Field(1.0, gt=0.0, description="share of samples, relative to the other corpora")
    task: Literal[
        "likelihood",
        "summary",
        "completion",
        "translation",
        "sentiment",
        "qa",
        "text_generation",
        "text_to_image",
    ] = Field("likelihood", description="how held-out records are evaluated, besides their likelihood")

    @property
    def image_column(self) -> str | None:
        """The column of pictures that are the target, `{image:COLUMN}`; None for a corpus of texts."""
        match = IMAGE_TARGET.fullmatch(self.target)
        return match[1] if match else None

    @model_validator(mode="after")
    def _pictures_come_from_tables(self) -> CorpusSection:
        for field in ("source", "target"):
            template = getattr(self, field)
            # Doubled braces are literal ones.
            if IMAGE_TARGET.search(template.replace("{{", "").replace("}}", "")) and (
                field == "source" or self.image_column is None
            ):
                raise ValueError(
                    f"{field}: {template!r} has a picture among text; a picture is a whole target, {{image:COLUMN}}, "
                    "and its caption the source"
                )
        if self.task == "text_to_image" and self.kind != "shapes":
            raise ValueError("task: text_to_image knows what drawn shapes show; it needs kind: shapes")
        if self.image_column is None:
            if self.task == "text_to_image":
                raise ValueError(f"task: text_to_image judges pictures, and the target is {self.target!r}")
            return self
        if self.kind not in ("parquet", "arrow", "hf", "shapes"):
            raise ValueError(
                f"target: {self.target!r} needs a column of pictures; kind must be parquet, arrow, hf or shapes"
            )
        if self.continuation or not self.source:
            raise ValueError(f"target: {self.target!r} needs a source template (the caption), and no continuation")
        if self.task not in ("likelihood", "text_to_image"):
            raise ValueError(f"task: {self.task} compares texts, and the target is a picture; use task: likelihood")
        if self.target_characters is not None:
            raise ValueError("target_characters: a picture has no characters; remove it")
        if self.held_out_key == self.image_column:
            raise ValueError(
                f"held_out_key: {self.held_out_key!r} is the picture; name a field of text, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _templates_fit(self) -> CorpusSection:
        if not NAME_PATTERN.fullmatch(self.name):
            raise ValueError(f"name: {self.name!r} must consist of letters, digits, '.', '_' and '-'")
        if self.task in ("summary", "completion") and self.kind != "python":
            raise ValueError(
                f"task: {self.task!r} needs functions and docstrings, which only kind: python gives; "
                "use task: likelihood"
            )
        return self

    @model_validator(mode="after")
    def _fields_belong_to_the_kind(self) -> CorpusSection:
        for field, kinds in KINDS_OF_FIELD.items():
            if self.kind not in kinds and getattr(self, field) != type(self).model_fields[field].default:
                raise ValueError(f"{field}: only kind: {' or '.join(kinds)} has it; remove it or change kind")
        if self.kind == "parallel":
            for field in ("path", "held_out"):
                if "{column}" not in (getattr(self, field) or "{column}"):
                    raise ValueError(
                        f"{field}: {getattr(self, field)!r} lacks {{column}}, which stands for each name of columns in "
                        "the files' names, as in train.{column}.gz"
                    )
            if len(self.columns) < 2:
                raise ValueError("columns: kind: parallel needs two names or more, one per aligned file: [en, de]")
        if len(set(self.columns)) < len(self.columns):
            raise ValueError(f"columns: {list(self.columns)} has a name twice; give each column its own")
        if self.held_out is not None and self.held_out_key is not None:
            raise ValueError("held_out_key: held_out names the records to keep already; leave one of the two out")
        return self

    @model_validator(mode="after")
    def _lengths_are_ranges(self) -> CorpusSection:
        for field in ("source_characters", "target_characters"):
            least, most = getattr(self, field) or (0, 1)
            if not 0 <= least <= most or most < 1:
                raise ValueError(f"{field}: {[least, most]} must be [least, most] with 0 <= least <= most, most > 0")
        if self.continuation and self.source_characters is not None:
            raise ValueError(
                "source_characters: with continuation: true the source is a part of the target text; use "
                "target_characters, which then measures the whole text"
            )
        return self


KINDS_OF_FIELD = {
    "columns": ("csv", "tsv", "parallel"),
    "quotes": ("csv", "tsv"),
    "records": ("json", "jsonl"),
    "subset": ("hf",),
    "split": ("hf",),
}


class TokenizerSection(Section):
    """Byte-level byte-pair tokenizer trained on a sample of the mixture, or one loaded from a file."""

    path: str | None = Field(None, description="tokenizer.json to load (any fsspec URL); default: train one")
    bos: str | None = Field(None, description="path: its token that begins a text; default: <bos>")
    eos: str | None = Field(None, description="path: its token that ends a text; default: <eos>")
    pad: str | None = Field(
        None,
        description="path: its token that fills rows; default: <pad>, added at the end where bos is given",
    )
    kind: Literal["bpe", "unigram"] = Field("bpe", description="model that is trained: byte-pair or unigram")
    prefixes: tuple[str, ...] = Field(
        (),
        description="starts of source templates (task prefixes) that become one token each, in the trained tokenizer",
    )
    image_codes: int = Field(
        0, ge=0, le=2**20, description="ids reserved for image codes, at the end of the vocabulary and part of its size"
    )
    vocabulary_size: int = Field(2048, ge=300, le=2**31, description="entries, special tokens included")
    sample_bytes: PositiveInt = Field(8 * 2**20, description="text that the tokenizer is trained on, bytes")

    @model_validator(mode="after")
    def _names_are_of_a_file(self) -> TokenizerSection:
        named = [name for name in ("bos", "eos", "pad") if getattr(self, name) is not None]
        if named and self.path is None:
            raise ValueError(f"{named[0]}: it names a token of a tokenizer that is loaded; give path, or remove it")
        if (self.bos is None) != (self.eos is None):
            raise ValueError("bos, eos: give both, or none of them")
        return self


class WeightChange(Section):
    """New weights of the mixture from one step on."""

    from_step: PositiveInt = Field(
        description="optimizer steps done before the change; it takes effect at the next whole superblock of the order"
    )
    weights: dict[str, float] = Field(
        min_length=1,
        description="weight of each corpus by name; corpora left out keep theirs; 0: not drawn from then on",
    )

    @model_validator(mode="after")
    def _weights_are_shares(self) -> WeightChange:
        for name, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weights: {weight} of {name!r} must be a finite number of 0 or more")
        return self


class DataSection(Section):
    """Corpora, tokenizer, shards and the order in which samples are served."""

    corpora: tuple[CorpusSection, ...] = Field(min_length=1, description="the mixture")
    datasets: str | None = Field(
        None,
        description="folder, any fsspec URL, that relative paths of corpora start from, and those of built-in tasks "
        "without evaluate.datasets; default: the folder of the configuration file",
    )
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
    layout: Literal["pairs", "sequence"] = Field(
        "pairs",
        description="pairs: source and target apart, for encoder-decoders; sequence: one behind the other in "
        "target_tokens positions with loss on the target alone, for decoders (source_tokens is not used)",
    )
    packing: Literal["best_fit", "chunk", "none"] = Field(
        "best_fit",
        description="best_fit: whole pairs, several to a sample; chunk (layout sequence): targets one after the "
        "other, cut where a sample is full; none: one pair to a sample",
    )
    bucket_batches: int = Field(
        0,
        ge=0,
        description="global batches within which samples of like length are brought together in micro-batches, padded "
        "to the longest of each; 0: off, all arrays have full width",
    )
    weight_changes: tuple[WeightChange, ...] = Field(
        (), description="other corpus weights from given steps on, in ascending order of step"
    )
    source_tokens: PositiveInt = Field(256, description="encoder positions in a sample, tokens")
    target_tokens: PositiveInt = Field(128, description="decoder positions in a sample, tokens")
    held_out_fraction: Fraction = Field(
        0.05,
        description="share kept for evaluation: of files by hash of path, of the records of a one-file corpus by hash "
        "of content, of the values of held_out_key by their hash; corpora with held_out ignore it",
    )
    deduplicate: bool = Field(
        False,
        description="true: of records with equal source and target keep the first of a corpus, and none that is held "
        "out too; counts are in the manifest",
    )
    shard_rows: PositiveInt = Field(8192, description="samples in a shard, at most")
    block_rows: PositiveInt = Field(16, description="samples in a record batch, the unit of shuffled reading")
    lanes: PositiveInt = Field(8, description="independent streams the order is made of; fixed for a run's life")
    window_blocks: PositiveInt = Field(64, description="blocks of a lane that are shuffled together, after a ramp")
    cache_bytes: PositiveInt = Field(16 * 2**30, description="disk that a node's shard cache may take, bytes")
    fetch_timeout_seconds: PositiveInt = Field(
        300, description="longest wait for one shard, retries included, before the run fails, seconds"
    )
    quarantine_fraction: Fraction = Field(
        0.001,
        description="share of all tokens that may lie in shards damaged in storage; their samples are masked, and past "
        "this share the run fails",
    )
    prepare_memory_bytes: int = Field(
        2**30, ge=64 * 2**20, description="memory that one preparation task may take for records and tokens, bytes"
    )
    prepare_tasks: PositiveInt = Field(2, description="Ray tasks that tokenize at one time")

    @property
    def encoder_tokens(self) -> int | None:
        """Tokens of a sample that an encoder reads; None in layout sequence, which has no encoder."""
        return self.source_tokens if self.layout == "pairs" else None

    @model_validator(mode="after")
    def _packing_fits_the_layout(self) -> DataSection:
        if self.packing == "chunk" and self.layout != "sequence":
            raise ValueError(
                "packing: chunk cuts texts wherever a sample is full, which layout: pairs cannot do, for it keeps each "
                "source beside its target; set data.packing to best_fit or none, or data.layout to sequence"
            )
        if self.bucket_batches and self.packing != "none":
            raise ValueError(
                f"bucket_batches: samples of packing {self.packing} are nearly full, so there are no like lengths to "
                "bring together; set data.packing to none, or data.bucket_batches to 0"
            )
        if self.layout == "sequence" and self.target_tokens < 2:
            raise ValueError(
                "target_tokens: layout sequence needs 2 or more, one token of context and one to predict; set "
                "data.target_tokens to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _names_differ(self) -> DataSection:
        names = [corpus.name for corpus in self.corpora]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"corpora: the name {twice[0]!r} stands twice; give each corpus its own name")
        return self

    @model_validator(mode="after")
    def _weight_changes_follow(self) -> DataSection:
        names, before = [corpus.name for corpus in self.corpora], 0
        for number, change in enumerate(self.weight_changes):
            for name in change.weights:
                if name not in names:
                    raise ValueError(
                        f"weight_changes.{number}.weights: no corpus {name!r}; corpora are {', '.join(names)}"
                    )
            if change.from_step <= before:
                raise ValueError(
                    f"weight_changes.{number}.from_step: {change.from_step} must be above {before}, the step of the "
                    "entry before; list changes by ascending step"
                )
            before = change.from_step
        return self
