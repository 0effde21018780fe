"""`telar submit` and `telar prepare`: from a configuration file to a Ray job, with nothing left when that fails."""

from __future__ import annotations

import getpass
import json
import os
import secrets
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster import local
from cluster.authentication import COOKIE, token_path
from cluster.environment import DASHBOARD_VARIABLE, JOB_ID_VARIABLE, ROOT, runtime_env
from cluster.inventory import check_capacity, check_storage_is_shared
from cluster.storage import Storage
from configs.errors import ConfigError, StorageError
from configs.load import apply_overrides, config_digest, load_config, parse_config, to_yaml
from configs.schema import RunConfig
from jobs.commands.addresses import given_address
from jobs.commands.paths import with_absolute_paths
from jobs.commands.resuming import check_resumable
from jobs.commands.runs import LEASE_SECONDS, TERMINAL, RunPlace, locate, state_of, storage_for
from jobs.ledger import STOP_REQUEST
from jobs.tasks.definitions import with_definitions
from jobs.trackers.base import check_installed
from jobs.trainable import check_trainable

if TYPE_CHECKING:
    from jobs.submit import Jobs

# Inputs up to this size are read through once before a job on this machine is submitted; larger ones by the job.
CHECKED_INPUT_BYTES = 64 * 2**20
# States in which nobody works on a run.
IDLE = (*TERMINAL, "silent", "submitted")
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Request:
    """What the command line asked for."""

    config: str | None
    overrides: Sequence[str] = ()
    resume: str | None = None
    storage: str | None = None
    address: str | None = None
    embedded: bool = False
    stage: str | None = None
    or_resume: bool = False
    entrypoint: str | None = field(default=None)


@dataclass(frozen=True)
class Submitted:
    """A job that a cluster has taken."""

    place: RunPlace
    job_id: str
    jobs: Jobs
    started_cluster: bool
    ray_command: str

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "run": self.place.name,
            "url": self.place.url,
            "job_id": self.job_id,
            "dashboard_url": self.jobs.address.url,
            "embedded": self.jobs.address.embedded,
            "started_cluster": self.started_cluster,
            "ray_command": self.ray_command,
        }

    def as_text(self) -> str:
        """For people: what was submitted, where to look and what to type next."""
        address, run = self.jobs.address, shlex.quote(_shortest_name(self.place))
        telar = command_name()
        login = ""
        if address.embedded:
            login = f"  (asks for a token, or set cookie {COOKIE}: cat {shlex.quote(str(token_path()))})"
        return (
            f"run        {self.place.name}\n"
            f"files      {self.place.url}\n"
            f"job        {self.job_id}\n"
            f"dashboard  {address.url}/#/jobs/{self.job_id}{login}\n"
            f"the same with Ray's own command line:\n  {self.ray_command}\n"
            f"next:\n  {telar} watch {run}\n  {telar} logs -f {run}\n  {telar} stop {run}"
        )


def submit(request: Request, say: Callable[[str], None]) -> Submitted:
    """Check everything that can be checked, write RUN/config.yaml, submit; undo both when the job is not taken."""
    place, config, resumed = _resumed(request) if request.resume else _from_file(request)
    if request.stage != "prepare":
        check_trainable(config)
    given = given_address(request.address, config, request.embedded)
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"address": given[0] if given else None})}
    )
    if config.evaluate.lm_eval:
        from jobs.harness import check_harness

        check_harness(config, "this machine" if given is None else None)
    probe_storage(place.storage)
    cluster = None
    if given is None:
        check_embedded_capacity(config)
        check_installed(config, "this machine")
        cluster = local.start(config.cluster)
        if cluster.started_by_us:
            say(f"started the embedded cluster: {cluster.dashboard_url}, {cluster.logical_cpus} logical CPUs")
    try:
        jobs = _connect(given, cluster)
        nodes = jobs.nodes()
        where = "the embedded cluster" if cluster else f"the cluster at {jobs.address.url}"
        check_capacity(config, nodes, where, embedded=cluster is not None)
        check_storage_is_shared(config, nodes, place.storage.is_local, embedded=cluster is not None)
        if resumed:
            _refuse_running(jobs, place, LEASE_SECONDS if request.or_resume else 0.0)
        with _written(place, config, resumed):
            job_id, ray_command = _send(request, place, config, jobs)
    except BaseException:
        if cluster is not None and cluster.started_by_us:
            local.stop()
        raise
    return Submitted(place, job_id, jobs, cluster is not None and cluster.started_by_us, ray_command)


def _connect(given: tuple[str, str] | None, cluster: local.LocalCluster | None) -> Jobs:
    from jobs.submit import Address, Jobs

    if cluster is not None:
        return Jobs(Address(cluster.dashboard_url, "the embedded cluster", embedded=True))
    assert given is not None
    return Jobs(Address(*given))


def _from_file(request: Request) -> tuple[RunPlace, RunConfig, bool]:
    """The run of a configuration file, and whether it exists: an error, unless it is to be resumed then."""
    if request.config is None:
        raise ConfigError("CONFIG: name a configuration file, or continue a run with --resume RUN")
    config = load_config(request.config, request.overrides)
    storage = storage_for(request.storage, config)
    if request.or_resume and not config.run.name:
        raise ConfigError("--or-resume: the run needs a name to be found by; set run.name")
    name = config.run.name or f"{Path(request.config).stem}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    if name == "data":
        raise ConfigError("run.name: 'data' is where prepared data lies in every storage; choose another name")
    exists = storage.exists(name)
    if exists and not (request.or_resume and storage.exists(f"{name}/config.yaml")):
        raise ConfigError(
            f"run.name: run {name!r} exists in {storage.url}; choose another name, or continue it with "
            f"`telar submit --resume {name}`"
        )
    embedded = _is_embedded(request, config)
    run = config.run.model_copy(update={"name": name, "storage": storage.url})
    config = with_absolute_paths(config.model_copy(update={"run": run}), request.config, check=embedded)
    place = RunPlace(storage, name)
    if exists:
        check_resumable(parse_config(_stored(place), f"{place.url}/config.yaml"), config, place)
    elif embedded:
        from data.inputs import check_readable
        from jobs.commands.task_listing import check_tasks

        check_readable(config, CHECKED_INPUT_BYTES)
        check_tasks(config, CHECKED_INPUT_BYTES)
    return place, config, exists


def _resumed(request: Request) -> tuple[RunPlace, RunConfig, bool]:
    if request.config is not None:
        raise ConfigError(
            "CONFIG: --resume continues with the run's stored configuration; leave CONFIG out and change fields with "
            "--set"
        )
    place = locate(request.resume or "", request.storage)
    tree, origin = _stored(place), f"{place.url}/config.yaml"
    old = parse_config(tree, origin)
    new = parse_config(apply_overrides(tree, request.overrides), origin)
    # Read again as a whole, since tasks that were named are compared with others only when all are known.
    new = parse_config(json.loads(with_definitions(new, None).model_dump_json()), origin)
    check_resumable(old, new, place)
    if new.evaluate.definitions != old.evaluate.definitions and _is_embedded(request, new):
        from jobs.commands.task_listing import check_tasks

        check_tasks(new, CHECKED_INPUT_BYTES)
    return place, new, True


def _is_embedded(request: Request, config: RunConfig) -> bool:
    return given_address(request.address, config, request.embedded) is None


def _stored(place: RunPlace) -> dict[str, Any]:
    return yaml.safe_load(place.storage.read_text(f"{place.name}/config.yaml"))


def _refuse_running(jobs: Jobs, place: RunPlace, patience_seconds: float) -> None:
    """Raise ConfigError while the run's job or, its job lost, its controller still works on it.

    A run that this cluster knows no job of may be one of a cluster that has just been lost: for `patience_seconds` its
    controller is given time to show that it lives.
    """
    details = jobs.of_run(place.url)
    deadline = time.monotonic() + patience_seconds
    while details is None and state_of(place.status()) not in IDLE and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    state = state_of(place.status())
    job_runs = details is not None and not details.status.is_terminal()
    if job_runs or state not in IDLE:
        job = f"job {details.submission_id}, " if details is not None else ""
        raise ConfigError(
            f"--resume: run {place.name!r} is going on ({job}{state}); follow it with `telar watch {place.name}` or "
            "stop it first"
        )


def check_embedded_capacity(config: RunConfig) -> None:
    """Raise ConfigError when an embedded cluster of `cluster.local_cpus` could not hold the ranks."""
    each, have = config.cluster.cpus_per_rank, config.cluster.local_cpus
    ranks = config.min_replicas * config.parallelism.ranks_per_replica
    if config.cluster.device == "cpu" and ranks * each > have:
        raise ConfigError(
            f"cluster.local_cpus: {ranks} ranks x {each} CPUs need {ranks * each} logical CPUs, the embedded cluster "
            f"has {have}; set cluster.local_cpus to {ranks * each} or parallelism.data to "
            f"{max(1, have // (each * config.parallelism.ranks_per_replica))}"
        )


def probe_storage(storage: Storage) -> None:
    """Write and remove a small object; raises StorageError naming run.storage and the path when that fails."""
    name = f"telar-probe-{uuid.uuid4().hex}"
    new_folder = Path(storage.url) if storage.is_local and not Path(storage.url).exists() else None
    try:
        storage.write_bytes(name, b"probe")
        storage.remove(name)
        if new_folder is not None:
            new_folder.rmdir()
    except (StorageError, OSError) as error:
        raise StorageError(
            f"run.storage: {storage.url} cannot be written: {error.__cause__ or error}; choose a folder or URL that "
            "you may write with --storage, TELAR_STORAGE or run.storage"
        ) from error


@contextmanager
def _written(place: RunPlace, config: RunConfig, resumed: bool) -> Iterator[None]:
    """Write the run's config.yaml; put everything back as it was when the block fails.

    A resumed run loses its old status, job record and stop request: nobody shall take its last job's outcome for the
    new one's.
    """
    storage, path = place.storage, f"{place.name}/config.yaml"
    if not resumed:
        if not storage.create(path, to_yaml(config).encode()):
            raise ConfigError(
                f"run.name: run {place.name!r} has just been created by another command; choose another name"
            )
        try:
            yield
        except BaseException:
            storage.remove(place.name)
            raise
        return
    kept = {path: storage.read_text(path)}
    outcome = [f"{place.name}/status.json", f"{place.name}/job.json"]
    kept.update({name: storage.read_text(name) for name in outcome if storage.exists(name)})
    try:
        storage.remove(f"{place.name}/{STOP_REQUEST}")
        for name in outcome:
            storage.remove(name)
        storage.write_text(path, to_yaml(config))
        yield
    except BaseException:
        for name, text in kept.items():
            storage.write_text(name, text)
        raise


def _send(request: Request, place: RunPlace, config: RunConfig, jobs: Jobs) -> tuple[str, str]:
    python = shlex.quote(sys.executable) if jobs.address.embedded else "python"
    entrypoint = request.entrypoint or f"{python} -m jobs.run {shlex.quote(place.url)}"
    if request.stage:
        entrypoint += f" --stage {request.stage}"
    environment = runtime_env(config)
    metadata = {
        "run": place.name,
        "kind": request.stage or "run",
        "config_digest": config_digest(config),
        "user": _user(),
        "url": place.url,
    }
    job_id = f"{place.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    identity = {JOB_ID_VARIABLE: job_id, DASHBOARD_VARIABLE: jobs.address.url}
    sent = {**environment, "env_vars": {**environment["env_vars"], **identity}}
    jobs.submit(entrypoint, sent, metadata, job_id)
    return job_id, _ray_command(jobs, entrypoint, environment, metadata)


def _ray_command(jobs: Jobs, entrypoint: str, environment: dict, metadata: dict[str, str]) -> str:
    """The `ray job submit` line that submits the same job, ready for a shell."""
    ray = Path(sys.executable).with_name("ray")
    words = [f"RAY_API_SERVER_ADDRESS={shlex.quote(jobs.address.url)}"]
    if jobs.address.embedded:
        words += ["RAY_AUTH_MODE=token", f"RAY_AUTH_TOKEN_PATH={shlex.quote(str(token_path()))}"]
    words += [shlex.quote(str(ray)) if ray.exists() else "ray", "job", "submit"]
    words += ["--working-dir", shlex.quote(str(ROOT))]
    words += ["--runtime-env-json", shlex.quote(json.dumps({"env_vars": environment["env_vars"]}))]
    words += ["--metadata-json", shlex.quote(json.dumps(metadata)), "--", entrypoint]
    return " ".join(words)


def command_name() -> str:
    """How this `telar` is typed in the current folder: its name where PATH has it, else its path."""
    if shutil.which("telar"):
        return "telar"
    path = Path(sys.executable).with_name("telar")
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


def _shortest_name(place: RunPlace) -> str:
    """The run's name where the commands find it without --storage, else its URL."""
    return place.name if storage_for(None).url == place.storage.url else place.url


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
