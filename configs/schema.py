"""The whole configuration of a run: frozen pydantic models, every unit named, cross-field checks that say the fix.

Nothing here imports torch or ray; `configs.load` turns YAML and `--set` overrides into a `RunConfig`.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """Base of every section: immutable, strict about types, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    """What the run is called and where everything it leaves lies."""

    name: str | None = Field(None, description="run name; default: config file stem + UTC time")
    storage: str = Field("runs", description="folder or fsspec URL under which runs and prepared data lie")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of initialisation, sample order and dropout")

    @field_validator("name")
    @classmethod
    def _name_is_a_path_part(cls, value: str | None) -> str | None:
        if value is not None and not NAME_PATTERN.fullmatch(value):
            raise ValueError(
                f"{value!r} cannot name a folder on every store; use letters, digits, '.', '_' and '-', "
                "starting with a letter or digit, at most 100 characters"
            )
        return value


class ClusterSection(Section):
    """Which Ray cluster runs the job, and what one process of it takes."""

    address: str | None = Field(
        None, description="dashboard URL (http://host:8265) of a running cluster; default: embedded local Ray"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of training ranks; auto takes cuda where the cluster has GPUs"
    )
    cpus_per_rank: PositiveInt = Field(1, description="CPUs reserved for one training rank, logical")
    local_cpus: PositiveInt = Field(4, description="logical CPUs of the embedded cluster (may exceed the cores)")
    local_object_store_bytes: int = Field(
        256 * 2**20, ge=80 * 2**20, description="object store of the embedded cluster, bytes"
    )
    dashboard_port: int = Field(
        8265, ge=1024, le=65535, description="first port tried for the embedded dashboard, on 127.0.0.1"
    )
    shared_filesystem: bool = Field(
        False, description="true: file storage is one shared folder on all nodes of the cluster"
    )


class CorpusSection(Section):
    """One corpus: where records come from and how a record becomes a (source, target) pair.

    Templates name fields of a record in braces. Fields by kind:
    `python`: one record per function: `signature`, `body` (without docstring; signature and body compile together),
    `name`, `words` (those of the name), `docstring`, `summary` (its first line), `text` (the docstring as prose),
    `context` (the code of the file before it), `path`; a record whose target fields are empty is left out.
    `text`: `text` and `path`, one record per group of whole paragraphs (about 2,000 characters).
    `jsonl`, `json`: each object's own fields; see `records` for nested ones. A `json` file holds one document of at
    most 256 MiB; a list at its top gives one record per entry.
    `csv`, `tsv`: the columns of the first line, or those named in `columns`.
    `parquet`, `arrow` (IPC file or stream): the columns; binary ones are left out.
    `parallel`: line-aligned text files, one per column: `path: train.{column}.gz` with `columns: [en, de]`.
    `hf`: the columns of a data set that `datasets.load_dataset` streams; `path` is hf://OWNER/NAME (@REVISION may
    follow) on the Hugging Face Hub, or a local folder.
    Values that are no text keep their JSON spelling; null is the empty text. Folders are searched for .py; for .txt
    .md .rst; .jsonl .ndjson; .json; .csv; .tsv; each also with .gz; for .parquet; for .arrow .feather; names that
    start with a dot are skipped. Files named by themselves or by a glob may have any suffix, and .gz is unpacked.
    """

    name: str = Field(description="name in manifests, metrics and tables")
    kind: Literal["python", "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "parallel", "hf"] = Field(
        description="how files are read"
    )
    path: str = Field(
        description="file, folder or glob, any fsspec URL; python://stdlib is the running interpreter's library"
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
    source: str = Field("", description="template of the encoder's text; empty with `continuation: true`")
    target: str = Field(description="template of the text to predict")
    continuation: bool = Field(
        False, description="true: cut the target text in two; the first part becomes the source (plain prose)"
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
    task: Literal["likelihood", "summary", "completion"] = Field(
        "likelihood", description="how held-out records are evaluated, besides their likelihood"
    )

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
    vocabulary_size: int = Field(2048, ge=300, le=2**31, description="entries, special tokens included")
    sample_bytes: PositiveInt = Field(8 * 2**20, description="text that the tokenizer is trained on, bytes")


class DataSection(Section):
    """Corpora, tokenizer, shards and the order in which samples are served."""

    corpora: tuple[CorpusSection, ...] = Field(min_length=1, description="the mixture")
    tokenizer: TokenizerSection = Field(default_factory=TokenizerSection)
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
    block_rows: PositiveInt = Field(64, description="samples in a record batch, the unit of shuffled reading")
    lanes: PositiveInt = Field(8, description="independent streams the order is made of; fixed for a run's life")
    window_blocks: PositiveInt = Field(8, description="blocks of a lane that are shuffled together")
    cache_bytes: PositiveInt = Field(16 * 2**30, description="disk that a node's shard cache may take, bytes")
    prepare_tasks: PositiveInt = Field(2, description="Ray tasks that tokenize at one time")

    @model_validator(mode="after")
    def _names_differ(self) -> DataSection:
        names = [corpus.name for corpus in self.corpora]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"corpora: the name {twice[0]!r} stands twice; give each corpus its own name")
        return self


class ModelSection(Section):
    """The encoder-decoder of Vaswani et al. 2017."""

    architecture: Literal["encoder_decoder"] = Field("encoder_decoder", description="kind of transformer")
    d_model: PositiveInt = Field(512, description="width of the residual stream")
    heads: PositiveInt = Field(8, description="attention heads; must divide d_model")
    d_ff: PositiveInt = Field(2048, description="width of the feed-forward layer")
    encoder_layers: PositiveInt = Field(6, description="layers of the encoder")
    decoder_layers: PositiveInt = Field(6, description="layers of the decoder")
    dropout: Fraction = Field(0.1, description="dropout of sub-layer outputs and of embeddings, a probability")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> ModelSection:
        if self.d_model % self.heads:
            fits = [h for h in range(1, self.d_model + 1) if self.d_model % h == 0]
            near = min(fits, key=lambda h: (abs(h - self.heads), h))
            raise ValueError(
                f"heads: {self.heads} heads do not divide d_model = {self.d_model}; set model.heads to {near} "
                "or choose another d_model"
            )
        if (self.d_model // self.heads) % 2 and self.d_model % 2:
            raise ValueError(f"d_model: {self.d_model} is odd; sinusoidal positions need an even width")
        return self


class ParallelismSection(Section):
    """How ranks share the work: data-parallel replicas and DeepSpeed's ZeRO stage."""

    data: PositiveInt = Field(1, description="data-parallel replicas (training ranks)")
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="what replicas shard: 1 optimizer states, 2 gradients too, 3 parameters too"
    )


class OptimizerSection(Section):
    """Adam after section 5.3 of Vaswani et al. 2017, or AdamW when weight_decay is set."""

    betas: tuple[float, float] = Field((0.9, 0.98), description="decay rates of the two moments")
    eps: float = Field(1e-9, gt=0.0, description="added to the denominator")
    weight_decay: float = Field(0.0, ge=0.0, description="decoupled weight decay of matrices, per step")
    schedule: Literal["noam", "constant"] = Field(
        "noam", description="noam: equation 3 of the paper; constant: linear warm-up, then flat"
    )
    learning_rate: float = Field(
        1.0, gt=0.0, description="factor on the schedule: on equation 3 for noam, the flat rate for constant"
    )
    warmup_steps: PositiveInt = Field(4000, description="optimizer steps until the highest rate")
    gradient_clipping: float = Field(1.0, ge=0.0, description="largest gradient norm; 0 switches clipping off")

    @field_validator("betas", mode="before")
    @classmethod
    def _betas_from_list(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("betas")
    @classmethod
    def _betas_in_range(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0.0 <= beta < 1.0 for beta in value):
            raise ValueError(f"{list(value)} must lie in [0, 1)")
        return value


class TrainSection(Section):
    """Length of training and what one optimizer step consumes."""

    steps: PositiveInt = Field(description="optimizer steps of the whole run")
    global_batch_sequences: PositiveInt = Field(description="samples in one optimizer step, all replicas together")
    micro_batch_sequences: PositiveInt = Field(description="samples in one forward pass of one rank")
    label_smoothing: Fraction = Field(0.1, description="epsilon_ls of section 5.4 of the paper, a probability")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps fp32 master weights")
    threads_per_rank: PositiveInt = Field(1, description="CPU threads of one training rank")

    @model_validator(mode="after")
    def _micro_batches_fill_the_batch(self) -> TrainSection:
        if self.global_batch_sequences % self.micro_batch_sequences:
            lower = self.global_batch_sequences // self.micro_batch_sequences * self.micro_batch_sequences
            raise ValueError(
                f"global_batch_sequences: {self.global_batch_sequences} is no multiple of micro_batch_sequences = "
                f"{self.micro_batch_sequences}; set it to {lower or self.micro_batch_sequences}"
            )
        return self


class CheckpointSection(Section):
    """When checkpoints are committed and how many stay."""

    every_steps: PositiveInt = Field(500, description="optimizer steps between commits; the last step commits too")
    keep: PositiveInt = Field(3, description="newest valid checkpoints that stay")


class ElasticSection(Section):
    """What happens when a rank dies."""

    max_restarts: int = Field(
        1, ge=0, description="attempts after the first, each from the last commit, before the run fails"
    )
    start_timeout_seconds: PositiveInt = Field(
        180, description="longest wait for all ranks of an attempt to start, seconds"
    )


class EvaluateSection(Section):
    """Evaluation of the last checkpoint, fanned out over the cluster."""

    workers: PositiveInt = Field(2, description="evaluator actors")
    slice_records: PositiveInt = Field(32, description="held-out records in one slice, the unit of work")
    likelihood_records: PositiveInt = Field(256, description="held-out records per corpus, at most")
    generate_records: PositiveInt = Field(128, description="records per generating task, at most")
    max_new_tokens: PositiveInt = Field(64, description="longest generated output, tokens")
    bootstrap_rounds: int = Field(1000, ge=100, description="resamples behind each confidence interval")
    samples: int = Field(10, ge=0, description="source/reference/output triples kept for the report")


class TrackingSection(Section):
    """What is written while training."""

    log_every_steps: PositiveInt = Field(10, description="optimizer steps between printed lines; metrics have all")
    gauges: bool = Field(True, description="publish metrics at each node's Ray metrics endpoint")


class RunConfig(Section):
    """One run, whole."""

    run: RunSection = Field(default_factory=RunSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    data: DataSection
    model: ModelSection = Field(default_factory=ModelSection)
    parallelism: ParallelismSection = Field(default_factory=ParallelismSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    train: TrainSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    elastic: ElasticSection = Field(default_factory=ElasticSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)

    @model_validator(mode="after")
    def _every_replica_has_work(self) -> RunConfig:
        micro_batches = self.train.global_batch_sequences // self.train.micro_batch_sequences
        if self.parallelism.data > micro_batches:
            raise ValueError(
                f"parallelism.data: {self.parallelism.data} replicas share {micro_batches} micro-batches a step, so "
                f"{self.parallelism.data - micro_batches} would idle; set parallelism.data to {micro_batches}, or "
                "raise train.global_batch_sequences or lower train.micro_batch_sequences"
            )
        return self
