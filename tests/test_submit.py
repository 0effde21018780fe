"""The Jobs API client against a real cluster: streams that end early, retries, stop, the record, what is shipped."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile

import pytest
import requests
import yaml

from cluster.environment import FINGERPRINT_VARIABLE, PACKAGES, ROOT, fingerprint
from cluster.inventory import Node, check_capacity, check_storage_is_shared
from cluster.storage import Storage
from configs.errors import CapacityError, ConfigError, TelarError, UnreachableError
from configs.load import load_config
from jobs.commands.following import follow_job, stop
from jobs.commands.runs import locate
from jobs.commands.submitting import Request, check_embedded_capacity, submit
from jobs.submit import UPLOAD_LIMIT_BYTES, Address, Jobs, exit_code, record
from tests.test_cli import CONFIG


@pytest.fixture
def project(tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("def f():\n    return 1\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TELAR_STORAGE", raising=False)
    return tmp_path


@pytest.fixture
def jobs(embedded_ray):
    return Jobs(Address(embedded_ray.dashboard_url, "the embedded cluster", embedded=True))


def send(name, script):
    return submit(
        Request(
            "tiny.yaml",
            [f"run.name={name}"],
            embedded=True,
            entrypoint=f"{sys.executable} -c '{script}'",
        ),
        print,
    )


@pytest.mark.ray
def test_a_job_runs_the_shipped_code_and_its_record_is_kept(project, embedded_ray):
    script = """
import os
from cluster.environment import check_fingerprint
check_fingerprint()
print("fine in", os.getcwd(), os.environ["TELAR_JOB_ID"])
"""
    submitted = send("shipped", script)
    text = []
    assert follow_job(submitted.jobs, submitted.place, submitted.job_id, text.append) == 0
    line = next(line for line in "".join(text).splitlines() if line.startswith("fine in"))
    assert str(ROOT) not in line and line.endswith(submitted.job_id)
    details = json.loads((project / "runs/shipped/job.json").read_text())
    assert details["status"] == "SUCCEEDED" and details["submission_id"] == submitted.job_id
    assert details["metadata"]["run"] == "shipped" and details["metadata"]["kind"] == "run"
    assert details["metadata"]["url"] == str(project / "runs/shipped") and details["metadata"]["config_digest"]
    config = load_config(project / "runs/shipped/config.yaml")
    assert config.data.corpora[0].path == str(project / "code") and config.run.storage == str(project / "runs")


@pytest.mark.ray
def test_following_survives_streams_that_end_early_and_writes_every_character_once(project, embedded_ray, monkeypatch):
    submitted = send("broken", "import time\nfor i in range(40): print(i, flush=True); time.sleep(0.1)")
    whole, streams = submitted.jobs._client.tail_job_logs, []

    async def broken(job_id):
        streams.append(job_id)
        count = 0
        async for chunk in whole(job_id):
            yield chunk
            count += 1
            if len(streams) == 1 and count == 2:
                return
            if len(streams) == 2 and count == 3:
                raise RuntimeError("WebSocket connection closed unexpectedly")

    monkeypatch.setattr(submitted.jobs._client, "tail_job_logs", broken)
    text = []
    details = submitted.jobs.follow(submitted.job_id, text.append)
    assert len(streams) >= 3 and details.status.value == "SUCCEEDED"
    assert "".join(text) == submitted.jobs.logs(submitted.job_id)
    assert [line for line in "".join(text).splitlines() if line.isdigit()] == [str(i) for i in range(40)]


@pytest.mark.ray
def test_stop_ends_a_job_that_has_just_been_submitted(project, embedded_ray):
    submitted = send("stopped", "import time; time.sleep(600)")
    assert stop(submitted.place, None, now=True, timeout_seconds=30, say=print) == "stopped"
    assert json.loads((project / "runs/stopped/job.json").read_text())["status"] == "STOPPED"
    assert exit_code(submitted.jobs.info(submitted.job_id)) == 3


@pytest.mark.ray
def test_a_graceful_stop_goes_through_storage_and_a_resume_forgets_it(project, embedded_ray):
    waits = "import os,sys,time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.1)\nsys.exit(3)"
    path = project / "runs/polite/stop-requested"
    request = Request(
        "tiny.yaml", ["run.name=polite"], embedded=True, entrypoint=f"{sys.executable} -c '{waits}' {path}"
    )
    submitted = submit(request, print)
    while submitted.jobs.info(submitted.job_id).status.value == "PENDING":
        time.sleep(0.1)
    with pytest.raises(ConfigError, match="is going on"):
        submit(Request(None, resume="polite"), print)
    stop(submitted.place, None, now=False, timeout_seconds=60, say=print)
    details = submitted.jobs.info(submitted.job_id)
    assert details.status.value == "FAILED" and details.driver_exit_code == 3 and exit_code(details) == 3
    (project / "runs/polite/status.json").write_text('{"state": "stopped"}')
    again = submit(Request(None, ["train.steps=7"], resume="polite", entrypoint="true"), print)
    assert not path.exists() and locate("polite", None).status() is None
    assert again.place.config().train.steps == 7
    assert again.jobs.of_run(again.place.url).submission_id == again.job_id
    assert again.jobs.wait(again.job_id, 60).status.value == "SUCCEEDED"


@pytest.mark.ray
def test_no_agent_yet_is_tried_again_and_a_lost_answer_submits_nothing_twice(jobs, monkeypatch):
    real, calls = jobs._client._do_request, []

    def flaky(method, endpoint, **options):
        if method == "POST" and endpoint == "/api/jobs/":
            calls.append(endpoint)
            answer = requests.Response()
            if len(calls) < 3:
                answer.status_code, answer._content = 500, b"No available agent to submit job, please try again later."
                return answer
            real(method, endpoint, **options)
            raise requests.ConnectionError("the answer was lost")
        return real(method, endpoint, **options)

    monkeypatch.setattr(jobs._client, "_do_request", flaky)
    before = len(jobs.list())
    assert jobs.submit("true", {}, {}, f"once-{os.getpid()}") == f"once-{os.getpid()}"
    assert len(calls) == 3 and len(jobs.list()) == before + 1
    assert jobs.wait(f"once-{os.getpid()}", 60).status.value == "SUCCEEDED"


@pytest.mark.ray
def test_a_failed_submission_leaves_no_run_behind(project, jobs, monkeypatch):
    def refuse(self, *arguments):
        raise TelarError("no")

    monkeypatch.setattr(Jobs, "submit", refuse)
    with pytest.raises(TelarError, match="no"):
        submit(Request("tiny.yaml", ["run.name=refused"], embedded=True), print)
    assert not (project / "runs/refused").exists()


@pytest.mark.ray
def test_the_printed_ray_command_submits_the_same_job(project, embedded_ray):
    submitted = send("twice", 'print("hello")')
    submitted.jobs.wait(submitted.job_id, 60)
    environment = {**os.environ, "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    done = subprocess.run(
        submitted.ray_command, shell=True, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and "hello" in done.stdout, done.stdout + done.stderr
    newest = submitted.jobs.of_run(submitted.place.url)
    first = submitted.jobs.info(submitted.job_id)
    assert newest.submission_id != first.submission_id
    assert newest.entrypoint == first.entrypoint and newest.metadata == first.metadata
    # Not the uploads' hashes: an edit of the repository between the two is no fault of the command.
    assert newest.runtime_env["working_dir"].startswith("gcs://") and f"--working-dir {ROOT} " in submitted.ray_command
    assert newest.runtime_env["env_vars"].items() <= first.runtime_env["env_vars"].items()


@pytest.mark.ray
def test_an_upload_above_the_limit_is_refused_with_what_is_large(jobs):
    package = io.BytesIO()
    with zipfile.ZipFile(package, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("data/big.bin", bytes(UPLOAD_LIMIT_BYTES + 1))
    with pytest.raises(TelarError, match=r"data/big\.bin 100 MiB.*\.rayignore"):
        jobs._client._do_request("PUT", "/api/packages/gcs/x.zip", data=package.getvalue())


def test_a_silent_address_is_unreachable_in_time():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"from cluster\.address"):
            Jobs(Address(f"http://127.0.0.1:{server.getsockname()[1]}", "cluster.address"))
        assert time.monotonic() - started < 15


def test_an_address_of_something_else_is_unreachable():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UnreachableError, match="not as a Ray dashboard"):
            Jobs(Address(f"http://127.0.0.1:{server.getsockname()[1]}", "--address"))
        thread.join()


def config_of(tmp_path, *overrides):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    return load_config(tmp_path / "c.yaml", overrides)


def test_capacity_counts_whole_ranks_per_node_and_says_how_many_fit(tmp_path):
    nodes = [Node("a", 3, 0), Node("b", 3, 0)]
    check_capacity(config_of(tmp_path, "cluster.cpus_per_rank=3"), nodes, "it", embedded=False)
    wide = config_of(tmp_path, "parallelism.data=3", "cluster.cpus_per_rank=2", "cluster.device=auto")
    with pytest.raises(CapacityError, match=r"parallelism\.data: 3 ranks .* need 6 CPUs; it has 6 .*room for 2 ranks"):
        check_capacity(wide, nodes, "it", embedded=False)
    with pytest.raises(CapacityError, match="2 GPUs"):
        check_capacity(config_of(tmp_path, "cluster.device=cuda"), nodes, "it", embedded=False)
    check_capacity(config_of(tmp_path, "cluster.device=cuda"), [Node("g", 8, 2)], "it", embedded=False)


def test_capacity_keeps_tensor_ranks_on_one_node(tmp_path):
    config = config_of(tmp_path, "parallelism.data=2", "parallelism.tensor=2", "cluster.device=cpu")
    check_capacity(config, [Node("a", 2, 0), Node("b", 3, 0)], "it", embedded=False)
    with pytest.raises(CapacityError, match=r"4 ranks .* 2 ranks \(parallelism\.tensor\) on one node; it .*data to 1"):
        check_capacity(config, [Node("a", 3, 0), Node("b", 1, 0)], "it", embedded=False)
    with pytest.raises(CapacityError, match=r"room for 0 ranks; lower cluster\.cpus_per_rank or parallelism\.tensor"):
        check_capacity(config, [Node("a", 1, 0)] * 4, "it", embedded=False)


def test_capacity_lets_the_stages_of_a_replica_stand_on_several_nodes(tmp_path):
    stages = config_of(tmp_path, "parallelism={data: 1, pipeline: 2, tensor: 2}", "cluster.device=cpu")
    check_capacity(stages, [Node("a", 2, 0), Node("b", 3, 0)], "it", embedded=False)
    with pytest.raises(CapacityError, match=r"4 ranks .*room for 2 ranks; lower .* or parallelism\.pipeline or "):
        check_capacity(stages, [Node("a", 3, 0), Node("b", 1, 0)], "it", embedded=False)
    small = ("parallelism={data: 2, pipeline: 2, tensor: 2}", "cluster.device=cpu", "cluster.local_cpus=4")
    with pytest.raises(ConfigError, match=r"local_cpus: 8 ranks .* to 8 or parallelism\.data to 1"):
        check_embedded_capacity(config_of(tmp_path, *small))


def test_a_local_folder_on_several_nodes_must_be_declared_shared(tmp_path):
    nodes = [Node("a", 3, 0), Node("b", 3, 0)]
    with pytest.raises(ConfigError, match=r"cluster\.shared_filesystem"):
        check_storage_is_shared(config_of(tmp_path), nodes, True, embedded=False)
    check_storage_is_shared(config_of(tmp_path), nodes[:1], True, embedded=False)
    check_storage_is_shared(config_of(tmp_path), nodes, False, embedded=False)
    check_storage_is_shared(config_of(tmp_path, "cluster.shared_filesystem=true"), nodes, True, embedded=False)


def copy_of_the_code(folder):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def check_in(folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", "from cluster.environment import check_fingerprint as c; c()"],
        cwd=folder,
        env={**os.environ, "TELAR_DEBUG": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_other_code_than_the_submitted_is_refused_with_both_paths(tmp_path):
    shipped = tmp_path / "shipped"
    copy_of_the_code(shipped)
    assert fingerprint(shipped) == fingerprint(ROOT)
    expected = {FINGERPRINT_VARIABLE: fingerprint(ROOT)}
    assert check_in(shipped, **expected).returncode == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    wrong = check_in(elsewhere, PYTHONPATH=str(shipped), **expected)
    assert wrong.returncode == 1 and str(shipped) in wrong.stderr and str(elsewhere) in wrong.stderr
    with (shipped / "jobs/cli.py").open("a") as file:
        file.write("# edited\n")
    edited = check_in(shipped, **expected)
    assert edited.returncode == 1 and "is not the code that was submitted" in edited.stderr


def test_the_fingerprint_sees_names_and_contents_and_ignores_the_rest(tmp_path):
    first = tmp_path / "jobs/a.py"
    first.parent.mkdir()
    first.write_text("x = 1\n")
    before = fingerprint(tmp_path)
    (tmp_path / "jobs/notes.txt").write_text("y")
    (tmp_path / "other.py").write_text("y")
    assert fingerprint(tmp_path) == before
    first.rename(first.with_name("b.py"))
    renamed = fingerprint(tmp_path)
    first.with_name("b.py").write_text("x = 2\n")
    assert len({before, renamed, fingerprint(tmp_path)}) == 3


def test_the_job_record_is_written_when_the_job_is_terminal_only(tmp_path):
    from ray.job_submission import JobDetails

    storage = Storage(str(tmp_path))
    details = JobDetails(type="SUBMISSION", submission_id="s", entrypoint="true", status="RUNNING")
    assert record(storage, "r", details)["status"] == "RUNNING" and not storage.exists("r/job.json")
    record(storage, "r", details.copy(update={"status": type(details.status)("FAILED")}))
    assert json.loads(storage.read_text("r/job.json"))["status"] == "FAILED"


def test_the_upload_holds_the_five_packages_and_little_else(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    create_package(str(ROOT), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        names = archive.namelist()
    assert {f"{package}/__init__.py" for package in PACKAGES} <= set(names)
    assert not [name for name in names if name.split("/")[0] in (".venv", ".git", "runs", "tests")]
    assert (tmp_path / "package.zip").stat().st_size < 5 * 2**20


@pytest.mark.ray
def test_ctrl_c_leaves_the_job_running_and_says_how_to_follow_it(project, embedded_ray):
    follower = """
import sys
from jobs.commands.following import follow_job
from jobs.commands.submitting import Request, submit
entrypoint = sys.executable + " -u -c 'import time; print(123); time.sleep(600)'"
sent = submit(Request("tiny.yaml", ["run.name=detached"], embedded=True, entrypoint=entrypoint), print)
sys.exit(follow_job(sent.jobs, sent.place, sent.job_id, lambda text: print(text, end="", flush=True)))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", follower],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Whoever started the tests in the background of a shell has Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert any(line == "123\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "run detached goes on" in errors and "telar logs -f" in errors
    place = locate("detached", None)
    jobs = Jobs(Address(embedded_ray.dashboard_url, "the embedded cluster", embedded=True))
    assert jobs.of_run(place.url).status.value == "RUNNING"
    assert stop(place, None, now=True, timeout_seconds=30, say=print) == "stopped"
