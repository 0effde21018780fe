"""The command line as a user meets it: real processes, exit codes, messages, and nothing left after an error."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "cluster": {"device": "cpu", "local_cpus": 8},
    "data": {
        "corpora": [{"name": "calls", "kind": "python", "path": "code", "source": "{signature}", "target": "{body}"}]
    },
    "model": {"d_model": 32, "heads": 2, "d_ff": 64, "encoder_layers": 1, "decoder_layers": 1},
    "parallelism": {"data": 2},
    "train": {"steps": 6, "global_batch_sequences": 32, "micro_batch_sequences": 2},
}
RAY_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "TELAR_STORAGE", "TELAR_DEBUG")


@pytest.fixture
def project(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text('def f():\n    """One."""\n    return 1\n')
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    return tmp_path


def telar(folder, *arguments, home=None, **variables):
    """Run the command; each test has a TELAR_HOME of its own unless it names one."""
    kept = {name: value for name, value in os.environ.items() if name not in RAY_VARIABLES}
    home = str(home or folder / "home")
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=folder,
        env={**kept, "PYTHONPATH": str(ROOT), "TELAR_HOME": home, **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )


def ray_processes(home):
    """Processes of a cluster whose state lies in `home`, whether it is recorded there or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(home) in " ".join(process.cmdline()) or process.environ().get("TELAR_HOME") == str(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def refused(folder, code, *patterns, arguments=("submit", "tiny.yaml"), **variables):
    """The command fails with this code and one message with these parts; no run, no Ray process, no traceback."""
    done = telar(folder, *arguments, **variables)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for pattern in patterns:
        assert pattern in done.stderr, f"{pattern!r} not in {done.stderr}"
    assert not (folder / "runs").exists() or not any((folder / "runs").iterdir())
    assert not ray_processes(folder / "home")
    return done


def test_help_imports_nothing_that_is_slow(project):
    command = [sys.executable, "-X", "importtime", "-m", "jobs.cli", "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "submit" in done.stdout
    assert "click" in imported and not {"torch", "ray", "deepspeed", "numpy", "pydantic", "fsspec"} & imported


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=1", ("train.stepz", "did you mean train.steps?")),
        ("train.steps=many", ("train.steps", "'many'")),
        ("model.heads=3", ("model.heads: 3 heads do not divide d_model = 32", "set model.heads to 2")),
        ("model.attention.kind=sparse", ("model.attention.kind", "'full', 'window', 'blocklog' or 'linear'")),
        ("data.corpora.calls.path=nowhere", ("data.corpora.calls.path", "nowhere does not exist")),
        ("run.name=a/b", ("run.name",)),
        ("run.name=data", ("run.name", "prepared data")),
        ("cluster.address=ray://host:10001", ("cluster.address", "http://host:8265")),
    ],
)
def test_a_wrong_field_is_named(project, override, parts):
    refused(project, 2, *parts, arguments=("submit", "tiny.yaml", "--set", override))


def test_more_tokens_than_learned_positions_are_named(project):
    changed = {**CONFIG, "model": {**CONFIG["model"], "positions": "learned", "max_positions": 64}}
    (project / "tiny.yaml").write_text(yaml.safe_dump(changed))
    refused(project, 2, "data.source_tokens", "are more than the 64 learned positions", "set model.max_positions to")


def test_a_missing_configuration_is_named(project):
    refused(project, 2, "tiny.yml", "did you mean", arguments=("submit", "tiny.yml"))


def text_corpus(project, path):
    content = {**CONFIG, "data": {"corpora": [{"name": "prose", "kind": "text", "path": path, "target": "{text}"}]}}
    content["data"]["corpora"][0]["continuation"] = True
    (project / "tiny.yaml").write_text(yaml.safe_dump(content))


def test_a_missing_corpus_is_named(project):
    text_corpus(project, "nowhere")
    refused(project, 2, "data.corpora.prose.path", "nowhere does not exist", "relative to the configuration file")


def test_a_corpus_folder_without_matching_files_is_named(project):
    text_corpus(project, "code")
    refused(project, 1, "data.corpora[prose].path", "no file of", "change path, kind or exclude")


def test_an_empty_corpus_is_named(project):
    (project / "empty.txt").write_text("\n \n")
    text_corpus(project, "empty.txt")
    refused(project, 1, "data.corpora[prose].path", "empty.txt holds no text", "put content there")


def test_a_corpus_that_is_not_utf8_is_named_with_the_byte(project):
    (project / "latin.txt").write_bytes(b"plain, then caf\xe9\n")
    text_corpus(project, "latin.txt")
    refused(project, 1, "data.corpora[prose].path", "latin.txt is not UTF-8 (byte 15)", "iconv")


def test_storage_that_cannot_be_written_is_named(project):
    (project / "file").write_text("in the way")
    arguments = ("submit", "tiny.yaml", "--storage", "file/below")
    refused(project, 1, "run.storage", str(project / "file/below"), arguments=arguments)
    refused(project, 1, "run.storage", "/proc/telar", TELAR_STORAGE="/proc/telar")


@pytest.mark.parametrize("origin", ["--address", "cluster.address", "RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_an_address_that_does_not_answer_is_named_with_its_origin(project, origin):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    arguments, variables = ["submit", "tiny.yaml"], {}
    if origin == "--address":
        arguments += ["--address", url]
    elif origin == "cluster.address":
        arguments += ["--set", f"cluster.address={url}"]
    else:
        variables[origin] = url
    started = time.monotonic()
    refused(project, 4, url, f"from {origin}", arguments=arguments, **variables)
    assert time.monotonic() - started < 15


def test_a_ray_address_that_is_no_dashboard_is_explained(project):
    refused(project, 2, "RAY_ADDRESS: 'auto'", "--embedded", RAY_ADDRESS="auto")


def test_ports_in_use_name_the_field(project):
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 65535))
        taken.listen()
        arguments = ("submit", "tiny.yaml", "--set", "cluster.dashboard_port=65535")
        refused(project, 2, "cluster.dashboard_port", "65535", arguments=arguments)


def test_too_few_cpus_in_the_configuration_say_how_many(project):
    refused(
        project, 2, "cluster.local_cpus", "need 9", arguments=("submit", "tiny.yaml", "--set", "parallelism.data=9")
    )


@pytest.mark.ray
def test_too_few_cpus_end_the_cluster_that_was_started_for_it(project):
    overrides = ("--set", "cluster.device=auto", "--set", "cluster.local_cpus=1")
    done = refused(
        project, 1, "parallelism.data: 2 ranks", "need 2 CPUs", arguments=("submit", "tiny.yaml", *overrides)
    )
    assert "started the embedded cluster" in done.stderr
    assert not (project / "home/cluster.json").exists()


@pytest.mark.ray
def test_too_few_cpus_on_the_running_cluster_leave_it_running(project, embedded_ray):
    arguments = ("submit", "tiny.yaml", "--set", "parallelism.data=9", "--set", "cluster.local_cpus=9")
    done = telar(project, *arguments, home=os.environ["TELAR_HOME"])
    assert done.returncode == 1 and "need 9 CPUs; the embedded cluster has 8 logical CPUs" in done.stderr
    assert not (project / "runs").exists()
    assert json.loads(telar(project, "up", "--json", home=os.environ["TELAR_HOME"]).stdout)["started_by_us"] is False


def make_run(project, name, **status):
    folder = project / "runs" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    if status:
        (folder / "status.json").write_text(json.dumps({"updated_unix": time.time(), "started_unix": 1, **status}))


def test_a_run_name_that_exists_is_refused(project):
    make_run(project, "mine")
    done = telar(project, "submit", "tiny.yaml", "--set", "run.name=mine")
    assert done.returncode == 2 and "run.name: run 'mine' exists" in done.stderr and "--resume mine" in done.stderr
    assert [path.name for path in (project / "runs/mine").iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("verb", ["status", "watch", "logs", "stop", "report"])
def test_an_unknown_run_is_refused_with_the_nearest_name(project, verb):
    make_run(project, "smoke-1")
    done = telar(project, verb, "smoke-2")
    assert done.returncode == 2 and "did you mean smoke-1?" in done.stderr and str(project / "runs") in done.stderr


def test_resume_refuses_what_would_make_it_another_run(project):
    make_run(project, "mine")
    before = (project / "runs/mine/config.yaml").read_text()
    done = telar(project, "submit", "--resume", "mine", "--set", "model.d_ff=128")
    assert done.returncode == 2 and "model.d_ff" in done.stderr and "start a new run" in done.stderr
    done = telar(project, "submit", "tiny.yaml", "--resume", "mine")
    assert done.returncode == 2 and "leave CONFIG out" in done.stderr
    done = telar(project, "submit", "--resume", "yours")
    assert done.returncode == 2 and "no run 'yours'" in done.stderr
    assert (project / "runs/mine/config.yaml").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("submit",), "CONFIG"),
        (("submit", "tiny.yaml", "--down"), "--wait"),
        (("submit", "tiny.yaml", "--embedded", "--address", "http://h:1"), "--embedded"),
        (("submit", "tiny.yaml", "--stage", "sleep"), "--stage"),
        (("fly",), "fly"),
    ],
)
def test_wrong_usage_exits_with_two(project, arguments, part):
    refused(project, 2, part, arguments=arguments)


def test_json_errors_are_one_object(project):
    done = telar(project, "status", "nothing", "--json")
    answer = json.loads(done.stdout)
    assert done.returncode == answer["exit_code"] == 2 and "nothing" in answer["error"]


def test_status_and_list_read_storage_alone(project):
    make_run(project, "old", state="finished", step=6, steps=6, loss=1.5, tokens=99, world_size=2)
    make_run(project, "bad", state="failed", step=2, steps=6, message="rank 1 failed")
    make_run(project, "dead", state="training", step=3, steps=6, updated_unix=time.time() - 600)
    make_run(project, "new")
    answer = json.loads(telar(project, "list", "--json").stdout)
    states = {row["run"]: row["state"] for row in answer["runs"]}
    assert states == {"old": "finished", "bad": "failed", "dead": "silent", "new": "submitted"}
    done = telar(project, "status", "old")
    assert done.returncode == 0 and "step 6/6 (100%)" in done.stdout and "loss 1.500" in done.stdout
    assert telar(project, "status", "bad").returncode == 1
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    by_url = telar(elsewhere, "status", str(project / "runs/old"), "--json")
    assert json.loads(by_url.stdout)["state"] == "finished"


def test_a_run_of_a_cluster_that_is_gone_is_unreachable(project):
    make_run(project, "dead", state="training", step=3, steps=6, updated_unix=time.time() - 600)
    for verb in ("logs", "stop", "watch"):
        done = telar(project, verb, "dead")
        assert done.returncode == 4 and "--resume dead" in done.stderr, done.stderr


def test_rank_logs_come_from_storage(project):
    make_run(project, "old", state="finished", step=6, steps=6)
    (project / "runs/old/logs").mkdir()
    (project / "runs/old/logs/rank-00001.log").write_text("line of rank 1\n")
    assert telar(project, "logs", "old", "--rank", "1").stdout == "line of rank 1\n"
    done = telar(project, "logs", "old", "--rank", "7")
    assert done.returncode == 2 and "rank-00001.log" in done.stderr


def test_doctor_names_what_is_wrong_and_how_to_mend_it(project):
    good = telar(project, "doctor", "--json")
    checks = {check["name"]: check for check in json.loads(good.stdout)["checks"]}
    assert {"python", "packages", "hardware", "compiler", "storage", "ports", "cluster"} <= set(checks)
    assert checks["storage"]["state"] == "ok" and not (project / "runs").exists()
    bad = telar(project, "doctor", "--storage", "/proc/telar", PATH="")
    assert bad.returncode == 1 and "fail storage" in bad.stdout
    assert "no C++ compiler" in bad.stdout and "apt-get install g++" in bad.stdout


def test_down_without_a_cluster_says_so(project):
    done = telar(project, "down")
    assert done.returncode == 0 and "no embedded cluster" in done.stdout
