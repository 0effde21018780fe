"""What the dashboard shows: titles and Prometheus queries over the gauges of Telar and Ray, as data.

Every query keeps `run` or the node as label and aggregates the rest away: Ray tags a gauge with the worker process that
published it, which is another one after a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN = 'run=~"$run"'


@dataclass(frozen=True)
class Panel:
    """One plot. `unit` is Grafana's name of it; `needs_gpu`: nodes without one publish nothing."""

    title: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    needs_gpu: bool = False

    def expressions(self, run: str = ".*") -> list[str]:
        """The queries with the dashboard's variable filled in."""
        return [query.replace("$run", run) for query, _ in self.queries]


def of_run(name: str, function: str = "max") -> str:
    """A gauge of a run, whichever process published it."""
    return f"{function} by (run) (ray_telar_{name}{{{RUN}}})"


def of_shards(name: str) -> str:
    """A counter of the shard servers; their `run` is the attempt's label, RUN/attempt-N."""
    return f'sum by (run) (ray_telar_shards_{name}{{run=~"($run)/.*"}})'


PANELS = (
    Panel("Training loss, nats per token", ((of_run("loss"), "{{run}}"),)),
    Panel("Target tokens per second", ((of_run("tokens_per_second"), "{{run}}"),)),
    Panel("Optimizer steps", ((of_run("step"), "{{run}}"), (of_run("last_commit_step"), "{{run}} committed"))),
    Panel("Age of the last commit", ((f"time() - {of_run('last_commit_unix_seconds')}", "{{run}}"),), "s"),
    Panel("Step time", ((of_run("step_seconds"), "{{run}}"),), "s"),
    Panel(
        "Waiting for data, share of a step",
        ((f"{of_run('data_wait_seconds')} / {of_run('step_seconds')}", "{{run}}"),),
        "percentunit",
    ),
    Panel("Ranks and attempt", ((of_run("world_size"), "{{run}} ranks"), (of_run("attempt"), "{{run}} attempt"))),
    Panel("Gradient norm before clipping", ((of_run("grad_norm"), "{{run}}"),)),
    Panel("Learning rate", ((of_run("learning_rate"), "{{run}}"),)),
    Panel(
        "Shards: bytes from storage and from other nodes",
        ((of_shards("storage_bytes"), "{{run}} storage"), (of_shards("peer_bytes"), "{{run}} nodes")),
        "bytes",
    ),
    Panel("Shards quarantined", ((of_shards("quarantined"), "{{run}}"),)),
    Panel("CPU of nodes", (("avg by (ip) (ray_node_cpu_utilization)", "{{ip}}"),), "percent"),
    Panel("Memory of nodes", (("max by (ip) (ray_node_mem_used)", "{{ip}}"),), "bytes"),
    Panel("GPU of nodes", (("avg by (ip) (ray_node_gpus_utilization)", "{{ip}}"),), "percent", needs_gpu=True),
    Panel("GPU memory of nodes", (("sum by (ip) (ray_node_gram_used)", "{{ip}}"),), "mbytes", needs_gpu=True),
)
