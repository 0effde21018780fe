"""The loop with a scripted engine, and the run's books: steps, commits, attempts, lines."""

import json
from dataclasses import dataclass

import pytest

from cluster import commit
from cluster.commit import RankFile
from cluster.storage import Storage
from configs.load import parse_config
from jobs.ledger import Ledger, duration
from jobs.loop import Course, train
from tests.test_configs import tree


@dataclass
class Result:
    loss: float
    stop: bool = False
    nll: float = 1.0
    grad_norm: float = 0.5
    target_tokens: int = 100


class ScriptedEngine:
    def __init__(self):
        self.steps, self.rates = [], []

    def train_step(self, batches, step, learning_rate, stop, before_update):
        before_update()
        self.steps.append((step, batches))
        self.rates.append(learning_rate)
        return Result(loss=10.0 - step, stop=stop)


class CountingBatches:
    data_wait_seconds = 0.25

    def __init__(self):
        self.handed = 0

    def next_step(self):
        self.handed += 1
        return [f"batch {self.handed}"]


class Recorder:
    def __init__(self, stop_at=None):
        self.records, self.saved, self.stop_at, self.safe = [], [], stop_at, []

    def on_step(self, record):
        self.records.append(record)

    def before_update(self):
        self.safe.append(len(self.records))

    def stop_requested(self):
        return self.stop_at is not None and len(self.records) + 1 >= self.stop_at

    def checkpoint(self, step, tokens):
        self.saved.append((step, tokens))


def run_loop(first=1, last=10, every=4, tokens=0, stop_at=None):
    engine, recorder = ScriptedEngine(), Recorder(stop_at)
    course = Course(first, last, tokens, every, world_size=2, attempt=3)
    end = train(engine, CountingBatches(), lambda step: step / 100, recorder, course, lambda: 77)
    return engine, recorder, end


def test_the_loop_takes_every_step_once_and_commits_on_schedule():
    engine, recorder, end = run_loop()
    assert [step for step, _ in engine.steps] == list(range(1, 11))
    assert engine.rates == [step / 100 for step in range(1, 11)]
    assert recorder.saved == [(4, 400), (8, 800), (10, 1000)]
    assert recorder.safe == list(range(10))
    assert (end.step, end.tokens, end.stopped) == (10, 1000, False)
    record = recorder.records[4].as_dict()
    assert (record["step"], record["tokens"], record["loss"], record["attempt"]) == (5, 500, 5.0, 3)
    assert (record["data_wait_seconds"], record["memory_bytes"], record["world_size"]) == (0.25, 77, 2)


def test_the_loop_resumes_where_it_was():
    engine, recorder, end = run_loop(first=5, tokens=400)
    assert [step for step, _ in engine.steps] == [5, 6, 7, 8, 9, 10]
    assert recorder.saved == [(8, 800), (10, 1000)]
    assert end.tokens == 1000


def test_a_stop_commits_the_step_it_ends_on():
    engine, recorder, end = run_loop(stop_at=6)
    assert len(engine.steps) == 6
    assert recorder.saved == [(4, 400), (6, 600)]
    assert end.stopped


def test_nothing_is_left_to_train():
    engine, recorder, end = run_loop(first=11, tokens=1000)
    assert engine.steps == [] and recorder.saved == []
    assert (end.step, end.stopped) == (10, False)


@pytest.fixture
def ledger(tmp_path):
    book = Ledger(Storage(str(tmp_path)), "r", parse_config(tree(tracking__log_every_steps=2), "here"))
    yield book
    book.close()


def record(step, attempt):
    numbers = {"loss": 2.0, "nll": 1.9, "learning_rate": 0.1, "grad_norm": 1.0, "tokens_per_second": 50.0}
    return {
        "step": step,
        "tokens": step * 10,
        "data_wait_seconds": 0.1,
        "step_seconds": 2.0,
        "world_size": 1,
        "attempt": attempt,
        "unix_seconds": 0.0,
        "memory_bytes": 2**30,
        **numbers,
    }


def test_steps_become_metrics_status_and_lines(ledger):
    attempt = ledger.begin_attempt()
    for step in (1, 2, 3, 4):
        ledger.record_step(record(step, attempt))
    lines = ledger.folder.read_text("metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert (ledger.status["step"], ledger.status["tokens"]) == (4, 40)
    assert [line.split(" loss")[0] for line in ledger.lines(0)] == [
        "step 1/4 (25%)",
        "step 2/4 (50%)",
        "step 4/4 (100%)",
    ]
    assert "data 5%" in ledger.lines(0)[0] and "eta 6s" in ledger.lines(0)[0]


def state(*quarantined):
    return {"data_state": {"quarantined": list(quarantined)}}


def test_an_attempt_that_is_over_writes_nothing(ledger):
    old = ledger.begin_attempt()
    new = ledger.begin_attempt()
    assert new == old + 1
    ledger.record_step(record(1, old))
    assert ledger.status["step"] == 0
    file = RankFile(0, "rank-00000.safetensors", 1, "x")
    ledger.record_rank_file(4, old, file, 1, state())
    assert commit.committed_steps(ledger.checkpoints) == []


def test_attempt_numbers_go_on_after_a_restart_of_the_books(ledger, tmp_path):
    first = ledger.begin_attempt()
    again = Ledger(Storage(str(tmp_path)), "r", parse_config(tree(), "here"))
    assert again.begin_attempt() == first + 1
    again.close()


def test_records_that_were_lost_with_a_process_are_completed_once(ledger, tmp_path):
    attempt = ledger.begin_attempt()
    assert ledger.record_step(record(1, attempt)) and not ledger.record_step(record(2, attempt + 1))
    assert not ledger.record_step(record(1, attempt)), "sent twice"
    assert ledger.steps_known(attempt) == (1, 1) and ledger.steps_known(attempt + 1) == (0, 0)
    again = Ledger(Storage(str(tmp_path)), "r", parse_config(tree(), "here"))
    again.complete([record(step, attempt) for step in (1, 2, 3)])
    number = again.begin_attempt()
    again.record_step(record(4, number))
    again.complete([record(4, number)])
    again.close()
    lines = [json.loads(line) for line in ledger.folder.read_text("metrics.jsonl").splitlines()]
    assert [(line["step"], line["attempt"]) for line in lines] == [(1, 1), (2, 1), (3, 1), (4, 2)]


def test_the_last_rank_commits_and_a_bad_file_does_not(ledger):
    attempt = ledger.begin_attempt()
    folder = commit.attempt_folder(4, attempt)
    for rank in (0, 1):
        ledger.checkpoints.write_bytes(f"{folder}/{commit.rank_file_name(rank)}", b"12345")
    ledger.record_rank_file(4, attempt, RankFile(0, commit.rank_file_name(0), 5, "d0"), 2, {"tokens": 1, **state()})
    assert commit.committed_steps(ledger.checkpoints) == []
    ledger.record_rank_file(4, attempt, RankFile(1, commit.rank_file_name(1), 5, "d1"), 2, {"tokens": 1, **state("b")})
    assert commit.committed_steps(ledger.checkpoints) == [4]
    assert ledger.status["last_commit_step"] == 4
    assert commit.read_commit(ledger.checkpoints, 4).manifest["data_state"]["quarantined"] == ["b"]
    assert [line for line in ledger.lines(0) if "masked" in line] == [ledger.lines(0)[-1]] and "b" in ledger.lines(0)[
        -1
    ]
    ledger.record_rank_file(8, attempt, RankFile(0, "rank-00000.safetensors", 5, "d0"), 1, state())
    assert commit.committed_steps(ledger.checkpoints) == [4]
    assert "step 8 was not committed" in ledger.lines(0)[-1]


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3s"), (187, "3m07s"), (3720, "1h02m")])
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text
