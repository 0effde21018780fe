"""The controller, a node's raylet or storage fail, a node is drained, a stop comes while a run recovers.

Real processes on a cluster of three nodes; every run is compared with one that nothing happened to.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from cluster import commit
from tests.elastic_cluster import ElasticCluster
from tests.test_elastic import AT_THE_END, BATCH, EVERY, STEPS, TRAIN, check_same_course, reasons, redone, starts

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = ElasticCluster(tmp_path_factory.mktemp("faults"), nodes=3)
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def undisturbed(cluster):
    run = cluster.submit("undisturbed", train=TRAIN, checkpoint=EVERY)
    assert run.end() == "finished"
    return {step: loss for step, (loss,) in run.losses().items()}, run.samples(STEPS, BATCH)


def print_recovery(run, attempt, since, event="attempt_failed"):
    """Prints the seconds from `since` (Unix) until it was noticed, and until the first step of the attempt was done."""
    noticed = run.events(event)[0]["unix_seconds"] - since
    first = min(record["unix_seconds"] for record in run.lines("metrics.jsonl") if record["attempt"] == attempt)
    print(f"\n{run.folder.url}: noticed after {noticed:.1f} s, next step after {first - since:.1f} s")


@pytest.mark.parametrize("snapshots", [1, 0])
def test_the_controller_is_killed_and_the_run_goes_on_by_itself(cluster, undisturbed, snapshots):
    name = f"controller-{snapshots}"
    checkpoint = AT_THE_END if snapshots else EVERY
    run = cluster.submit(name, train=TRAIN, checkpoint=checkpoint, elastic={"snapshot_every": snapshots})
    run.wait_for_step(25)
    before, (pid, place), killed = [pid for pid, _ in run.ranks()], run.controller_place(), time.time()
    assert place not in [node.node_id for node in cluster.nodes], "the controller is not on the head"
    os.kill(pid, signal.SIGKILL)
    # The ranks train on, and may not end the run before the new controller is there.
    run.kill(0, signal.SIGSTOP)
    run.wait_for(lambda: run.events("controller_restarted"), "the controller's return")
    # It may be dead by now: the new controller ends what the old one has left.
    with suppress(ProcessLookupError):
        os.kill(before[0], signal.SIGCONT)
    run.wait_for(lambda: len(starts(run)) == 2, "the next attempt")
    assert run.controller_place()[0] != pid
    assert run.end() == "finished"
    check_same_course(run, undisturbed, exact=True)
    (restarted,) = run.events("controller_restarted")
    assert restarted["restart"] == 1 and restarted["step"] >= 25
    assert starts(run)[1]["source"] == ("memory" if snapshots else "storage")
    assert redone(run) <= (1 if snapshots else EVERY["every_steps"])
    print_recovery(run, 2, killed, "controller_restarted")
    assert not [pid for pid in before if psutil.pid_exists(pid)], "the old attempt's ranks live on"
    assert not left_behind(cluster, name)


def left_behind(cluster, name, seconds=60):
    """Actors and reservations of a run that is over; Ray takes a moment to end what was killed."""
    deadline = time.monotonic() + seconds
    while True:
        groups = cluster.ray.util.placement_group_table().values()
        found = [group["name"] for group in groups if group["state"] != "REMOVED"]
        found += [actor["name"] for actor in cluster.ray.util.list_named_actors(all_namespaces=True)]
        mine = [entry for entry in found if entry.startswith(f"{name}/")]
        if not mine or time.monotonic() > deadline:
            return mine
        time.sleep(0.1)


def test_a_controller_that_dies_again_and_again_without_a_step_gives_up(cluster):
    run = cluster.submit("doomed", train=TRAIN, elastic={"max_restarts": 1})
    for number in (1, 2):
        run.wait_for(
            lambda n=number: len(run.events("controller_restarted")) == n - 1 and run.events("stage_started"), ""
        )
        pid, _ = run.controller_place()
        os.kill(pid, signal.SIGKILL)
        run.wait_for(lambda n=number: len(run.events("controller_restarted")) == n, f"restart {number}")
    assert run.end() == "failed"
    assert "the controller died 2 times in a row at step 0" in run.lines("events.jsonl")[-1]["detail"]
    assert not left_behind(cluster, "doomed")


def test_storage_that_cannot_be_read_for_a_moment_costs_a_restart_and_not_the_run(cluster, undisturbed):
    run = cluster.submit("unreadable", train=TRAIN, checkpoint=EVERY)
    run.wait_for_step(15)
    run.kill(0, signal.SIGSTOP)
    folder = Path(run.folder.local_path("checkpoints"))
    run.wait_for(lambda: commit.committed_steps(run.folder.child("checkpoints")), "a commit")
    files = list(folder.glob(f"step-*/attempt-*/{commit.rank_file_name(1)}"))
    for file in files:
        file.rename(file.with_suffix(".aside"))
        # Too many levels of symbolic links: an error of the store, not of the checkpoint.
        file.symlink_to(file.name)
    run.kill(1)
    run.wait_for(lambda: len(run.events("attempt_failed")) >= 2, "the failed restore")
    for file in files:
        file.with_suffix(".aside").replace(file)
    assert run.end() == "finished"
    assert "symbolic links" in run.events("attempt_failed")[1]["detail"]
    assert not run.events("checkpoint_damaged") and starts(run)[-1]["step"] == starts(run)[1]["step"] > 0
    check_same_course(run, undisturbed, exact=True)


def test_a_node_that_is_drained_is_left_after_a_commit_and_no_step_is_done_twice(cluster, undisturbed):
    run = cluster.submit("drain", train=TRAIN, checkpoint=AT_THE_END, elastic={"min_replicas": 2, "snapshot_every": 1})
    run.wait_for_step(15)
    leaving, asked = run.ranks()[1][1], time.time()
    cluster.drain(leaving, seconds=60)
    run.wait_for(lambda: len(starts(run)) == 2, "the attempt without the node")
    moved = starts(run)[1]
    assert (moved["change"], moved["replicas"], moved["source"]) == ("shrink", 2, "storage")
    assert leaving[:8] in reasons(run, "commit")[0] and "drained" in moved["reason"]
    run.wait_for_step(moved["step"] + 1, attempt=2)
    assert leaving not in [node for _, node in run.ranks()]
    assert run.end() == "finished"
    print_recovery(run, 2, asked, "cleared")
    assert not run.events("attempt_failed") and redone(run) == 0
    check_same_course(run, undisturbed, exact=False)
    cluster.wait_until_gone(leaving)
    cluster.add_node()


def test_a_stop_while_the_run_recovers_commits_what_lies_in_memory(cluster, undisturbed):
    elastic = {"snapshot_every": 1, "start_timeout_seconds": 60}
    run = cluster.submit("stopped", train=TRAIN, checkpoint=AT_THE_END, elastic=elastic)
    run.wait_for_step(20)
    cluster.kill_node(run.ranks()[2][1])
    # Three replicas are wanted and there is room for two: the run waits.
    run.wait_for(lambda: run.events("cleared"), "the end of the attempt")
    run.stop()
    assert run.end() == "stopped"
    reached = max(run.losses())
    (committed,) = run.events("committed")
    assert (
        committed["step"] >= reached - 1
        and f"step {committed['step']} is in memory alone" in reasons(run, "preserve")[0]
    )
    cluster.add_node()
    run = cluster.submit("stopped", train=TRAIN, checkpoint=AT_THE_END, elastic=elastic)
    assert run.end() == "finished"
    assert starts(run)[-1]["step"] == committed["step"] and redone(run) <= 1
    check_same_course(run, undisturbed, exact=True)


def test_a_frozen_raylet_is_noticed_by_rays_health_check_and_its_node_left(cluster, undisturbed):
    run = cluster.submit("frozen", train=TRAIN, checkpoint=AT_THE_END, elastic={"min_replicas": 2, "snapshot_every": 1})
    run.wait_for_step(15)
    lost = run.ranks()[1]
    with cluster.frozen_node(lost[1]) as since:
        # The machine stands still, and its rank with it; else the run would be over before anybody noticed.
        run.kill(1, signal.SIGSTOP)
        run.wait_for(lambda: len(starts(run)) == 2, "the attempt without the node")
        assert starts(run)[1]["replicas"] == 2 and starts(run)[1]["source"] == "memory"
        assert run.end() == "finished"
    print_recovery(run, 2, since)
    assert lost[1][:8] in run.events("attempt_failed")[0]["detail"] and redone(run) <= 1
    check_same_course(run, undisturbed, exact=False)
    cluster.add_node()
