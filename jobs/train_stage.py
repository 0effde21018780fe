"""The train stage on a Ray cluster: attempts of a worker group, each from the last commit, until done or given up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from cluster import commit
from cluster.placement import RankResources, RankSlot, rank_resources, rank_slots, release, reserve
from cluster.storage import Storage
from configs.errors import RunStopped, TelarError
from configs.schema import RunConfig
from data.manifest import Manifest
from data.opener import cache_advice
from data.shard_server import start_servers, stop_servers
from jobs.ledger import Ledger
from jobs.loop import LoopEnd
from jobs.rank import RankTask
from jobs.worker import TrainWorker
from model.operators import prepare_operators


class AttemptFailed(TelarError):
    """An attempt ended with an error on some rank."""


class TrainStage:
    """Trains one run. `stop` may be called from another thread."""

    def __init__(
        self, config: RunConfig, storage: Storage, run: str, manifest: Manifest, ledger: Ledger, controller: Any
    ) -> None:
        self._config, self._storage, self._run, self._manifest = config, storage, run, manifest
        self._ledger, self._controller = ledger, controller
        self._workers: list[Any] = []
        self._stopping = False
        self._start_step = 0

    def is_done(self) -> bool:
        """Whether the last step of the run is committed."""
        latest, _ = commit.latest(self._ledger.checkpoints)
        return latest is not None and latest.step >= self._config.train.steps

    def run(self) -> None:
        """Train to the last step; raises RunStopped after a requested stop, AttemptFailed when restarts are used up."""
        resources = rank_resources(self._config, ray.cluster_resources())
        operators = self._build_operators(resources)
        restarts = 0
        while True:
            try:
                end = self._attempt(resources, operators)
                self._check_committed(end)
            except commit.DamagedCheckpoint as error:
                # Damage that shows only when the files are read: fall back to the commit before.
                commit.withdraw(self._ledger.checkpoints, self._start_step)
                self._ledger.event("checkpoint_damaged", step=self._start_step, detail=str(error))
                self._ledger.say(f"{error}\nfalling back to the commit before step {self._start_step}")
                continue
            except (AttemptFailed, ray.exceptions.RayError) as error:
                self._ledger.event("attempt_failed", attempt=self._ledger.status["attempt"], detail=str(error))
                if self._stopping or restarts >= self._config.elastic.max_restarts:
                    raise AttemptFailed(str(error)) from error
                restarts += 1
                self._ledger.say(f"{error}\nrestart {restarts} of {self._config.elastic.max_restarts}")
                continue
            if end.stopped:
                raise RunStopped(f"stopped on request after step {end.step}; its state is committed")
            return

    def _check_committed(self, end: LoopEnd) -> None:
        latest, _ = commit.latest(self._ledger.checkpoints)
        if latest is None or latest.step < end.step:
            found = f"the latest commit is step {latest.step}" if latest else "nothing is committed"
            raise AttemptFailed(f"training reached step {end.step}, but {found}; events.jsonl says why")

    def stop(self) -> None:
        """Ask all ranks to commit and leave."""
        self._stopping = True
        for worker in self._workers:
            worker.request_stop.remote()

    def _build_operators(self, resources: RankResources) -> str:
        """Build DeepSpeed's JIT operators once on each node, before any worker starts."""
        environment = {} if resources.gpus else {"DS_ACCELERATOR": "cpu"}
        build = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": environment})(prepare_operators)
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        outcomes = ray.get([build.options(scheduling_strategy=strategy).remote() for strategy in strategies])
        for message in dict.fromkeys(outcome.message for outcome in outcomes):
            self._ledger.say(message)
        return outcomes[0].mode

    def _attempt(self, resources: RankResources, operators: str) -> LoopEnd:
        config, world_size = self._config, self._config.parallelism.ranks
        attempt = self._ledger.begin_attempt()
        latest, damaged = commit.latest(self._ledger.checkpoints)
        for message in damaged:
            self._ledger.event("checkpoint_damaged", detail=message)
            self._ledger.say(message)
        advice = cache_advice(self._storage, self._manifest, config.data)
        if advice is not None:
            self._ledger.say(advice)
        label = f"{self._run}/attempt-{attempt}"
        start = self._start_step = latest.step if latest else 0
        self._ledger.event("attempt_started", attempt=attempt, world_size=world_size, from_step=start)
        self._ledger.update(
            attempt=attempt, world_size=world_size, state="training", step=start, last_commit_step=start or None
        )
        timeout = config.elastic.start_timeout_seconds
        groups = reserve(resources, config.parallelism.data, config.parallelism, label, timeout)
        servers = None
        try:
            servers = start_servers(config, self._storage, self._manifest, label)
            slots = rank_slots(groups, config.parallelism, label)
            self._workers = [self._spawn(resources, slot) for slot in slots]
            places = self._wait([worker.prepare.remote(operators) for worker in self._workers], timeout)
            master = (places[0]["address"], places[0]["port"])
            seen: Counter[str] = Counter()
            running = []
            for rank, (worker, place) in enumerate(zip(self._workers, places, strict=True)):
                task = RankTask(
                    config=config,
                    storage_url=self._storage.url,
                    run=self._run,
                    data_folder=self._manifest.folder,
                    attempt=attempt,
                    rank=rank,
                    world_size=world_size,
                    resume_step=latest.step if latest else None,
                )
                local_rank = 0 if resources.gpus else seen[place["node"]]
                seen[place["node"]] += 1
                running.append(worker.train.remote(task, master, local_rank, self._controller, servers))
            pids = [place["pid"] for place in places]
            self._ledger.event("ranks_started", attempt=attempt, pids=pids, nodes=[place["node"] for place in places])
            self._ledger.say(f"attempt {attempt}: {world_size} ranks train from step {start}")
            if self._stopping:
                self.stop()
            return self._wait(running, None)[0]
        finally:
            for worker in self._workers:
                ray.kill(worker)
            self._workers = []
            stop_servers(servers)
            release(groups)

    def _spawn(self, resources: RankResources, slot: RankSlot) -> Any:
        threads = str(self._config.train.threads_per_rank)
        environment = {"OMP_NUM_THREADS": threads}
        if not resources.gpus:
            environment["DS_ACCELERATOR"] = "cpu"
        return TrainWorker.options(
            name=slot.name,
            namespace="telar",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(slot.group, placement_group_bundle_index=slot.bundle),
            runtime_env={"env_vars": {"OMP_NUM_THREADS": threads}},
        ).remote(environment)

    def _wait(self, references: list[Any], timeout_seconds: float | None) -> list[Any]:
        """Results of all ranks; the first rank that fails ends the wait, and its traceback leads the error."""
        waiting = list(references)
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1, timeout=timeout_seconds)
            if not done:
                raise AttemptFailed(
                    f"rank {references.index(waiting[0])} did not start within {timeout_seconds} s "
                    "(elastic.start_timeout_seconds)"
                )
            try:
                ray.get(done[0])
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, TelarError):
                    raise cause from error
                rank = references.index(done[0])
                raise AttemptFailed(f"rank {rank} failed first: {error}") from error
        return ray.get(references)
