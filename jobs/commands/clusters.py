"""`telar up` and `telar down`: the embedded cluster by hand."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from cluster import local
from cluster.authentication import COOKIE, token_path
from configs.errors import TelarError, UnreachableError
from configs.schema import ClusterSection


def bring_up(cpus: int | None, dashboard_port: int | None) -> dict[str, Any]:
    """Start the embedded cluster or find the running one; raises TelarError when that one has fewer CPUs."""
    section = ClusterSection()
    changes = {"local_cpus": cpus, "dashboard_port": dashboard_port}
    section = section.model_copy(update={name: value for name, value in changes.items() if value is not None})
    cluster = local.start(section)
    if cpus is not None and cluster.logical_cpus < cpus:
        raise TelarError(
            f"--cpus: the embedded cluster runs with {cluster.logical_cpus} logical CPUs; `telar down`, then "
            f"`telar up --cpus {cpus}`"
        )
    verb = "started" if cluster.started_by_us else "runs already"
    message = (
        f"embedded cluster {verb}: {cluster.dashboard_url}, {cluster.logical_cpus} logical CPUs\n"
        f"the dashboard asks for a token, or set cookie {COOKIE}: cat {token_path()}\n"
        f"end it with `telar down`"
    )
    return {**asdict(cluster), "token_path": str(token_path()), "message": message}


def take_down(force: bool) -> dict[str, Any]:
    """End the embedded cluster; raises TelarError when jobs run on it, unless forced."""
    if not force:
        running = _running_jobs()
        if running:
            raise TelarError(
                f"{len(running)} job{'s' if len(running) > 1 else ''} on the embedded cluster: {', '.join(running)}; "
                "stop a run with `telar stop RUN`, or end all with `telar down --force`"
            )
    stopped = local.stop()
    return {"stopped": stopped, "message": "embedded cluster ended" if stopped else "no embedded cluster runs"}


def _running_jobs() -> list[str]:
    cluster = local.find()
    if cluster is None:
        return []
    from jobs.submit import Address, Jobs

    try:
        jobs = Jobs(Address(cluster.dashboard_url, "the embedded cluster", embedded=True)).list()
    except UnreachableError as error:
        raise TelarError(f"{error}; `telar down --force` ends the embedded cluster unasked") from error
    return [str((job.metadata or {}).get("run") or job.submission_id) for job in jobs if not job.status.is_terminal()]
