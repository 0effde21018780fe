"""The whole configuration of a run: frozen pydantic models, every unit named, cross-field checks that say the fix.

Nothing here imports torch or ray; `configs.load` turns YAML and `--set` overrides into a `RunConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, field_validator, model_validator

from configs.data_section import CorpusSection, DataSection, TokenizerSection, WeightChange
from configs.images_section import ImagesSection
from configs.model_section import AttentionSection, ModelSection
from configs.not_offered import refuse_not_offered
from configs.offload_section import OffloadSection
from configs.pipeline_limits import pipeline_problem
from configs.redaction import advice, holds_secret
from configs.section import NAME_PATTERN, Fraction, PositiveInt, Section
from configs.task_section import RUNS_CODE, TaskSection

__all__ = [
    "AttentionSection",
    "CorpusSection",
    "DataSection",
    "ModelSection",
    "TaskSection",
    "TokenizerSection",
    "WeightChange",
]


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


class ParallelismSection(Section):
    """How ranks share the work: data-parallel replicas, stages and ranks within each, and DeepSpeed's ZeRO stage."""

    data: PositiveInt = Field(1, description="data-parallel replicas of the model")
    tensor: PositiveInt = Field(
        1,
        description="ranks that share the heads, feed-forward units and vocabulary of one replica, on one node; must "
        "divide model.heads, model.key_value_heads and model.d_ff",
    )
    pipeline: PositiveInt = Field(
        1,
        description="stages that a replica's layers are cut into, each on ranks of its own, balanced by cost; at most "
        "one per layer, and with zero_stage 1",
    )
    zero_stage: Literal[1, 2, 3] = Field(
        1, description="what replicas shard: 1 optimizer states, 2 gradients too, 3 parameters too"
    )
    offload: OffloadSection = Field(
        default_factory=OffloadSection, description="what lies in host memory; zero_stage 3"
    )

    _refuses = model_validator(mode="before")(refuse_not_offered)

    @property
    def ranks(self) -> int:
        """Training ranks of all replicas together."""
        return self.data * self.ranks_per_replica

    @property
    def ranks_per_replica(self) -> int:
        """Training ranks that hold one copy of the model."""
        return self.pipeline * self.tensor


class OptimizerSection(Section):
    """Adam after section 5.3 of Vaswani et al. 2017, AdamW when weight_decay is set, or Muon beside AdamW."""

    name: Literal["adam", "muon"] = Field(
        "adam",
        description="muon (Jordan 2024): orthogonalised momentum for the matrices of hidden layers, AdamW for the "
        "rest; rates are as for AdamW",
    )
    betas: tuple[float, float] = Field((0.9, 0.98), description="decay rates of the two moments")
    eps: float = Field(1e-9, gt=0.0, description="added to the denominator")
    momentum: float = Field(0.95, ge=0.0, lt=1.0, description="muon: decay rate of the mean of gradients")
    weight_decay: float = Field(
        0.0, ge=0.0, description="decoupled decay of matrices, times the rate per step; embeddings have none"
    )
    schedule: Literal["noam", "cosine", "wsd", "constant"] = Field(
        "noam",
        description="noam: equation 3 of the paper; all others climb linearly first: cosine falls along half a cosine, "
        "wsd (warm-up, stable, decay) stays flat and falls linearly at the end, constant stays flat",
    )
    decay_steps: PositiveInt | None = Field(
        None, description="wsd: steps of the fall at the end; default: a tenth of train.steps"
    )
    minimum_ratio: float = Field(0.0, ge=0.0, le=1.0, description="cosine, wsd: last rate over the highest")
    learning_rate: float = Field(
        1.0, gt=0.0, description="factor on the schedule: on equation 3 for noam, the highest rate for others"
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
    z_loss: float = Field(
        0.0, ge=0.0, description="factor of the squared logarithm of the softmax's normaliser, added to the loss"
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 keeps fp32 master weights")
    activation_checkpointing: bool = Field(
        False, description="keep only what enters each layer and compute the rest again in the backward pass"
    )
    quantize: Literal["int8", "int4"] | None = Field(
        None, description="forward passes on matrices rounded as `telar compress` rounds them (quantization-aware)"
    )
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
    stall_seconds: float = Field(
        300.0, gt=0.0, description="an upload that storage takes no byte of for so long is given up, training goes on"
    )
    keep_every: PositiveInt | None = Field(None, description="checkpoints of multiples of so many steps stay too")


class ElasticSection(Section):
    """How many replicas train, and what happens when a rank or a node is lost."""

    min_replicas: PositiveInt | None = Field(
        None, description="fewest replicas that train when the cluster has no room for more; default: parallelism.data"
    )
    max_replicas: PositiveInt | None = Field(
        None, description="most replicas that train when the cluster has room for them; default: parallelism.data"
    )
    max_restarts: int = Field(
        3, ge=0, description="restarts in a row without a newer state to start from, before the run fails"
    )
    start_timeout_seconds: PositiveInt = Field(
        180, description="longest wait for room for min_replicas, and for all ranks of an attempt to start, seconds"
    )
    grow_seconds: float = Field(
        30.0, ge=0.0, description="how long there must be room for more replicas before the run commits and grows"
    )
    hang_seconds: float = Field(
        60.0,
        gt=0.0,
        description="ranks that do nothing for so long, and for 10 times the longest of the latest steps, are replaced",
    )
    snapshot_every: int = Field(
        0,
        ge=0,
        description="steps between snapshots that two nodes keep in memory, from which a run goes on after a loss; "
        "0: none, it goes on from the last commit",
    )
    standbys: int = Field(
        1, ge=0, description="processes that wait on each node with everything imported; on nodes without GPUs"
    )


class EvaluateSection(Section):
    """Evaluation of the last checkpoint, fanned out over the cluster."""

    workers: PositiveInt = Field(2, description="evaluator actors")
    slice_records: PositiveInt = Field(32, description="held-out records in one slice, the unit of work")
    likelihood_records: PositiveInt = Field(256, description="held-out records per corpus, at most")
    generate_records: PositiveInt = Field(128, description="records per generating task, at most")
    max_new_tokens: PositiveInt = Field(64, description="longest generated output, tokens")
    beams: PositiveInt = Field(1, description="beams of beam search; 1: the most probable token at each step")
    length_penalty: float = Field(0.6, ge=0.0, description="alpha of beam search; 0: none (Vaswani et al. 2017, 6.1)")
    average_checkpoints: PositiveInt = Field(
        1, description="evaluate the mean of the last so many checkpoints; checkpoint.keep must keep them"
    )
    bootstrap_rounds: int = Field(1000, ge=100, description="resamples behind each confidence interval")
    samples: int = Field(10, ge=0, description="source/reference/output triples kept for the report")
    tasks: tuple[str, ...] = Field(
        (),
        description="tasks that belong to no corpus: names of built-in ones (telar tasks lists them; all: every one) "
        "or YAML files; submitting puts what they say into `definitions`",
    )
    datasets: str | None = Field(
        None, description="folder, any fsspec URL, that holds the files of built-in tasks; needed by them alone"
    )
    definitions: tuple[TaskSection, ...] = Field((), description="tasks in full, in the form of a task's YAML file")
    allow_code_execution: bool = Field(
        False,
        description="run programs that the model writes (metric pass_at_k), in processes with limits and, where that "
        "can be, without network; tasks: all has those tasks only then",
    )
    lm_eval: tuple[str, ...] = Field(
        (),
        description="tasks of lm-evaluation-harness, by name or YAML file, on the exported model; needs the extra "
        "telar[lm-eval]",
    )

    @model_validator(mode="after")
    def _task_names_differ(self) -> EvaluateSection:
        names = [task.name for task in self.definitions]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"definitions: the name {twice[0]!r} stands twice; give each task its own")
        return self

    @model_validator(mode="after")
    def _code_is_run_only_when_asked(self) -> EvaluateSection:
        running = [task.name for task in self.definitions if task.metric in RUNS_CODE]
        if running and not self.allow_code_execution:
            raise ValueError(
                f"allow_code_execution: {', '.join(running)} would run programs that the model writes; set it to true "
                "(telar evaluate --allow-code-execution), best in a container, or leave these tasks out"
            )
        return self


class TrackingSection(Section):
    """What is written while training."""

    log_every_steps: PositiveInt = Field(10, description="optimizer steps between printed lines; metrics have all")
    gauges: bool = Field(True, description="publish metrics at each node's Ray metrics endpoint")
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = Field(
        (),
        description="where curves are drawn besides metrics.jsonl; each needs its extra (pip install 'telar[wandb]') "
        "on the head, and what it logs in with in the environment there, never here",
    )
    project: str = Field("telar", min_length=1, description="MLflow's experiment, W&B's project")
    status_page: Literal["off", "loopback", "cluster"] = Field(
        "loopback",
        description="who reaches the run's status page on the head: nobody, who is on that machine, or all who reach "
        "the node and have the cluster's token",
    )
    log_samples: bool = Field(
        False, description="write a digest of every sample of every step to samples/ of the run, to check what was used"
    )


def strings(value: object, name: str) -> Iterator[tuple[str, str]]:
    """Dotted names and values of all texts in a tree."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from strings(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from strings(item, f"{name}[{number}]")


class RunConfig(Section):
    """One run, whole."""

    run: RunSection = Field(default_factory=RunSection)
    cluster: ClusterSection = Field(default_factory=ClusterSection)
    data: DataSection
    images: ImagesSection | None = Field(None, description="how pictures become tokens; None: there are none")
    model: ModelSection = Field(default_factory=ModelSection)
    parallelism: ParallelismSection = Field(default_factory=ParallelismSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    train: TrainSection
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    elastic: ElasticSection = Field(default_factory=ElasticSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    tracking: TrackingSection = Field(default_factory=TrackingSection)

    @model_validator(mode="after")
    def _no_secrets(self) -> RunConfig:
        for name, value in strings(self.model_dump(mode="json"), ""):
            if holds_secret(value):
                raise ValueError(advice(name, value))
        return self

    @model_validator(mode="after")
    def _pictures_fit(self) -> RunConfig:
        with_pictures = [corpus.name for corpus in self.data.corpora if corpus.image_column is not None]
        if self.images is None:
            if with_pictures:
                raise ValueError(f"images: corpus {with_pictures[0]!r} has pictures as targets; add a section images")
            return self
        if not with_pictures:
            raise ValueError("images: no corpus has a target {image:COLUMN}; add one, or remove the section")
        codes, tokens = self.data.tokenizer.image_codes, self.images.tokens
        if codes != self.images.codes and self.data.tokenizer.path is None:
            raise ValueError(
                f"data.tokenizer.image_codes: {codes} ids are reserved, the codebook has {self.images.codes} entries; "
                f"set data.tokenizer.image_codes to {self.images.codes}"
            )
        # Its end, and before it the least prompt where that stands in the same positions.
        needed = tokens + (2 if self.data.layout == "sequence" else 1)
        if needed > self.data.target_tokens:
            raise ValueError(
                f"data.target_tokens: a picture of {tokens} tokens needs {needed} positions and does not fit into "
                f"{self.data.target_tokens}; set data.target_tokens to {needed} or more, or raise images.halvings"
            )
        if self.data.packing == "chunk":
            raise ValueError("data.packing: chunk would cut pictures in two; set data.packing to best_fit or none")
        return self

    @model_validator(mode="after")
    def _tasks_and_corpora_differ(self) -> RunConfig:
        corpora = [corpus.name for corpus in self.data.corpora]
        tasks = {task.name: task for task in self.evaluate.definitions}
        for name, task in tasks.items():
            if name in corpora:
                raise ValueError(f"evaluate.definitions: {name!r} is the name of a corpus too; rename the task")
            # Names of tasks are known when their files are read, which is when the run is submitted.
            if task.compare_with not in (None, *corpora, *tasks) and not self.evaluate.tasks:
                raise ValueError(
                    f"evaluate.definitions: {name}: compare_with: no task or corpus {task.compare_with!r}; there are "
                    f"{', '.join([*corpora, *tasks])}; add it to evaluate.tasks, or remove compare_with"
                )
        return self

    @model_validator(mode="after")
    def _checkpoints_are_kept(self) -> RunConfig:
        wanted, made = self.evaluate.average_checkpoints, -(-self.train.steps // self.checkpoint.every_steps)
        if wanted > min(self.checkpoint.keep, made):
            raise ValueError(
                f"evaluate.average_checkpoints: {wanted} checkpoints cannot be averaged, checkpoint.keep is "
                f"{self.checkpoint.keep} and {made} are made; raise checkpoint.keep, lower checkpoint.every_steps, "
                "or average fewer"
            )
        return self

    @model_validator(mode="after")
    def _positions_reach(self) -> RunConfig:
        if self.model.positions != "learned":
            return self
        sides = {"encoder_decoder": ("source_tokens", "target_tokens"), "decoder": ("target_tokens",)}
        for field in sides.get(self.model.architecture, ("source_tokens",)):
            tokens = getattr(self.data, field)
            if tokens > self.model.max_positions:
                raise ValueError(
                    f"data.{field}: {tokens} tokens are more than the {self.model.max_positions} learned positions; "
                    f"set model.max_positions to {tokens}, or lower data.{field}"
                )
        return self

    @model_validator(mode="after")
    def _tensor_ranks_share_evenly(self) -> RunConfig:
        tensor, model = self.parallelism.tensor, self.model
        for field, number in (("heads", model.heads), ("key_value_heads", model.heads_of_keys), ("d_ff", model.d_ff)):
            if number % tensor:
                fits = [size for size in range(1, tensor) if number % size == 0]
                raise ValueError(
                    f"parallelism.tensor: {tensor} ranks cannot share model.{field} = {number} evenly; set "
                    f"parallelism.tensor to {fits[-1]} or model.{field} to a multiple of {tensor}"
                )
        return self

    @property
    def min_replicas(self) -> int:
        """Fewest replicas that the run trains with."""
        return self.elastic.min_replicas or self.parallelism.data

    @property
    def max_replicas(self) -> int:
        """Most replicas that the run trains with."""
        return self.elastic.max_replicas or self.parallelism.data

    @model_validator(mode="after")
    def _replicas_have_an_order(self) -> RunConfig:
        least, most, usual = self.min_replicas, self.max_replicas, self.parallelism.data
        if not least <= usual <= most:
            raise ValueError(
                f"elastic: min_replicas = {least}, parallelism.data = {usual} and max_replicas = {most} must not "
                "decrease in this order; lower elastic.min_replicas or raise elastic.max_replicas"
            )
        return self

    @model_validator(mode="after")
    def _states_can_be_offloaded(self) -> RunConfig:
        if not self.parallelism.offload.active:
            return self
        if self.parallelism.zero_stage != 3:
            raise ValueError(
                f"parallelism.offload: zero_stage {self.parallelism.zero_stage} keeps states on the device; set "
                "parallelism.zero_stage to 3 (with pipeline 1), or remove offload"
            )
        if self.optimizer.name == "muon":
            raise ValueError(
                "parallelism.offload: muon multiplies whole matrices on the device; set optimizer.name to adam, or "
                "remove offload"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_rounded(self) -> RunConfig:
        if self.train.quantize is None:
            return self
        if self.parallelism.tensor > 1:
            raise ValueError(
                f"train.quantize: {self.train.quantize} takes the scales of whole rows, and tensor ranks have parts of "
                "them; set parallelism.tensor to 1"
            )
        if self.model.architecture == "encoder":
            raise ValueError("train.quantize: an encoder is not compressed afterwards; remove train.quantize")
        return self

    @model_validator(mode="after")
    def _stages_can_be_cut(self) -> RunConfig:
        ranks = self.parallelism
        problem = pipeline_problem(ranks.pipeline, ranks.zero_stage, self.model)
        if problem is not None:
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _every_replica_has_work(self) -> RunConfig:
        micro_batches = self.train.global_batch_sequences // self.train.micro_batch_sequences
        if self.max_replicas > max(micro_batches, self.parallelism.data):
            raise ValueError(
                f"elastic.max_replicas: {self.max_replicas} replicas share {micro_batches} micro-batches a step; set "
                f"elastic.max_replicas to {micro_batches}"
            )
        if self.parallelism.data > micro_batches:
            raise ValueError(
                f"parallelism.data: {self.parallelism.data} replicas share {micro_batches} micro-batches a step, so "
                f"{self.parallelism.data - micro_batches} would idle; set parallelism.data to {micro_batches}, or "
                "raise train.global_batch_sequences or lower train.micro_batch_sequences"
            )
        return self
