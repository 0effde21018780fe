"""Fixtures that several test files share."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from cluster import local, processes
from configs.schema import ClusterSection


def pytest_xdist_make_scheduler(config, log):
    """Two workers (pytest-xdist): a file stays in one, and all that use Ray in the same, as there is one cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::", 1)[0]
            return "ray" if "pytest.mark.ray" in (config.rootpath / file).read_text() else file

    return ByCluster(config, log)


@pytest.fixture(scope="session", autouse=True)
def equal_priority():
    """Ray's workers run beside other tests' processes: at Ray's niceness of 15 they would get 3% of a core."""
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray reads it in this spelling
    yield
    del os.environ["RAY_worker_niceness"]  # noqa: SIM112


@pytest.fixture(scope="session", autouse=True)
def shard_cache():
    """A shard cache of this session, so that tests neither use nor leave files of the user's own."""
    kept = os.environ.get("TELAR_SHARD_CACHE")
    with tempfile.TemporaryDirectory(prefix="telar-t-", dir="/tmp") as folder:
        os.environ["TELAR_SHARD_CACHE"] = folder
        yield
    if kept is None:
        del os.environ["TELAR_SHARD_CACHE"]
    else:
        os.environ["TELAR_SHARD_CACHE"] = kept


@pytest.fixture(scope="session")
def embedded_ray():
    """One embedded cluster of 8 logical CPUs for the whole session; nothing of it may be left at the end."""
    home = Path(tempfile.mkdtemp(prefix="telar-t-", dir="/tmp"))
    kept = {name: os.environ.pop(name, None) for name in ("TELAR_HOME", "RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    os.environ["TELAR_HOME"] = str(home)
    cluster = local.start(ClusterSection(local_cpus=8))
    mark = running_mark(home)
    yield cluster
    local.stop()
    left = processes.members(mark)
    shutil.rmtree(home)
    del os.environ["TELAR_HOME"]
    os.environ.update({name: value for name, value in kept.items() if value is not None})
    assert not left, f"processes left by the embedded cluster: {left}"


def running_mark(home):
    """Identity of the processes of the cluster whose state lies in `home`."""
    import json

    state = json.loads((home / "cluster.json").read_text())
    return processes.Mark(state["head_pid"], state["head_created_unix"], state["mark"])
