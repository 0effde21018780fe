"""Three hosts with addresses, names and temporary folders of their own, in network namespaces; a fourth one submits.

What the hosts share is one folder, as with a network file system. Needs root and iproute2.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from tests.test_end_to_end import TINY, write_corpus

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
HEAD, CLIENT = 1, 4
NETWORK = "10.213.77"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"),
]


def address(host):
    return f"{NETWORK}.{host}"


class Hosts:
    """Namespaces `MARK-1` ... on one bridge; `run` and `start` execute a command on one of them."""

    def __init__(self, folder):
        self.folder, self.mark = folder, f"tl{secrets.token_hex(2)}"
        self.token = folder / "token"
        self.token.write_text(secrets.token_hex(32))
        self.token.chmod(0o600)
        self.processes = []

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    def __enter__(self):
        self.ip("link", "add", self.mark, "type", "bridge")
        self.ip("addr", "add", f"{address(254)}/24", "dev", self.mark)
        self.ip("link", "set", self.mark, "up")
        for host in (1, 2, 3, CLIENT):
            name = f"{self.mark}-{host}"
            self.ip("netns", "add", name)
            self.ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            self.ip("link", "set", name, "master", self.mark, "up")
            for words in (("addr", "add", f"{address(host)}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
                self.ip("-n", name, *words)
            self.ip("-n", name, "link", "set", "lo", "up")
            # Ray finds its own address by the route to a far one. Nothing passes on what goes there.
            self.ip("-n", name, "route", "add", "default", "via", address(254))
        return self

    def __exit__(self, *_):
        for process in self.processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for host in (1, 2, 3, CLIENT):
            self.ip("netns", "del", f"{self.mark}-{host}")
        self.ip("link", "del", self.mark)

    def command(self, host, words):
        """The command on that host: its network, its name, and a folder for Ray that only it sees."""
        inside = f'mount -t tmpfs none {self.folder}/ray && hostname {self.mark}-{host} && exec "$@"'
        return [
            "ip", "netns", "exec", f"{self.mark}-{host}", "unshare", "--mount", "--uts", "--pid", "--fork",
            "--kill-child", "--mount-proc", "sh", "-c", inside, "sh", *map(str, words),
        ]  # fmt: skip

    def environment(self, **more):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TELAR_"))}
        shared = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token), "RAY_USAGE_STATS_ENABLED": "0"}
        return {**kept, **shared, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **more}

    def start(self, host, *words):
        log = (self.folder / f"host-{host}.log").open("w")
        process = subprocess.Popen(
            self.command(host, words), env=self.environment(), stdout=log, stderr=log, start_new_session=True
        )
        self.processes.append(process)

    def run(self, host, *words, **more):
        return subprocess.run(
            self.command(host, words), env=self.environment(**more), capture_output=True, text=True, timeout=240,
            cwd=self.folder,
        )  # fmt: skip

    def logs(self):
        return "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("host-*.log")))


ASK = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], headers={"Authorization": "Bearer " + sys.argv[2]} if sys.argv[2] else {})
try:
    print(urllib.request.urlopen(request, timeout=5).read().decode())
except OSError as error:
    print("refused", getattr(error, "code", error))
"""


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="telar-t-", dir="/tmp"))
    (path / "ray").mkdir()
    yield path
    shutil.rmtree(path)


def wait_for_nodes(hosts, url, count, seconds=180):
    deadline = time.monotonic() + seconds
    while True:
        answer = hosts.run(
            CLIENT, sys.executable, "-c", ASK, f"{url}/nodes?view=summary", hosts.token.read_text()
        ).stdout
        if answer.replace(" ", "").count('"state":"ALIVE"') == count:
            return
        assert time.monotonic() < deadline, f"{answer[-2000:]}\n{hosts.logs()}"
        time.sleep(1)


def test_a_run_on_three_hosts_that_a_fourth_submits(folder):
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    changes = {"parallelism": {"data": 3}, "cluster": {"device": "cpu", "shared_filesystem": True}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **changes}))
    url = f"http://{address(HEAD)}:8265"
    with Hosts(folder) as hosts:
        common = ("--num-cpus", "1", "--object-store-memory", str(100 * 2**20), "--block")
        head = ("--head", "--port", "6379", "--dashboard-host", address(HEAD), "--temp-dir", folder / "ray")
        hosts.start(HEAD, "ray", "start", *head, "--node-ip-address", address(HEAD), *common)
        wait_for_nodes(hosts, url, 1)
        for host in (2, 3):
            hosts.start(
                host, "ray", "start", "--address", f"{address(HEAD)}:6379", "--node-ip-address", address(host), *common
            )
        wait_for_nodes(hosts, url, 3)
        # Who does not know the token is sent away.
        refused = hosts.run(CLIENT, sys.executable, "-c", ASK, f"{url}/api/jobs/", "").stdout
        assert refused.split() in (["refused", "401"], ["refused", "403"]), refused
        submitted = hosts.run(
            CLIENT, sys.executable, "-m", "jobs.cli", "submit", "tiny.yaml", "--address", url, "--wait", "--set",
            "run.name=far",
        )  # fmt: skip
        assert submitted.returncode == 0, f"{submitted.stdout}\n{submitted.stderr}\n{hosts.logs()}"
    status = json.loads((folder / "runs/far/status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", TINY["train"]["steps"])
    events = [json.loads(line) for line in (folder / "runs/far/events.jsonl").read_text().splitlines()]
    (started,) = [event for event in events if event["event"] == "ranks_started"]
    assert len(set(started["nodes"])) == 3
    assert (folder / "runs/far/evaluation/results.json").exists() and (folder / "runs/far/report.html").exists()
