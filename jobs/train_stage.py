"""The train stage on a Ray cluster: carries out what `jobs.recovery` decides, and writes it down with its reasons."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, deque
from dataclasses import asdict
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import commit
from cluster.nodes import draining_nodes, living_nodes
from cluster.placement import RankResources, rank_resources, release_left
from cluster.storage import Storage
from configs.errors import CapacityError, RunStopped, StorageError, TelarError
from configs.schema import RunConfig
from data.manifest import Manifest
from data.opener import cache_advice
from data.shard_server import Servers, start_servers, stop_servers
from jobs import recovery
from jobs.attempt import Attempt
from jobs.crew import Crew, NotReady
from jobs.ledger import Ledger
from jobs.rank import RankTask
from jobs.vault import Snapshot
from jobs.vaults import Vaults, unwritten
from model.operators import prepare_operators

POLL_SECONDS = 0.2
# Opening the store at which ranks meet; a machine with more work than cores has taken longer than for an answer.
STORE_SECONDS = 60.0
SURVEY_SECONDS = 1.0
# What the survey counted as free is reserved at once, unless someone else was faster.
RESERVE_SECONDS = 10.0
# Importing everything for a standby takes CPU time from the ranks: not while they get going, not for a short run.
STANDBY_AFTER_SECONDS = 15.0


class AttemptFailed(TelarError):
    """An attempt ended with an error on some rank."""


class TrainStage:
    """Trains one run. `stop` may be called from another thread."""

    def __init__(
        self,
        config: RunConfig,
        storage: Storage,
        run: str,
        manifest: Manifest,
        ledger: Ledger,
        controller: Any,
        takes_over: bool = False,
    ) -> None:
        """`takes_over`: the controller's process died in this stage, and what it left in memory may be used."""
        self._config, self._storage, self._run, self._manifest = config, storage, run, manifest
        self._ledger, self._controller, self._takes_over = ledger, controller, takes_over
        self._stopping = threading.Event()
        self._rules = recovery.Rules(
            last_step=config.train.steps,
            min_replicas=config.min_replicas,
            max_replicas=config.max_replicas,
            max_restarts=config.elastic.max_restarts,
            wait_seconds=config.elastic.start_timeout_seconds,
            grow_seconds=config.elastic.grow_seconds,
        )
        self._operators: dict[str, str] = {}
        self._servers: Servers | None = None
        self._attempt: Attempt | None = None
        self._vaults = Vaults(run)
        self._memory: Snapshot | None = None
        # Nodes that live, and those of them that are not being drained.
        self._living: set[str] = set()
        self._staying: set[str] = set()
        self._surveyed_at = -SURVEY_SECONDS
        self._heard_step: tuple[int, int] = (0, 0)
        self._heard_at = self._training_since = 0.0
        # When the last failure was noticed and what it cost, until a step is done again.
        self._trouble: dict[str, Any] | None = None
        self._error: TelarError | None = None
        # Damaged commits that were passed over and said.
        self._told: set[str] = set()

    def is_done(self) -> bool:
        """Whether the last step of the run is committed."""
        latest, _ = commit.latest(self._ledger.checkpoints)
        return latest is not None and latest.step >= self._config.train.steps

    def stop(self) -> None:
        """Ask all ranks to commit and leave."""
        self._stopping.set()

    def run(self) -> None:
        """Train to the last step.

        Raises RunStopped after a requested stop, AttemptFailed when restarts are used up, CapacityError when there is
        no room, and what a rank raised that it would raise again.
        """
        resources = self._resources()
        self._crew = Crew(self._config, resources, self._operator_mode)
        self._on_gpus = bool(resources.gpus)
        state = recovery.begin(time.monotonic(), self._committed())
        # Ray ends the processes of a controller that died, but keeps what it had reserved for the one that follows.
        release_left(f"{self._run}/attempt-")
        if self._takes_over:
            self._vaults.take_over(living_nodes(), self._ledger.next_attempt())
        else:
            self._vaults.remove_left()
        try:
            while not state.over:
                events = deque(self._events(state))
                while events:
                    state, decisions = recovery.decide(self._rules, state, events.popleft())
                    for decision in decisions:
                        events.extend(self._carry_out(decision, state))
        finally:
            self._crew.close()
            self._vaults.close()
            stop_servers(self._servers)

    def _resources(self) -> RankResources:
        """What a rank takes; raises CapacityError when the cluster has not enough of it for the fewest replicas.

        After a loss of the controller nodes may be missing, too: the device stays what it was, and room is waited for.
        """
        config, totals = self._config, ray.cluster_resources()
        if self._takes_over and (device := self._ledger.status.get("device")):
            config = config.model_copy(update={"cluster": config.cluster.model_copy(update={"device": device})})
            totals = dict.fromkeys(totals.keys() | {"CPU", "GPU"}, sys.maxsize)
        resources = rank_resources(config, totals)
        self._ledger.update(device="cuda" if resources.gpus else "cpu")
        return resources

    def _events(self, state: recovery.RunState) -> list[recovery.Event]:
        at, found = time.monotonic(), []
        if self._stopping.is_set() and state.stop_reason is None:
            found.append(recovery.StopRequested(at, "stopped on request"))
        if self._attempt is None:
            self._look_around()
            self._memory = self._vaults.newest(self._living)
            remembered = self._memory.step if self._memory is not None else 0
            self._crew.release_lost(self._staying)
            room = self._crew.room(self._staying)
            try:
                found.append(recovery.Survey(at, room, self._committed(), remembered))
            except (StorageError, OSError) as error:
                # What is committed decides from where to go on: not before storage says so.
                self._ledger.say(f"storage does not answer: {error}")
                time.sleep(SURVEY_SECONDS)
            if room < self._rules.min_replicas:
                self._stopping.wait(SURVEY_SECONDS)
            return found
        if at - self._surveyed_at >= SURVEY_SECONDS:
            self._surveyed_at = at
            self._look_around()
            leaving = sorted((self._attempt.nodes & self._living) - self._staying)
            named = ", ".join(f"node {node[:8]}" for node in leaving)
            found.append(recovery.Survey(at, self._crew.room(self._staying), leaving=named))
            if self._training_since and at - self._training_since > STANDBY_AFTER_SECONDS:
                self._crew.stand_by(f"{self._run}/attempt-{self._attempt.number}")
        found += self._attempt.poll(self._living, POLL_SECONDS)
        status = self._ledger.status
        heard = (status["attempt"], status["step"])
        if heard != self._heard_step and heard[0] == self._attempt.number and heard[1] > state.from_step:
            found.insert(0, recovery.Stepped(at, self._attempt.serial, heard[1]))
            self._on_step(heard)
        return found

    def _look_around(self) -> None:
        self._living = living_nodes()
        self._staying = self._living - draining_nodes()

    def _on_step(self, heard: tuple[int, int]) -> None:
        at, (attempt, step) = time.monotonic(), heard
        if attempt != self._heard_step[0]:
            self._training_since = at
        else:
            self._attempt.step_took((at - self._heard_at) / (step - self._heard_step[1]))
        self._heard_step, self._heard_at = heard, at
        slowest = self._attempt.slowest()
        self._ledger.status["slowest_rank"] = slowest and {"rank": slowest[0], "data_wait_seconds": slowest[1]}
        if self._trouble is not None:
            noticed, facts = self._trouble.pop("noticed"), self._trouble
            self._ledger.event("recovered", attempt=attempt, recovered_seconds=round(at - noticed, 3), **facts)
            self._trouble = None

    def _carry_out(self, decision: recovery.Decision, state: recovery.RunState) -> list[recovery.Event]:
        """Do it; returns what came of it at once."""
        name = type(decision).__name__.lower()
        self._ledger.event("decision", decision=name, **self._facts(decision))
        if isinstance(decision, recovery.Start):
            return self._start(decision)
        if isinstance(decision, recovery.Commit):
            self._ledger.say(decision.reason)
            if self._attempt is not None:
                self._attempt.ask_to_leave()
        elif isinstance(decision, recovery.Clear):
            return self._clear(decision, state.failure)
        elif isinstance(decision, recovery.Discard):
            self._discard(decision)
        elif isinstance(decision, recovery.Preserve):
            self._preserve(decision)
        elif isinstance(decision, recovery.Stop):
            committed = f"after step {decision.step}; its state is committed" if decision.step else "before training"
            raise RunStopped(f"stopped on request {committed}")
        elif isinstance(decision, recovery.Fail):
            raise self._failure(decision)
        return []

    def _preserve(self, decision: recovery.Preserve) -> None:
        """Commit the newest snapshot as an attempt of its own; the next survey shows whether that worked."""
        snapshot, ledger = self._memory, self._ledger
        if snapshot is None or snapshot.step != decision.step:
            return
        ledger.say(decision.reason)
        try:
            number = ledger.begin_attempt()
            self._vaults.write(snapshot, ledger.checkpoints.url, number)
        except (StorageError, OSError) as error:
            ledger.event("commit_failed", step=snapshot.step, detail=str(error))
            ledger.say(f"the snapshot of step {snapshot.step} was not committed: {error}")
            return
        ledger.complete(unwritten(snapshot))
        for part in snapshot.parts:
            ledger.record_rank_file(snapshot.step, number, part.file, part.world_size, snapshot.extra())

    def _discard(self, decision: recovery.Discard) -> None:
        """Damage that shows only when the bytes are read: fall back to what is older."""
        if decision.source == "memory":
            self._vaults.forget(decision.step)
            self._ledger.event("snapshot_damaged", step=decision.step, detail=decision.reason)
            self._ledger.say(f"{decision.reason}\nfalling back from the snapshot of step {decision.step} in memory")
            return
        commit.withdraw(self._ledger.checkpoints, decision.step)
        self._ledger.event("checkpoint_damaged", step=decision.step, detail=decision.reason)
        self._ledger.say(f"{decision.reason}\nfalling back to the commit before step {decision.step}")

    def _facts(self, decision: recovery.Decision) -> dict[str, Any]:
        """What events.jsonl holds of a decision; attempts have the numbers of the run there."""
        facts = asdict(decision)
        facts.pop("attempt", None)
        if self._attempt is not None:
            facts["attempt"] = self._attempt.number
        return facts

    def _failure(self, decision: recovery.Fail) -> TelarError:
        if decision.cause == "fatal" and self._error is not None:
            return self._error
        if decision.cause == "room":
            return CapacityError(
                f"elastic.start_timeout_seconds: {decision.reason} (free now: {ray.available_resources()}); stop other "
                "work on the cluster, add nodes, or lower parallelism.data or elastic.min_replicas"
            )
        return AttemptFailed(decision.reason)

    def _committed(self) -> int:
        latest, damaged = commit.latest(self._ledger.checkpoints)
        for message in damaged:
            if message not in self._told:
                self._told.add(message)
                self._ledger.event("checkpoint_damaged", detail=message)
                self._ledger.say(message)
        return latest.step if latest is not None else 0

    def _operator_mode(self) -> str:
        return next(iter(self._operators.values()))

    def _build_operators(self) -> None:
        """Build DeepSpeed's JIT operators once on each node, before any worker starts there."""
        environment = {} if self._on_gpus else {"DS_ACCELERATOR": "cpu"}
        build = ray.remote(num_cpus=0, max_retries=0, runtime_env={"env_vars": environment})(prepare_operators)
        nodes = sorted(self._staying - self._operators.keys())
        strategies = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        outcomes = ray.get([build.options(scheduling_strategy=strategy).remote() for strategy in strategies])
        for message in dict.fromkeys(outcome.message for outcome in outcomes):
            self._ledger.say(message)
        self._operators |= {node: outcome.mode for node, outcome in zip(nodes, outcomes, strict=True)}

    def _start(self, decision: recovery.Start) -> list[recovery.Event]:
        """Get the ranks of an attempt going; returns a failure if that does not work."""
        config = self._config
        try:
            number = self._ledger.begin_attempt()
            if decision.source == "memory":
                self._ledger.complete(unwritten(self._memory))
        except (StorageError, OSError) as error:
            return [recovery.Failed(time.monotonic(), decision.attempt, str(error))]
        label, world_size = f"{self._run}/attempt-{number}", decision.replicas * config.parallelism.ranks_per_replica
        self._ledger.event(
            "attempt_started", attempt=number, world_size=world_size, from_step=decision.step, reason=decision.reason
        )
        self._ledger.update(
            attempt=number,
            world_size=world_size,
            state="training",
            step=decision.step,
            last_commit_step=self._committed() or None,
        )
        if decision.change != "first":
            self._ledger.say(f"{decision.reason}: {decision.replicas} replicas go on from step {decision.step}")
        advice = cache_advice(self._storage, self._manifest, config.data) if decision.change == "first" else None
        if advice is not None:
            self._ledger.say(advice)
        try:
            self._build_operators()
            self._crew.assemble(decision.replicas, self._staying, label, RESERVE_SECONDS)
            self._serve_shards(label)
            self._crew.wait_until_ready(config.elastic.start_timeout_seconds)
            self._attempt = self._launch(decision, number, world_size)
        except CapacityError as error:
            return [recovery.Failed(time.monotonic(), decision.attempt, str(error), "room")]
        except (NotReady, ray.exceptions.RayError) as error:
            return [recovery.Failed(time.monotonic(), decision.attempt, str(error))]
        self._ledger.say(f"attempt {number}: {world_size} ranks train from step {decision.step}")
        return [recovery.Launched(time.monotonic(), decision.attempt)]

    def _serve_shards(self, label: str) -> None:
        """Shard servers on all nodes that hold a rank; those that run already are kept."""
        if self._servers is not None:
            for node in set(self._servers.by_node) - self._living:
                ray.kill(self._servers.by_node.pop(node))
            if self._crew.nodes <= set(self._servers.by_node):
                return
            stop_servers(self._servers)
            self._servers = None
        leaving = self._living - self._staying
        self._servers = start_servers(self._config, self._storage, self._manifest, label, leaving=leaving)

    def _launch(self, decision: recovery.Start, number: int, world_size: int) -> Attempt:
        processes = self._crew.processes
        if self._config.elastic.snapshot_every:
            self._vaults.begin(number, self._crew.nodes)
        first = processes[0]
        master = (first.place.address, ray.get(first.actor.open_store.remote(), timeout=STORE_SECONDS))
        seen: Counter[str] = Counter()
        calls = []
        for rank, process in enumerate(processes):
            task = RankTask(
                config=self._config,
                storage_url=self._storage.url,
                run=self._run,
                data_folder=self._manifest.folder,
                attempt=number,
                rank=rank,
                world_size=world_size,
                resume_step=decision.step or None,
                memory=self._memory if decision.source == "memory" else None,
            )
            local_rank = 0 if self._on_gpus else seen[process.node]
            seen[process.node] += 1
            given = (task, master, local_rank, self._controller, self._servers)
            calls.append(process.actor.train.remote(*given, self._vaults.by_node.get(process.node)))
        places = [process.place for process in processes]
        self._ledger.event(
            "ranks_started",
            attempt=number,
            pids=[place.pid for place in places],
            nodes=[place.node for place in places],
        )
        return Attempt(self._config, decision.attempt, number, processes, calls)

    def _clear(self, decision: recovery.Clear, failure: recovery.Failed | None) -> list[recovery.Event]:
        """Nothing of the attempt may train on; processes that left by themselves stay for the next one."""
        attempt, started = self._attempt, time.monotonic()
        self._attempt, self._training_since = None, 0.0
        self._look_around()
        if failure is not None:
            self._note(failure, attempt)
        if attempt is None:
            # Where there was no room for more, those that there are can train.
            if failure is None or failure.kind != "room":
                self._crew.dismiss(self._crew.manned)
        else:
            self._error = attempt.fatal
            leaving = attempt.remains(self._living)
            # Processes are used again only where they have shown that they can train.
            self._crew.dismiss(leaving if attempt.trained and not self._on_gpus else self._crew.manned)
        self._ledger.event("cleared", seconds=round(time.monotonic() - started, 3))
        return [recovery.Cleared(time.monotonic(), decision.attempt)]

    def _note(self, failure: recovery.Failed, attempt: Attempt | None) -> None:
        """Write down what failed, and where a hung attempt stands, before it is ended."""
        step = self._ledger.status["step"]
        if attempt is not None:
            for rank, text in attempt.stacks(self._living).items():
                self._ledger.event("stack", attempt=attempt.number, rank=rank, text=text)
        if failure.kind != "damaged":
            self._ledger.event("attempt_failed", attempt=self._ledger.status["attempt"], detail=failure.reason)
            self._ledger.say(failure.reason)
        detected = round(max(0.0, failure.at - self._heard_at), 3) if self._heard_at else None
        self._trouble = {"noticed": failure.at, "detected_seconds": detected, "failed_at_step": step}
