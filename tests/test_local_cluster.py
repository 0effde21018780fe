"""The embedded cluster: private, on the loopback only, reused, and gone without a trace when stopped."""

import json
import os
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from cluster import local, processes
from cluster.authentication import make_token, state_folder, token_headers
from configs.errors import ConfigError, TelarError
from configs.schema import ClusterSection
from tests.conftest import running_mark


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TELAR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def runs(pid):
    """Whether a process exists and is more than a zombie that its parent has not asked for yet."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def get(url, headers):
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.status, answer.read()


@pytest.mark.ray
def test_requests_need_the_token_and_the_token_is_private(embedded_ray):
    url = embedded_ray.dashboard_url + "/api/jobs/"
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            get(url, headers)
        assert refused.value.code in (401, 403)
    assert get(url, token_headers())[0] == 200
    folder = state_folder()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600


@pytest.mark.ray
def test_every_port_is_on_the_loopback(embedded_ray):
    listening = [
        (process.name(), connection.laddr)
        for process in processes.members(running_mark(state_folder()))
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 5
    assert {address.ip.removeprefix("::ffff:") for _, address in listening} == {"127.0.0.1"}, listening


@pytest.mark.ray
def test_a_second_start_reuses_the_running_cluster(embedded_ray):
    again = local.start(ClusterSection(local_cpus=2))
    assert not again.started_by_us and again.dashboard_url == embedded_ray.dashboard_url
    assert again.logical_cpus == 8
    assert local.find() == again


@pytest.mark.ray
def test_stop_ends_workers_and_drivers_but_no_foreign_process(home):
    started = time.monotonic()
    cluster = local.start(ClusterSection(local_cpus=2))
    assert time.monotonic() - started < 60
    mark, folder = running_mark(home), Path(cluster.session_folder).parent
    bystander = subprocess.Popen(["sleep", "600"], start_new_session=True)
    environment = {**os.environ, processes.MARK_VARIABLE: mark.text}
    driver = subprocess.Popen(["sleep", "600"], start_new_session=True, env=environment)
    try:
        names = {process.name() for process in processes.members(mark)}
        assert {"raylet", "gcs_server", "sleep"} <= names
        assert local.stop()
        assert not processes.members(mark) and not folder.exists()
        assert not runs(driver.pid)
        assert bystander.poll() is None
        assert not local.stop() and local.find() is None
        assert {file.name for file in home.iterdir()} <= {"lock", "ray-start.log"}
    finally:
        for process in (bystander, driver):
            process.kill()
            process.wait()


def fake_state(home, pid, created, text="no-such-mark"):
    home.mkdir(mode=0o700)
    (home / "ray").mkdir()
    state = {
        "ready": True,
        "head_pid": pid,
        "head_created_unix": created,
        "mark": text,
        "dashboard_url": "http://127.0.0.1:1",
        "gcs_address": "",
        "logical_cpus": 4,
        "temporary_folder": str(home / "ray"),
    }
    (home / "cluster.json").write_text(json.dumps(state))


def test_a_stale_state_file_is_cleaned_and_a_reused_process_id_is_spared(home):
    stranger = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        fake_state(home, stranger.pid, time.time() - 1e6)
        assert local.find() is None
        assert stranger.poll() is None
        assert not (home / "cluster.json").exists() and not (home / "ray").exists()
    finally:
        stranger.kill()
        stranger.wait()


def test_members_of_a_dead_head_are_found_by_mark_and_ended(home):
    head = subprocess.Popen(["true"], start_new_session=True)
    created = psutil.Process(head.pid).create_time()
    head.wait()
    environment = {**os.environ, processes.MARK_VARIABLE: "orphan-mark"}
    # A shell that ignores SIGTERM, with a child in a session of its own that does not carry the mark.
    script = "trap '' TERM; env -u TELAR_CLUSTER_MARK setsid sleep 600 & echo $!; while :; do sleep 1; done"
    orphan = subprocess.Popen(
        ["sh", "-c", script], env=environment, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(orphan.stdout.readline()))
    try:
        ended = processes.end(processes.Mark(head.pid, created, "orphan-mark"), grace_seconds=0.5)
        assert orphan.pid in ended
        assert not runs(orphan.pid) and not runs(child.pid)
    finally:
        orphan.kill()
        orphan.wait()
        orphan.stdout.close()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no /dev/shm")
def test_shared_memory_of_the_ended_is_removed_and_of_the_living_kept():
    stem = f"deepspeed_allreduce_buffer_{os.getuid()}_telartest{os.getpid()}"
    orphan, used = Path(f"/dev/shm/{stem}_0"), Path(f"/dev/shm/{stem}_1")
    holder = "import sys, time; file = open(sys.argv[1], 'rb'); print('ready', flush=True); time.sleep(600)"
    for path in (orphan, used):
        path.write_bytes(b"x")
    process = subprocess.Popen([sys.executable, "-c", holder, str(used)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        removed = processes.sweep_shared_memory(set())
        assert orphan.name in removed and used.name not in removed
        assert not orphan.exists() and used.exists()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        used.unlink(missing_ok=True)
        orphan.unlink(missing_ok=True)


def test_the_next_free_port_is_taken_and_an_exhausted_range_names_the_field():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port < local.free_dashboard_port(port) < port + local.PORTS_TRIED
    with socket.socket() as last:
        last.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        last.bind(("127.0.0.1", 65535))
        last.listen()
        with pytest.raises(ConfigError, match=r"cluster\.dashboard_port"):
            local.free_dashboard_port(65535)


def test_a_token_is_kept_and_a_foreign_state_folder_is_refused(home, tmp_path, monkeypatch):
    first = make_token().read_text()
    assert len(first) == 64 and make_token().read_text() == first
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    monkeypatch.setenv("TELAR_HOME", str(link))
    with pytest.raises(TelarError, match="TELAR_HOME"):
        make_token()
