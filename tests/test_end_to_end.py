"""One real job after another on an embedded Ray: submit, report, resume, stop, lose a rank. All through `telar`."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from cluster import commit
from cluster.storage import Storage
from data.manifest import Manifest
from model.checkpoint import CheckpointReader, load_parameters

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.ray

TINY = {
    "run": {"seed": 5},
    "cluster": {"device": "cpu", "local_cpus": 8},
    "data": {
        "corpora": [
            {
                "name": "calls",
                "kind": "python",
                "path": "code",
                "source": "complete: {signature}",
                "target": "{body}",
                "task": "completion",
                "weight": 2,
            },
            {
                "name": "notes",
                "kind": "python",
                "path": "code",
                "source": "summarize: {signature}\n{body}",
                "target": "{summary}",
                "task": "summary",
            },
        ],
        "tokenizer": {"vocabulary_size": 400},
        "source_tokens": 64,
        "target_tokens": 32,
        "held_out_fraction": 0.3,
        "block_rows": 8,
        "lanes": 2,
    },
    "model": {"d_model": 32, "heads": 2, "d_ff": 64, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1},
    "parallelism": {"data": 2},
    "optimizer": {"warmup_steps": 10},
    "train": {"steps": 6, "global_batch_sequences": 8, "micro_batch_sequences": 2},
    "checkpoint": {"every_steps": 3},
    "evaluate": {"likelihood_records": 16, "generate_records": 4, "max_new_tokens": 8, "slice_records": 8},
    "tracking": {"log_every_steps": 1},
}

# A task that belongs to no corpus: which name a body belongs to.
CHOOSE = {
    "name": "choose",
    "kind": "jsonl",
    "path": "rows.jsonl",
    "request": "choices",
    "source": "summarize: {code}",
    "choices": ["load every {noun}", "close every {noun}"],
    "answer": "0",
    "metric": "accuracy",
}

VERBS = ("load", "save", "merge", "split", "count", "parse", "print", "close", "open", "check")
NOUNS = ("table", "record", "shard", "token", "batch", "queue", "stage", "score")


def write_corpus(folder):
    for number, noun in enumerate(NOUNS * 3):
        lines = [
            f'def {verb}_{noun}_{number}({noun}, limit={number}):\n    """{verb.title()} every {noun} up to the limit '
            f'given."""\n    result = []\n    for item in {noun}[:limit]:\n        result.append({verb}(item))\n'
            "    return result\n"
            for verb in VERBS
        ]
        (folder / f"{noun}_{number}.py").write_text("\n\n".join(lines))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    (folder / "code").mkdir()
    write_corpus(folder / "code")
    evaluate = {**TINY["evaluate"], "tasks": ["tasks/choose.yaml"]}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "evaluate": evaluate}))
    (folder / "tasks").mkdir()
    rows = [{"code": f"def load_{noun}({noun}):", "noun": noun} for noun in NOUNS]
    (folder / "tasks" / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks" / "choose.yaml").write_text(yaml.safe_dump(CHOOSE))
    (folder / "tasks" / "bytes.yaml").write_text(
        yaml.safe_dump({**CHOOSE, "name": "bytes", "normalise": "byte", "compare_with": "choose"})
    )
    return folder


def telar(project, *arguments, check=0, **popen):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        **popen,
    )
    assert done.returncode == check, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def submit(project, name, *more, check=0):
    return telar(project, "submit", "tiny.yaml", "--wait", "--set", f"run.name={name}", *more, check=check)


def metrics(project, name):
    lines = (project / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def events(project, name):
    return [json.loads(line) for line in (project / "runs" / name / "events.jsonl").read_text().splitlines()]


def parameters(project, name, step):
    checkpoints = Storage(str(project / "runs" / name / "checkpoints"))
    return load_parameters(CheckpointReader(checkpoints, commit.read_commit(checkpoints, step)))


@pytest.fixture(scope="module")
def undisturbed(project, embedded_ray):
    submit(project, "undisturbed")
    return "undisturbed"


def test_a_run_leaves_everything_that_the_design_names(project, undisturbed):
    folder = project / "runs" / undisturbed
    for name in ("config.yaml", "manifest.json", "metrics.jsonl", "events.jsonl", "report.html", "job.json"):
        assert (folder / name).is_file(), name
    assert (folder / "logs" / "rank-00000.log").read_text() and (folder / "logs" / "rank-00001.log").read_text()
    assert json.loads((folder / "job.json").read_text())["status"] == "SUCCEEDED"
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert {(cell["corpus"], cell["task"]) for cell in results["cells"]} >= {
        ("calls", "likelihood"),
        ("calls", "completion"),
        ("notes", "likelihood"),
        ("notes", "summary"),
        ("choose", "accuracy"),
    }
    assert [record["step"] for record in metrics(project, undisturbed)] == [1, 2, 3, 4, 5, 6]
    assert commit.committed_steps(Storage(str(folder / "checkpoints"))) == [3, 6]


def test_metrics_count_the_tokens_that_the_shards_hold(project, undisturbed):
    last = metrics(project, undisturbed)[-1]
    storage = Storage(str(project / "runs"))
    refers = json.loads(storage.read_text(f"{undisturbed}/manifest.json"))
    from data.loader import consumed_targets
    from data.shard_server import plain_opener

    manifest = Manifest.read(storage, refers["data"])
    from configs.load import load_config

    config = load_config(project / "runs" / undisturbed / "config.yaml")
    counted = sum(len(ids) for ids in consumed_targets(manifest, config, plain_opener(storage, manifest), 6))
    assert last["tokens"] == counted > 0


def test_a_second_run_reuses_the_prepared_data_and_trains_the_same_model(project, undisturbed):
    submit(project, "again", "--stage", "prepare")
    assert [event["event"] for event in events(project, "again")][:2] == ["stage_started", "stage_skipped"]
    # What a scheduler types when it starts a lost job anew.
    submit(project, "again", "--or-resume", "--stage", "train")
    first, second = parameters(project, undisturbed, 6), parameters(project, "again", 6)
    assert first.keys() == second.keys()
    assert all((first[name] == second[name]).all() for name in first)


def test_a_damaged_rank_file_is_named_and_the_commit_before_it_used(project, undisturbed):
    checkpoints = Storage(str(project / "runs/again/checkpoints"))
    path = f"{commit.read_commit(checkpoints, 6).folder}/{commit.rank_file_name(1)}"
    content = bytearray(checkpoints.read_bytes(path))
    content[-5] ^= 1
    checkpoints.write_bytes(path, bytes(content))
    said = telar(project, "submit", "--resume", "again", "--set", "train.steps=7", "--stage", "train", "--wait").stdout
    assert path in said and "falling back to the commit before step 6" in said
    assert commit.committed_steps(checkpoints) == [3, 6, 7]
    redone = [record for record in metrics(project, "again") if record["attempt"] > 1]
    assert [record["step"] for record in redone] == [4, 5, 6, 7]
    assert [record["loss"] for record in redone[:3]] == [record["loss"] for record in metrics(project, undisturbed)[3:]]


@pytest.mark.slow
def test_a_finished_run_is_evaluated_on_one_more_task(project, undisturbed):
    before = json.loads((project / "runs" / undisturbed / "evaluation" / "results.json").read_text())
    assert before["slices_reused"] == 0
    telar(project, "evaluate", undisturbed, "--tasks", "tasks/bytes.yaml")
    after = json.loads((project / "runs" / undisturbed / "evaluation" / "results.json").read_text())
    assert after["slices_reused"] == before["slices"] == after["slices"] - 1, "only the new task was answered"
    assert [c for c in after["cells"] if c["corpus"] != "bytes"] == before["cells"]
    (cell,) = (c for c in after["cells"] if c["corpus"] == "bytes")
    assert [metric["name"] for metric in cell["metrics"]] == ["accuracy", "drop"]


@pytest.mark.slow
def test_a_finished_run_resumed_with_more_steps_equals_one_long_run(project, undisturbed):
    submit(project, "short", "--set", "train.steps=3", "--stage", "prepare")
    telar(project, "submit", "--resume", "short", "--stage", "train", "--wait")
    assert metrics(project, "short")[-1]["step"] == 3
    telar(project, "submit", "--resume", "short", "--set", "train.steps=6", "--stage", "train", "--wait")
    assert [record["step"] for record in metrics(project, "short")] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(metrics(project, undisturbed), metrics(project, "short"), strict=True):
        assert one["loss"] == other["loss"]
    first, second = parameters(project, undisturbed, 6), parameters(project, "short", 6)
    assert all((first[name] == second[name]).all() for name in first)


@pytest.mark.slow
def test_stages_of_tensor_ranks_train_the_same_model(project, undisturbed):
    submit(project, "shared", "--set", "parallelism={data: 1, pipeline: 2, tensor: 2}")
    assert sorted(path.name for path in (project / "runs/shared/logs").glob("rank-*.log")) == [
        f"rank-{rank:05d}.log" for rank in range(4)
    ]
    (started,) = (event for event in events(project, "shared") if event["event"] == "ranks_started")
    assert len(set(started["pids"])) == 4
    for one, other in zip(metrics(project, undisturbed), metrics(project, "shared"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
        assert one["tokens"] == other["tokens"]
    first, second = parameters(project, undisturbed, 6), parameters(project, "shared", 6)
    assert first.keys() == second.keys()
    # Gradients of key biases are 0 but for rounding, which Adam's eps of 1e-9 turns into steps.
    assert [
        name for name in first if not name.endswith("key.bias") and (first[name] - second[name]).abs().max() >= 1e-4
    ] == []
    # The checkpoint of stages and slices was evaluated, in whole, and two replicas go on from it.
    assert (project / "runs/shared/evaluation/results.json").is_file()
    more = ["--set", "parallelism={data: 2}", "--set", "train.steps=7", "--stage", "train", "--wait"]
    telar(project, "submit", "--resume", "shared", *more)
    assert metrics(project, "shared")[-1]["step"] == 7 and metrics(project, "shared")[-1]["world_size"] == 2


def wait_for(condition, what, seconds=300):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return found


def step_of(project, name):
    file = project / "runs" / name / "status.json"
    return json.loads(file.read_text())["step"] if file.is_file() else 0


def test_a_stop_commits_and_the_run_goes_on_from_there(project, undisturbed):
    telar(project, "submit", "tiny.yaml", "--set", "run.name=halted", "--set", "train.steps=100000")
    wait_for(lambda: step_of(project, "halted") >= 4, "step 4")
    telar(project, "stop", "halted")
    status = json.loads(telar(project, "status", "halted", "--json", check=3).stdout)
    assert status["state"] == "stopped"
    step = status["status"]["step"]
    assert commit.committed_steps(Storage(str(project / "runs/halted/checkpoints")))[-1] == step
    telar(project, "submit", "--resume", "halted", "--set", f"train.steps={step + 2}", "--stage", "train", "--wait")
    assert [record["step"] for record in metrics(project, "halted")] == list(range(1, step + 3))


def latest_commit(project, name):
    return commit.committed_steps(Storage(str(project / "runs" / name / "checkpoints")))[-1]


def test_stopping_now_still_commits_when_the_entrypoint_gets_sigterm(project, undisturbed):
    telar(project, "submit", "tiny.yaml", "--set", "run.name=hurried", "--set", "train.steps=100000")
    wait_for(lambda: step_of(project, "hurried") >= 4, "step 4")
    telar(project, "stop", "hurried", "--now")
    status = json.loads((project / "runs/hurried/status.json").read_text())
    assert status["state"] == "stopped" and latest_commit(project, "hurried") == status["step"]


def test_a_run_goes_on_without_its_entrypoint_and_can_be_stopped(project, undisturbed):
    telar(project, "submit", "tiny.yaml", "--set", "run.name=headless", "--set", "train.steps=100000")
    wait_for(lambda: step_of(project, "headless") >= 2, "step 2")
    entrypoints = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"jobs.run", str(project / "runs/headless")} <= set(process.info["cmdline"] or [])
    ]
    assert entrypoints
    for process in entrypoints:
        process.kill()
    step = step_of(project, "headless")
    wait_for(lambda: step_of(project, "headless") > step + 2, "more steps")
    assert "is going on" in telar(project, "submit", "--resume", "headless", check=2).stderr
    telar(project, "stop", "headless")
    status = json.loads((project / "runs/headless/status.json").read_text())
    assert status["state"] == "stopped" and latest_commit(project, "headless") == status["step"]


def test_a_killed_rank_is_replaced_from_the_last_commit(project, undisturbed):
    telar(project, "submit", "tiny.yaml", "--set", "run.name=wounded", "--set", "train.steps=200", "--stage", "prepare")
    telar(project, "watch", "wounded")
    telar(project, "submit", "--resume", "wounded", "--stage", "train")
    wait_for(lambda: step_of(project, "wounded") >= 5, "step 5")
    pids = [event for event in events(project, "wounded") if event["event"] == "ranks_started"][-1]["pids"]
    os.kill(pids[1], signal.SIGKILL)
    telar(project, "watch", "wounded")
    kinds = [event["event"] for event in events(project, "wounded")]
    assert kinds.count("attempt_failed") == 1 and kinds.count("attempt_started") == 2
    by_attempt = {record["attempt"] for record in metrics(project, "wounded")}
    assert by_attempt == {1, 2}
    last = [record for record in metrics(project, "wounded") if record["attempt"] == 2]
    assert last[0]["step"] % 3 == 1 and last[-1]["step"] == 200
    seen = {}
    for record in metrics(project, "wounded"):
        assert seen.setdefault(record["step"], record["loss"]) == record["loss"]
