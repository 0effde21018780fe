"""`make smoke` as a newcomer types it, and what must be true of the run that it leaves."""

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    storage = tmp_path_factory.mktemp("smoke")
    home = tempfile.mkdtemp(prefix="telar-s-", dir="/tmp")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    # A cluster that is not there: `make smoke` must not look at it.
    return storage, {
        **kept,
        "TELAR_STORAGE": str(storage),
        "TELAR_HOME": home,
        "RAY_ADDRESS": "http://127.0.0.1:9",
        "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9",
        # Other tests run at the same time (tests/conftest.py).
        "RAY_worker_niceness": "0",
    }


def run(command, environment):
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def smoke(place):
    storage, environment = place
    before = {process.pid for process in psutil.process_iter()}
    shared = set(Path("/dev/shm").iterdir())
    output = run(["make", "smoke", "SMOKE_RUN=first"], environment)
    left = [
        process.name()
        for process in psutil.process_iter()
        if process.pid not in before and any(word in process.name() for word in ("ray", "gcs_server"))
    ]
    files = set(Path("/dev/shm").iterdir()) - shared
    files -= in_use()
    return storage / "first", output, left, {file for file in files if file.exists()}


def in_use():
    """Files of /dev/shm that a living process has mapped: other tests run at the same time."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found |= {Path(each.path) for each in process.memory_maps() if each.path.startswith("/dev/shm/")}
    return found


def metric(results, corpus, task, name):
    for cell in results["cells"]:
        if (cell["corpus"], cell["task"]) == (corpus, task):
            return next(metric for metric in cell["metrics"] if metric["name"] == name)
    raise AssertionError(f"no cell {task} of {corpus}")


def baseline(found, name):
    return next(each for each in found["baselines"] if each["name"] == name)


@pytest.fixture(scope="module")
def results(smoke):
    return json.loads((smoke[0] / "evaluation" / "results.json").read_text())


def test_nothing_is_left_running(smoke):
    _, _, processes, files = smoke
    assert processes == [] and files == set()


def test_the_jobs_api_says_succeeded(smoke):
    assert json.loads((smoke[0] / "job.json").read_text())["status"] == "SUCCEEDED"
    assert json.loads((smoke[0] / "status.json").read_text())["state"] == "finished"


def test_the_loss_falls_by_two_nats(smoke):
    losses = [json.loads(line)["loss"] for line in (smoke[0] / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] - losses[-1] >= 2.0


def test_held_out_text_is_predicted_far_better_than_by_token_frequencies(results):
    nll = metric(results, "all corpora", "likelihood", "nll")
    unigram = baseline(nll, "unigram")
    assert nll["value"] <= unigram["value"] - 1.5
    assert unigram["difference_high"] <= -1.5
    assert 3.0 < baseline(nll, "bigram")["value"] < unigram["value"]


def test_the_encoder_is_used(results):
    shuffled = baseline(metric(results, "summary", "summary", "reference_nll"), "shuffled sources")
    assert shuffled["difference_high"] < 0.0


def test_the_report_is_one_file_with_the_figures(smoke, results):
    page = (smoke[0] / "report.html").read_text()
    assert f"{metric(results, 'all corpora', 'likelihood', 'nll')['value']:.3f}" in page
    assert len(results["samples"]) == 10


def test_a_second_run_reuses_data_and_operators(smoke, place):
    storage, environment = place
    small = ["train.steps=2", "evaluate.likelihood_records=8", "evaluate.generate_records=4", "run.name=second"]
    command = [".venv/bin/telar", "submit", "configs/smoke.yaml", "--embedded", "--wait", "--down"]
    output = run([*command, *[part for one in small for part in ("--set", one)]], environment)
    assert "stage prepare: already done" in output
    assert "operators: built" not in output
    assert len((storage / "second" / "metrics.jsonl").read_text().splitlines()) == 2
