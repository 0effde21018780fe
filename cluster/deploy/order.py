"""What is to be deployed: a run's configuration, the machines it needs and the command that each system starts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fsspec.core import split_protocol

from configs.errors import ConfigError
from configs.schema import RunConfig

RAY_VERSION = "2.60.0"
GPUS_PER_NODE = 8
# What Ray and the shard servers of a node run on, beside the ranks.
SPARE_CPUS = 2
MEMORY_GIB_PER_RANK = 16
# Between the notice that a machine goes and its end: a checkpoint is committed in that time.
GRACE_SECONDS = 120
DASHBOARD_PORT = 8265
DASHBOARD = f"http://127.0.0.1:{DASHBOARD_PORT}"


@dataclass(frozen=True)
class Machines:
    """Equal machines: how many, and what each has."""

    nodes: int
    gpus: int
    cpus: int
    memory_gib: int


@dataclass(frozen=True)
class Order:
    """A run with a name and an absolute storage URL, and the machines for it."""

    config: RunConfig
    machines: Machines

    @property
    def name(self) -> str:
        """The run's name."""
        assert self.config.run.name is not None
        return self.config.run.name

    def command(self, config_path: str, overrides: Sequence[str] = ()) -> str:
        """What starts the run on the head, or goes on with it when the cluster is started again."""
        words = ["telar", "submit", config_path, "--address", DASHBOARD, "--or-resume", "--wait"]
        # Said here, because TELAR_STORAGE of the machine would win over the configuration.
        words += ["--storage", self.config.run.storage]
        words += [word for override in overrides for word in ("--set", override)]
        return " ".join(shlex.quote(word) for word in words)


def machines_for(
    config: RunConfig,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    cpus_per_node: int | None = None,
    memory_gib: int | None = None,
) -> Machines:
    """Machines that hold all ranks of the run; what is not given follows from the configuration.

    Raises ConfigError when the ranks do not fit.
    """
    ranks, each = config.parallelism.ranks, config.cluster.cpus_per_rank
    on_cpu = config.cluster.device == "cpu"
    if on_cpu and gpus_per_node:
        raise ConfigError(
            f"--gpus-per-node: {gpus_per_node}, but cluster.device is cpu; leave it out, or set cuda there"
        )
    gpus = 0 if on_cpu else gpus_per_node or min(GPUS_PER_NODE, ranks)
    if cpus_per_node is None:
        cpus_per_node = (gpus or -(-ranks // (nodes or 1))) * each + SPARE_CPUS
    per_node = gpus or max(0, cpus_per_node - SPARE_CPUS) // each
    if not per_node:
        raise ConfigError(
            f"--cpus-per-node: {cpus_per_node} CPUs hold no rank of {each} CPUs (cluster.cpus_per_rank) beside the "
            f"{SPARE_CPUS} for Ray; give at least {each + SPARE_CPUS}"
        )
    needed = -(-ranks // per_node)
    if nodes is not None and nodes < needed:
        raise ConfigError(
            f"--nodes: {nodes} machines hold {nodes * per_node} ranks, parallelism asks for {ranks}; give {needed} or "
            f"lower parallelism.data to {max(1, nodes * per_node // config.parallelism.ranks_per_replica)}"
        )
    return Machines(nodes or needed, gpus, cpus_per_node, memory_gib or MEMORY_GIB_PER_RANK * per_node)


def check_visible(config: RunConfig, mount: str | None, reason: str) -> None:
    """Raise ConfigError naming the first path of the configuration that the machines of the cluster do not see.

    `mount` is a folder that they share, if there is one; `reason` says what they see.
    """
    places = [("run.storage", config.run.storage)]
    places += [(f"data.corpora.{corpus.name}.path", corpus.path) for corpus in config.data.corpora]
    places += [(f"data.corpora.{corpus.name}.held_out", corpus.held_out) for corpus in config.data.corpora]
    places += [("data.tokenizer.path", config.data.tokenizer.path)]
    places += [(f"evaluate.definitions.{task.name}.path", task.path) for task in config.evaluate.definitions]
    places += [("model.init_from", (config.model.init_from or "").removeprefix("hf:") or None)]
    for field, path in places:
        hub = field.endswith("held_out") and split_protocol(path or "")[0] is None and not (path or "").startswith("/")
        if path is None or hub or split_protocol(path)[0] not in (None, "file", "local"):
            continue
        if mount is None or not f"{path}/".startswith(f"{mount.rstrip('/')}/"):
            raise ConfigError(f"{field}: {path} lies on this machine; {reason}")
