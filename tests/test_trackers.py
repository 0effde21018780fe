"""Trackers, read back with their own readers: all figures, one curve after a resume, failures that stop nothing."""

import functools
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster.storage import Storage
from configs.errors import ConfigError, StorageError
from configs.load import apply_overrides, flat, parse_config
from jobs.ledger import Ledger
from jobs.trackers import base
from jobs.trackers.base import FIGURES, Feed, Ids, check_installed
from tests.test_end_to_end import TINY

ROOT = Path(__file__).resolve().parent.parent


def config(*trackers):
    return parse_config(apply_overrides(TINY, [f"tracking.trackers=[{', '.join(trackers)}]"]), "test")


def record(step, loss, attempt=1):
    found = dict.fromkeys(FIGURES, 1.0)
    return {**found, "step": step, "loss": loss, "attempt": attempt, "unix_seconds": 1.0}


def run_of(storage, *trackers, state="finished", steps):
    """One controller's life: attempts as lists of (step, loss)."""
    ledger = Ledger(storage, "r", config(*trackers))
    for attempt in steps:
        number = ledger.begin_attempt()
        for step, loss in attempt:
            ledger.record_step(record(step, loss, number))
    ledger.update(state=state)
    ledger.close()


FIRST = [[(1, 5.0), (2, 4.0), (3, 9.0), (4, 9.0)], [(3, 3.0)]]
SECOND = [[(4, 2.0), (5, 1.5)]]
CURVE = [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0), (5, 1.5)]


@pytest.mark.parametrize("url", ["{tmp}", "memory://oper/{tmp}"], ids=["folder", "object store"])
def test_tensorboard_shows_one_curve_of_all_attempts(tmp_path, url):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    storage = Storage(url.format(tmp=tmp_path))
    run_of(storage, "tensorboard", steps=FIRST, state="stopped")
    run_of(storage, "tensorboard", steps=SECOND)
    seen, files = tmp_path / "seen", storage.child("r", "tensorboard")
    seen.mkdir()
    names = files.names()
    assert len(names) == 2
    for name in names:
        (seen / name).write_bytes(files.read_bytes(name))
    found = accumulators.EventAccumulator(str(seen)).Reload()
    assert {f"train/{name}" for name in FIGURES} == set(found.Tags()["scalars"])
    curve = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert curve == CURVE, "steps that were thrown away are drawn, or some are missing"
    assert json.loads(storage.read_text("r/tracking.json")) == {"tensorboard": "tensorboard"}


def test_tensorboard_begins_a_new_object_when_one_is_large(tmp_path, monkeypatch):
    files = pytest.importorskip("jobs.trackers.tensorboard_files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(files, "ROTATE_BYTES", 2000)
    run_of(Storage(str(tmp_path)), "tensorboard", steps=[[(step, 1.0 / step) for step in range(1, 41)]])
    assert len(list((tmp_path / "r/tensorboard").iterdir())) > 3
    found = EventAccumulator(str(tmp_path / "r/tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 41))


def test_mlflow_has_one_run_in_the_folder_beside_the_runs(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage(str(tmp_path))
    run_of(storage, "mlflow", steps=FIRST, state="stopped")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=f"file:{tmp_path}/mlruns")
    known = json.loads((tmp_path / "r/tracking.json").read_text())["mlflow"]
    assert client.get_run(known).info.status == "KILLED"
    run_of(storage, "mlflow", steps=SECOND)
    experiment = client.get_experiment_by_name("telar").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.run_id == known and run.info.status == "FINISHED" and run.info.run_name == "r"
    assert run.data.params["model.d_model"] == "32" and run.data.metrics["train/loss"] == 1.5
    last = {metric.step: metric.value for metric in client.get_metric_history(known, "train/loss")}
    assert sorted(last.items()) == CURVE


def test_mlflow_without_a_server_needs_local_storage(monkeypatch):
    mlflow_run = pytest.importorskip("jobs.trackers.mlflow_run", reason="needs the extra mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    storage = Storage("memory://oper-mlflow")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI"):
        mlflow_run.MlflowRun(storage.child("r"), "r", "telar", Ids(storage), {})


def test_wandb_writes_offline_runs_of_one_id(tmp_path):
    """In a process of its own: W&B starts a service that lives as long as its process."""
    pytest.importorskip("wandb", reason="needs the extra wandb")
    code = f"""
from cluster.storage import Storage
from tests.test_trackers import FIRST, SECOND, run_of
run_of(Storage({str(tmp_path)!r}), "wandb", steps=FIRST, state="stopped")
run_of(Storage({str(tmp_path)!r}), "wandb", steps=SECOND)
"""
    variables = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **variables}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    known = json.loads((tmp_path / "r/tracking.json").read_text())["wandb"]
    written = sorted((tmp_path / "r/wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert written and sorted((tmp_path / "r/wandb").glob("offline-run-*")) == [file.parent for file in written]
    assert wandb_curve(written) == [*FIRST[0], *FIRST[1], *SECOND[0]]


def wandb_curve(files):
    """(step, loss) of all rows of W&B's files: LevelDB's log format (blocks of 32 KiB) after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = []
    for file in files:
        data, at, whole = file.read_bytes(), 7, b""
        while at + 7 <= len(data):
            if 32768 - at % 32768 < 7:
                at += 32768 - at % 32768
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + length], at + 7 + length
            if kind in (1, 4):
                found = Record.FromString(whole)
                items = {item.key or "/".join(item.nested_key): item.value_json for item in found.history.item}
                whole = b""
                if "train/loss" in items:
                    rows.append((int(float(items["step"])), float(items["train/loss"])))
    return rows


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(base.PACKAGES, "wandb", "no_such_package")
    with pytest.raises(
        ConfigError, match=r"wandb is not installed on this machine; run `pip install 'telar\[wandb\]'`"
    ):
        check_installed(config("wandb"), "this machine")


def test_every_extra_stands_in_the_project_file():
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(base.PACKAGES) <= set(extras)


class Broken:
    errors = (StorageError,)

    def __init__(self, *_):
        self.logged = 0

    def log(self, step, figures):
        self.logged += 1
        if self.logged == 2:
            raise StorageError("the server is away")

    def close(self, state):
        raise AssertionError("a tracker that failed is closed")


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_class_of", lambda name: Broken)
    run_of(Storage(str(tmp_path)), "tensorboard", steps=[[(step, 1.0) for step in range(1, 20)]])
    assert len((tmp_path / "r/metrics.jsonl").read_text().splitlines()) == 19
    events = [json.loads(line) for line in (tmp_path / "r/events.jsonl").read_text().splitlines()]
    (told,) = [event["detail"] for event in events if event["event"] == "problem"]
    assert "tensorboard gets no more figures (StorageError: the server is away)" in told


def test_a_slow_tracker_does_not_hold_up_training(monkeypatch):
    monkeypatch.setattr(base, "QUEUED_STEPS", 3)
    monkeypatch.setattr(base, "CLOSE_SECONDS", 0.2)
    free, told = threading.Event(), []

    class Slow(Broken):
        def log(self, step, figures):
            free.wait(30)

        def close(self, state):
            pass

    feed = Feed("wandb", functools.partial(Slow), told.append)
    for step in range(100):
        feed.record(record(step, 1.0))
    feed.close("finished")
    free.set()
    assert len(told) == 1 and "did not take all" in told[0]


def test_settings_are_the_fields_below_the_named_ones():
    found = flat(config(), ("model", "run.seed"))
    assert found["model.d_model"] == 32 and found["run.seed"] == 5
    assert "train.steps" not in found and "run.storage" not in found
