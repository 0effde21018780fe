"""`telar deploy`: from a configuration file to what KubeRay, Slurm or `ray up` takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.authentication import make_token
from cluster.deploy import kuberay, ray_up, slurm
from cluster.deploy.order import Order, check_visible, machines_for
from cluster.environment import ROOT
from configs.errors import ConfigError
from configs.load import load_config
from configs.schema import RunConfig
from jobs.commands.paths import with_absolute_paths
from jobs.commands.runs import storage_url_for
from jobs.trainable import check_trainable


@dataclass(frozen=True)
class Target:
    """The options of the command line."""

    system: str
    nodes: int | None = None
    gpus_per_node: int | None = None
    cpus_per_node: int | None = None
    memory_gib: int | None = None
    image: str | None = None
    claim: str | None = None
    gcs_storage: str = kuberay.ROCKSDB
    shared: str | None = None
    limit: str = "24:00:00"
    hosts: str | None = None
    region: str | None = None
    instance_type: str | None = None
    user: str = "ubuntu"


def manifest(file: str, overrides: Sequence[str], storage_option: str | None, target: Target) -> str:
    """The text; raises ConfigError naming the field or option that does not fit the system."""
    config = _resolved(file, overrides, storage_option)
    machines = machines_for(config, target.nodes, target.gpus_per_node, target.cpus_per_node, target.memory_gib)
    order = Order(config, machines)
    if target.system == "kuberay":
        return _kuberay(order, target)
    if target.system == "slurm":
        return _slurm(order, Path(file).absolute(), overrides, target)
    return _ray_up(order, target)


def _resolved(file: str, overrides: Sequence[str], storage_option: str | None) -> RunConfig:
    """The configuration with a name that later jobs find it by, absolute paths and no cluster of its own."""
    config = load_config(file, overrides)
    check_trainable(config)
    run = {"name": config.run.name or Path(file).stem, "storage": storage_url_for(storage_option, config)}
    cluster = config.cluster.model_copy(update={"address": None})
    config = config.model_copy(update={"run": config.run.model_copy(update=run), "cluster": cluster})
    return with_absolute_paths(config, file, check=False)


def _shared(order: Order) -> Order:
    """The same with a folder that is one on all machines said to be one."""
    cluster = order.config.cluster.model_copy(update={"shared_filesystem": True})
    return Order(order.config.model_copy(update={"cluster": cluster}), order.machines)


def _kuberay(order: Order, target: Target) -> str:
    if target.image is None:
        raise ConfigError("--image: name a container image with Telar installed; README.md says how to build one")
    mount = kuberay.MOUNT if target.claim else None
    check_visible(
        order.config, mount, f"pods see object stores (s3://, gs://) and, with --claim, what lies below {kuberay.MOUNT}"
    )
    return kuberay.manifest(_shared(order) if mount else order, target.image, target.claim, target.gcs_storage)


def _slurm(order: Order, file: Path, overrides: Sequence[str], target: Target) -> str:
    if target.shared is None:
        raise ConfigError(f"--shared: all machines must see {ROOT} and {file}; name the folder that they share")
    for folder in (ROOT, file):
        if not folder.is_relative_to(target.shared):
            raise ConfigError(f"--shared: {folder} does not lie below {target.shared}, and all machines must see it")
    check_visible(order.config, target.shared, f"the machines share what lies below {target.shared} (--shared)")
    return slurm.script(_shared(order), str(ROOT), str(file), overrides, target.limit)


def _ray_up(order: Order, target: Target) -> str:
    hosts = [host.strip() for host in target.hosts.split(",")] if target.hosts else []
    if not hosts and not (target.region and target.instance_type):
        raise ConfigError("--hosts: name machines that are there, or give --region and --instance-type for AWS")
    needed = order.machines.nodes + 1
    if hosts and len(hosts) < needed:
        raise ConfigError(
            f"--hosts: {len(hosts)} machines, {needed} are needed: one for the head and {needed - 1} with ranks"
        )
    check_visible(order.config, None, "the machines of `ray up` see object stores (s3://, gs://) only")
    token = str(make_token())
    return ray_up.manifest(order, str(ROOT), token, target.user, hosts, target.region, target.instance_type)
