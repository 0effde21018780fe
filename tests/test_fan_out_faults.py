"""An evaluator or a node killed in the middle: the same rows and scores, and only what was unfinished is done again."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psutil
import pytest

from cluster.storage import Storage
from jobs import evaluate as stage
from jobs.answers import EvaluatorTask, load_evaluator
from jobs.fan_out import RayRunner, SerialRunner
from tests.elastic_cluster import HEALTH, NODE
from tests.test_tasks_run import RUN, STEP, commit_random_model

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Slices that each evaluator finishes before it waits to be killed or to go on.
FREE_SLICES = 2
PATIENCE_SECONDS = 120


class Watched:
    """The real evaluator; it notes each slice that it starts, and in its third one waits for the file `go`."""

    def __init__(self, task):
        self.evaluator, self.marks, self.started = load_evaluator(task), Storage(task.storage_url).child("marks"), 0

    def work(self, piece):
        import ray

        self.started += 1
        self.marks.write_text(f"started/{piece.key}~{os.getpid()}", "")
        if self.started == FREE_SLICES + 1:
            self.marks.write_text(f"held/{piece.key}~{os.getpid()}", ray.get_runtime_context().get_node_id())
            wait_until(lambda: self.marks.exists("go"), "the file go")
        self.evaluator.work(piece)


def wait_until(condition, what):
    """Poll until the condition holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS} s for {what}"
        time.sleep(0.05)


@pytest.fixture
def nodes():
    """A head without CPUs and two nodes of one each, so that each holds one evaluator."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={**NODE, "num_cpus": 0, "include_dashboard": False, "_system_config": HEALTH},
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False, namespace="telar")
        found = [cluster.add_node(**NODE) for _ in range(2)]
        cluster.wait_for_nodes()
        yield found
    finally:
        ray.shutdown()
        cluster.shutdown()


def evaluate(made, runner):
    arguments = (made.config, made.storage, RUN, made.manifest, STEP, print, lambda: False)
    return stage.evaluate(*arguments, runner=runner)


def rows_of(made):
    """Rows of every finished slice by its file's name."""
    digest = stage.digest_of(stage.choose_checkpoints(made.storage, RUN, STEP, 1))
    cells = stage.plan(made.config, made.storage, made.manifest, digest)
    return {p.key: stage.read_rows(made.storage.child(RUN), p) for cell in cells for p in cell.slices}


@pytest.mark.parametrize("victim", ["evaluator", "node"])
def test_a_loss_changes_no_row_and_redoes_only_what_was_unfinished(nodes, victim, tmp_path):
    made = commit_random_model(tmp_path, "pairs", {"slice_records": 2})
    task = EvaluatorTask(made.config, made.storage.url, RUN, STEP)
    undisturbed = evaluate(made, SerialRunner(partial(load_evaluator, task)))
    expected = rows_of(made)
    made.storage.remove(f"{RUN}/evaluation")
    marks, kept = made.storage.child("marks"), made.storage.child(RUN, "evaluation", "slices")
    with ThreadPoolExecutor(1) as pool:
        going = pool.submit(evaluate, made, RayRunner(partial(Watched, task), 2, f"kill-{victim}", 60))
        try:
            wait_until(lambda: len(marks.names("held")) == 2 or going.done(), "both evaluators in their third slice")
            assert not going.done(), going.result()
            finished = {name.removesuffix(".parquet") for name in kept.names()}
            assert len(finished) == 2 * FREE_SLICES < len(expected)
            lost = marks.names("held")[0]
            key, pid = lost.split("~")
            if victim == "evaluator":
                os.kill(int(pid), signal.SIGKILL)
            else:
                holder = marks.read_text(f"held/{lost}")
                next(node for node in nodes if node.node_id == holder).kill_raylet(check_alive=False)
            # One that is told to go on before it ends would finish its slice.
            wait_until(lambda: has_ended(int(pid)), "the end of the killed evaluator")
        finally:
            marks.write_text("go", "")
        results = going.result(timeout=PATIENCE_SECONDS)
    assert rows_of(made) == expected
    assert results["cells"] == undisturbed["cells"] and results["samples"] == undisturbed["samples"]
    starts = Counter(name.split("~")[0] for name in marks.names("started"))
    assert starts == {**dict.fromkeys(expected, 1), key: 2}


def has_ended(pid):
    """Whether a process is gone, or is a zombie that nobody has waited for yet."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
